"""Check every byte of a run folder or a ROI set, and repair what can be repaired.

Nothing useful is deleted: files that a killed process left half-written are removed, everything else is reported.
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
from muse_fast.runtime.folders import find_files, iter_files

REPAIRED = ("removed", "row removed", "left alone")
_YOUNG = 60  # seconds; a file name does not contain its machine


class Finding(NamedTuple):
    """A problem that was found.

    Attributes:
        repair: what was done about it; empty if nothing can be done.
    """

    problem: str
    repair: str = ""


def check(path: Path) -> tuple[str, list[Finding]]:
    """Check a run folder or a ROI set; returns a description of what was read, and the problems.

    Raises:
        UserError: ``path`` is neither a run folder nor a ROI set, or is a ROI set that cannot be opened.
    """
    if (path / "roiset.json").exists():
        return _check_roiset(path)
    if (path / "config.yaml").exists() or (path / "checkpoints").is_dir():
        return _check_run(path)
    raise UserError(f"{path}: neither a run (it has no config.yaml) nor a ROI set (it has no roiset.json)")


def _check_roiset(path: Path) -> tuple[str, list[Finding]]:
    roiset = RoiSet(path)
    findings = [
        Finding(problem, "cannot be repaired, because the set contains each byte once; copy it or run prepare again")
        for problem in roiset.verify()
    ]
    expected = {"roiset.json", "index.bin", "nuclei.bin", *roiset.info["shards"]}
    unnamed = [file for file in iter_files(path, "*.bin") if file.name not in expected]
    findings += [Finding(f"{file}: not a part of the set; nothing reads it") for file in unnamed]
    findings += _leftovers(path.parent, f".tmp-{path.name}-*")
    return f"ROI set of {len(roiset)} ROIs and {int(roiset.num_nuclei.sum())} nuclei", findings


def _check_run(path: Path) -> tuple[str, list[Finding]]:
    steps = checkpoint.steps(path)
    findings, intact = [], 0
    for step in steps:
        folder = checkpoint.folder_of(path, step)
        try:
            checkpoint.verify(folder)
            state = checkpoint.read_state(folder)
            if state["step"] != step:
                raise UserError(f"{folder}: contains step {state['step']}")
            for file in find_files(folder, "*.safetensors"):
                checkpoint.read_tensors(folder, file.stem)
            intact += 1
        except UserError as error:
            findings.append(Finding(str(error), "cannot be repaired; a run skips it when it resumes"))
    if steps and not intact:
        findings.append(Finding(f"{path}: no checkpoint is intact; start the run again in another folder"))
    findings += _leftovers(path / "checkpoints", ".tmp-*")
    findings += _leftovers(path, ".*")
    findings += _check_json(path)
    findings += _check_rows(path / "metrics.jsonl")
    return f"run with {len(steps)} checkpoints, {intact} intact", findings


def _leftovers(folder: Path, pattern: str) -> Iterator[Finding]:
    """Remove what killed processes left, but not what a running process, perhaps on another machine, may finish."""
    for path in sorted(folder.glob(pattern)):
        pid = atomic.writer_of(path)
        if pid is None and not path.name.startswith(".tmp-"):
            continue
        if pid is None or atomic.is_running(pid) or (path.is_file() and time.time() - path.stat().st_mtime < _YOUNG):
            yield Finding(f"{path}: another process may be writing it", "left alone")
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield Finding(f"{path}: left by a killed process", "removed")


def _check_json(path: Path) -> Iterator[Finding]:
    for file in find_files(path, "*.json"):
        try:
            json.loads(file.read_text())
        except ValueError as error:
            yield Finding(f"{file}: not valid JSON ({error})")


def _check_rows(path: Path) -> Iterator[Finding]:
    """Drop a last row that a kill truncated, as a run does when it resumes."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        yield Finding(f"{path}: the last row was truncated by a kill", "row removed")
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError:
            yield Finding(f"{path}: row {number} is not valid JSON")
