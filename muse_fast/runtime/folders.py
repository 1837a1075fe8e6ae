"""Searches of the user's folders, by the same rules in every command.

Linked folders are entered, each folder once. Names that begin with a dot are left out, such as the ``._NAME`` that a
Mac adds to each file it copies, and so are the folders in which systems keep files of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from muse_fast.errors import UserError

_OF_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")


def iter_files(folder: Path, pattern: str) -> Iterator[Path]:
    """The files whose path in ``folder`` matches a pattern such as ``*.csv``, ``*/images/*.png`` or ``**/*.mat``.

    ``**`` stands for the folder itself and all folders below it. A link to nowhere counts as a file, so that it is
    reported when it is opened. There are no files in a folder that does not exist.

    Raises:
        UserError: a folder cannot be read.
    """
    name, _, rest = pattern.partition("/")
    if name == "**":
        for below in _folders_below(folder):
            yield from iter_files(below, rest)
        return
    for entry in _entries(folder):
        if not fnmatchcase(entry.name, name):
            continue
        if rest and _is_folder(entry):
            yield from iter_files(Path(entry.path), rest)
        elif not rest and not _is_folder(entry) and (entry.is_symlink() or entry.is_file()):
            yield Path(entry.path)


def find_files(folder: Path, pattern: str) -> list[Path]:
    """The same files, sorted."""
    return sorted(iter_files(folder, pattern))


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted."""
    return [Path(entry.path) for entry in _entries(folder) if _is_folder(entry)]


def _folders_below(folder: Path) -> Iterator[Path]:
    """A folder and all below it, each once: a linked one only after those that are not reached through links."""
    seen: set[Path] = set()
    waiting, links = [folder], list[Path]()
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)
        real = here.resolve()
        if real in seen:
            continue
        seen.add(real)
        yield here
        for path in subfolders(here):
            if not path.is_symlink():
                waiting.append(path)
            elif path.resolve() not in (real, *real.parents):  # a link upwards would lead back here
                links.append(path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if entry.name[0] != "." and entry.name not in _OF_SYSTEMS]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be read ({error.strerror})") from error
    return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be read
        return False
