"""Checkpoints, written so that no kill, full disk or flipped bit can lead to a wrong resume.

    RUN/checkpoints/step-00000123/
        student.safetensors  teacher.safetensors  optimizer.safetensors  state.safetensors
        state.json           step and config
        MANIFEST.json        size and sha256 of every file above

A checkpoint is written into a temporary folder, hashed, synced to disk and renamed; only then are older ones deleted.
The latest checkpoint is the newest one that passes verification. Tensors are safetensors and the rest is JSON, so
loading a checkpoint never runs code.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from muse_fast.errors import UserError
from muse_fast.runtime import atomic
from muse_fast.runtime.folders import iter_files
from muse_fast.runtime.tensors import write_tensors

MANIFEST = "MANIFEST.json"
STATE = "state.json"
_KEEP_LAST = 2
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(UserError):
    """A checkpoint is damaged; the message names the file."""


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save(
    run: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep_every: int
) -> Path:
    """Write the checkpoint of ``step`` and delete older ones except the last two and every ``keep_every``-th.

    Args:
        tensors: file stem -> name -> tensor.
        state: anything that JSON can represent.

    Raises:
        UserError: the disk is full or cannot be written; earlier checkpoints remain.
    """
    out = folder_of(run, step)
    if out.exists():  # from before the run resumed at an earlier step: the same step has the same content
        shutil.rmtree(out)
    folder = atomic.begin(out)
    try:
        for stem, named in tensors.items():
            write_tensors(folder / f"{stem}.safetensors", named)
        (folder / STATE).write_text(json.dumps(state, indent=1))
        files = sorted(path for path in folder.iterdir())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": atomic.file_sha256(path)} for path in files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        atomic.commit(folder, out)
    except BaseException as error:
        needed = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
        free = shutil.disk_usage(folder.parent).free
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            what = "no room" if free < needed else f"cannot be written ({error}); it needs room"
            raise UserError(
                f"{out}: {what} for a checkpoint of {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; "
                "make room and start again with --resume auto; earlier checkpoints are intact"
            ) from error
        raise
    _prune(run, keep_every)
    return out


def steps(run: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, ascending."""
    root = run / "checkpoints"
    names = [_NAME.fullmatch(path.name) for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(name[1]) for name in names if name)


def latest(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that passes verification, and the problems of newer ones."""
    problems: list[str] = []
    for step in reversed(steps(run)):
        folder = folder_of(run, step)
        try:
            verify(folder)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return folder, problems
    return None, problems


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing, truncated or altered; names the first.
    """
    manifest = _read_json(folder / MANIFEST)
    for name, entry in manifest.items():
        _verify_file(folder, name, entry)
    extra = {path.name for path in iter_files(folder, "*")} - set(manifest) - {MANIFEST}
    if extra:
        raise CheckpointError(f"{folder / min(extra)}: not in {MANIFEST}; the checkpoint was altered")


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Verify and read the tensors of one file.

    Raises:
        CheckpointError: as :func:`verify`, for this file; or it is not a safetensors file.
    """
    name = f"{stem}.safetensors"
    _verify_file(folder, name, _read_json(folder / MANIFEST).get(name))
    try:
        return load_file(folder / name)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / name}: not a safetensors file ({error}), yet its hash is right") from None


def read_state(folder: Path) -> dict[str, Any]:
    """Verify and read the JSON state, which contains the step."""
    _verify_file(folder, STATE, _read_json(folder / MANIFEST).get(STATE))
    state = _read_json(folder / STATE)
    if not isinstance(state.get("step"), int):
        raise CheckpointError(f"{folder / STATE}: it has no step, yet its hash is right")
    return state


def remove_temporary(run: Path) -> None:
    """Remove what a killed save left; only the process that owns the run may call this."""
    for path in (run / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(path)


def _verify_file(folder: Path, name: str, entry: Any) -> None:
    path = folder / name
    if not isinstance(entry, dict) or Path(name).name != name:
        raise CheckpointError(f"{folder / MANIFEST}: no valid entry for {name!r}; the manifest was altered")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    if path.stat().st_size != entry.get("bytes"):
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes, expected {entry.get('bytes')}; the file is truncated"
        )
    if atomic.file_sha256(path) != entry.get("sha256"):
        raise CheckpointError(f"{path}: its sha256 differs from the manifest; the file is damaged")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; not a checkpoint folder") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); the file is damaged") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object; the file is damaged")
    return content


def _prune(run: Path, keep_every: int) -> None:
    for step in steps(run)[:-_KEEP_LAST]:
        if not (keep_every and step % keep_every == 0):
            shutil.rmtree(folder_of(run, step))
