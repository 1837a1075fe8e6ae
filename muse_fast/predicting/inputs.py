"""Inputs of a command and results of an earlier one: which slide a file is, and what it was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muse_fast.errors import UserError
from muse_fast.images.slide import Slide, slide_identity
from muse_fast.predicting.pages import PageFile
from muse_fast.runtime import atomic
from muse_fast.runtime.folders import find_files
from muse_fast.sources.names import SlidesSeen


class SlidesTaken:
    """The slides that are done, to do those that consist of several files, or have copies, once.

    Args:
        finished: pages done by an earlier command, and their `Slide.identity`.
    """

    def __init__(self, finished: Mapping[PageFile, str | None]) -> None:
        self._seen, self._taken = SlidesSeen(), dict[Path, PageFile]()
        self._first_of: dict[Path, Path] = {}  # of the pages asked for, as finding out opens the slide
        for page, identity in finished.items():
            self._taken[self._seen.first(page.path, identity)] = page

    def same_as(self, page: PageFile) -> Path | None:
        """The file from which the slide of this page was read; None: it has not been read.

        Raises:
            UserError: the page cannot be opened, or the tables give both files different um per pixel.
        """
        other = self._taken.get(self._first(page))
        if other and other.listed and page.listed and other.mpp != page.mpp:
            raise UserError(
                f"the same slide as {other.path}, but mpp.csv gives it {page.mpp:g} um/px and that {other.mpp:g}; "
                "correct mpp.csv, or remove one of the files"
            )
        return other.path if other else None

    def take(self, page: PageFile) -> None:
        """Record that a page is done."""
        self._taken[self._first(page)] = page

    def _first(self, page: PageFile) -> Path:
        if page.path not in self._first_of:
            self._first_of[page.path] = self._seen.first(page.path, slide_identity(page.path))
        return self._first_of[page.path]


def read_record(path: Path) -> dict[str, Any]:
    """What a JSON file of an earlier command contains; empty if there is none or it is damaged, as by a power cut."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def fingerprint_of(path: Path) -> dict[str, Any]:
    """Identifies a file without reading all of it."""
    with open(path, "rb") as file:
        head = hashlib.sha256(file.read(1 << 20)).hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256_of_first_mib": head}


def weights_sha256(weights: str) -> str:
    """Hash of the user's weights, a file or the ``.safetensors`` of a folder; "" for built-in ones."""
    path = Path(weights)
    if path.is_file():
        return atomic.file_sha256(path)
    digest = hashlib.sha256()
    for file in find_files(path, "**/*.safetensors"):
        digest.update(f"{file.relative_to(path)} {atomic.file_sha256(file)}\n".encode())
    return digest.hexdigest() if path.is_dir() else ""


def changed_words(key: str, old: Any, new: Any) -> str:
    """``KEY OLD, not NEW`` for a message; of settings only those that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        old, new = (
            {key: one[key] for key in one if one[key] != other.get(key)} for one, other in ((old, new), (new, old))
        )
    return f"{key} {old}, not {new}"


def scale_words(mpp: float | None) -> str:
    """The um per pixel that were given for a file, for a message."""
    return "the um/px of the header" if mpp is None else f"{mpp} um/px"


def unlike_header(page: Slide) -> str:
    """How the given um/px differs from the header's, if by more than a fifth; else ""."""
    try:
        header = page.header_mpp()
    except UserError:  # implausible: that is why another is given
        return ""
    if header is None or max(header / page.mpp, page.mpp / header) < 1.2:
        return ""
    return f"{page.mpp:g} um/px as given, though the header says {header:g}"
