"""Every byte of a run folder or a ROI set, checked; and what can be put right, put right.

Nothing that may be of use is deleted: what a killed process left half-written goes, all else is told.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from muse_fast.errors import UserError
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime import atomic, checkpoint

REPAIRED = ("removed", "row removed", "left alone")
_YOUNG = 60  # seconds; files do not say which machine they are from


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        repair: what was done about it; nothing where nothing can be.
    """

    problem: str
    repair: str = ""


def check(path: Path) -> tuple[str, list[Finding]]:
    """What ``path`` is and how much was read of it, and what is wrong with it.

    Raises:
        UserError: neither a run folder nor a ROI set, or a ROI set that cannot be opened.
    """
    if (path / "roiset.json").exists():
        return _check_roiset(path)
    if (path / "config.yaml").exists() or (path / "checkpoints").is_dir():
        return _check_run(path)
    raise UserError(f"{path}: neither a run (no config.yaml) nor a ROI set (no roiset.json)")


def _check_roiset(path: Path) -> tuple[str, list[Finding]]:
    roiset = RoiSet(path)
    findings = [
        Finding(problem, "cannot be repaired: the set holds each byte once; copy it again or prepare it anew")
        for problem in roiset.verify()
    ]
    expected = {"roiset.json", "index.bin", "nuclei.bin", *roiset.info["shards"]}
    unnamed = [file for file in path.glob("*.bin") if file.name not in expected]
    findings += [Finding(f"{file}: no part of the set; nothing reads it") for file in unnamed]
    findings += _leftovers(path.parent, f".tmp-{path.name}-*")
    return f"ROI set of {len(roiset)} ROIs and {int(roiset.num_nuclei.sum())} nuclei", findings


def _check_run(path: Path) -> tuple[str, list[Finding]]:
    steps = checkpoint.steps(path)
    findings, sound = [], 0
    for step in steps:
        folder = checkpoint.folder_of(path, step)
        try:
            checkpoint.verify(folder)
            state = checkpoint.read_state(folder)
            if state["step"] != step:
                raise UserError(f"{folder}: holds step {state['step']}")
            for file in sorted(folder.glob("*.safetensors")):
                checkpoint.read_tensors(folder, file.stem)
            sound += 1
        except UserError as error:
            findings.append(Finding(str(error), "cannot be repaired; a run that goes on passes it over"))
    if steps and not sound:
        findings.append(Finding(f"{path}: no checkpoint is sound; the run can only begin anew, in another folder"))
    findings += _leftovers(path / "checkpoints", ".tmp-*")
    findings += _leftovers(path, ".*")
    findings += _check_json(path)
    findings += _check_rows(path / "metrics.jsonl")
    return f"run with {len(steps)} checkpoints, {sound} of them sound", findings


def _leftovers(folder: Path, pattern: str) -> Iterator[Finding]:
    """Drop what killed processes left; what one that lives, or may live elsewhere, is about to finish stays."""
    for path in sorted(folder.glob(pattern)):
        pid = atomic.writer_of(path)
        if pid is None and not path.name.startswith(".tmp-"):
            continue
        if pid is None or atomic.is_running(pid) or (path.is_file() and time.time() - path.stat().st_mtime < _YOUNG):
            yield Finding(f"{path}: another process may be writing it", "left alone")
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield Finding(f"{path}: left by a process that was killed", "removed")


def _check_json(path: Path) -> Iterator[Finding]:
    for file in sorted(path.glob("*.json")):
        try:
            json.loads(file.read_text())
        except ValueError as error:
            yield Finding(f"{file}: not valid JSON ({error})")


def _check_rows(path: Path) -> Iterator[Finding]:
    """Drop a last row that a kill has cut; as a run that goes on does."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        yield Finding(f"{path}: the last row was cut by a kill", "row removed")
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError:
            yield Finding(f"{path}: row {number} is not valid JSON")
