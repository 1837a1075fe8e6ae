"""Write folders and files so that they are complete or do not exist.

Each is built under a temporary name next to its final path and renamed once complete. If the process is killed, the
final path does not change. A folder is synced to disk first, so it also survives a power failure, and the next writer
removes what a killed one left.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from muse_fast.errors import UserError


def begin(out: Path) -> Path:
    """Create the temporary folder in which ``out`` is to be built, and return it.

    Raises:
        UserError: ``out`` exists already.
    """
    if out.exists():
        raise UserError(f"{out} exists already; remove it or choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out.parent, _temporary_prefix(out))
    folder = out.parent / f"{_temporary_prefix(out)}{os.getpid()}"
    folder.mkdir()
    return folder


def commit(folder: Path, out: Path) -> None:
    """Rename the finished temporary ``folder`` to ``out``, which survives a power failure once this returns."""
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)
    try:
        folder.rename(out)
    except OSError as error:
        raise UserError(f"{out}: the finished folder cannot be moved there ({error.strerror})") from error
    fsync(out.parent)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Create a temporary folder that becomes ``out`` when the block ends without an error.

    Raises:
        UserError: ``out`` exists already.
    """
    folder = begin(out)
    try:
        yield folder
        commit(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a single file, which becomes ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = _temporary_prefix(path.with_suffix(""))
    _remove_stale(path.parent, prefix, path.suffix)
    temporary = path.with_name(f"{prefix}{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON; a reader finds the old file or the new one, never a part of it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def writer_of(path: Path) -> int | None:
    """Return the pid of the process on this machine that created a temporary file or folder.

    None if ``path`` is not temporary or is from another machine.
    """
    named = re.fullmatch(rf"\.tmp-.+-{re.escape(socket.gethostname())}-(\d+)(\.[^.]*)?", path.name, re.DOTALL)
    return int(named[1]) if named else None


def is_running(pid: int) -> bool:
    """Whether a process of this machine, other than this one, is running."""
    if pid == os.getpid():  # a killed process had the same pid
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def fsync(path: Path) -> None:
    """Bring a file, or the list of files in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary_prefix(out: Path) -> str:
    return f".tmp-{out.name}-{socket.gethostname()}-"


def _remove_stale(place: Path, prefix: str, suffix: str = "") -> None:
    """Remove the temporary files or folders that killed writers of one name left in ``place`` on this machine."""
    for path in place.iterdir():
        pid = path.name.removeprefix(prefix).removesuffix(suffix)
        if path.name == f"{prefix}{pid}{suffix}" and pid.isdigit() and not is_running(int(pid)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
