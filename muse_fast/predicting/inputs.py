"""Inputs of a command and results of an earlier one: which slide a file is, and what it was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muse_fast.errors import UserError
from muse_fast.images.slide import Slide, slide_identity
from muse_fast.predicting.pages import PageFile
from muse_fast.runtime import atomic
from muse_fast.runtime.folders import find_files
from muse_fast.sources.names import SlidesSeen
from muse_fast.sources.wsi import listed, reason_of


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


def each_name(pages: Sequence[PageFile]) -> tuple[list[PageFile], dict[Path, str]]:
    """The first page of each name, and why the others are refused: results are named like the inputs."""
    first, refused = dict[str, PageFile](), dict[Path, str]()
    for page in pages:
        if (other := first.setdefault(page.name, page)) != page:
            refused[page.path] = f"{other.path} has the same name; the names of inputs must differ"
    return list(first.values()), refused


def each_slide(pages: Sequence[PageFile]) -> list[PageFile]:
    """The pages without those of a slide of which an earlier one is a file; those that cannot be opened remain."""
    seen = SlidesSeen()

    def is_first(page: PageFile) -> bool:
        try:
            return seen.first(page.path, slide_identity(page.path)) == page.path
        except UserError:
            return True

    return [page for page in pages if is_first(page)]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The inputs that have no result of their own, and why."""

    refused: dict[Path, str]
    repeated: dict[Path, str]  # of a slide that another input is a file of

    def __contains__(self, page: PageFile) -> bool:
        return page.path in self.refused or page.path in self.repeated

    def record(self) -> dict[str, dict[str, str]]:
        """Both, for the summary of a command."""
        return {
            "refused": {str(path): reason for path, reason in self.refused.items()},
            "repeated": {str(path): reason for path, reason in self.repeated.items()},
        }

    def check(self, inputs: int) -> None:
        """Raise a UserError if some of so many inputs were refused."""
        if self.refused:
            raise UserError(f"{len(self.refused)} of {inputs} inputs could not be used\n{listed(self.refused)}")


def each_once(
    left: Sequence[PageFile],
    slides: SlidesTaken,
    refused: Mapping[Path, str],
    do: Callable[[PageFile], str],
    done_meanwhile: Callable[[PageFile], bool],
) -> LeftOut:
    """Do pages one after another, each slide once, and print a line for each.

    Args:
        left: what is to be done.
        slides: those that are done; the others are added.
        refused: inputs that were refused before, which are part of the result.
        do: does a page and describes the result.
        done_meanwhile: whether another command has finished a page, which is why ``do`` has failed.
    """
    out = LeftOut(dict(refused), {})
    for number, page in enumerate(left, start=1):
        try:
            if other := slides.same_as(page):
                words = out.repeated[page.path] = f"the same slide as {other}"
            else:
                words = do(page)
                slides.take(page)
        except (UserError, FileNotFoundError) as error:  # another command may have moved what this one made
            if done_meanwhile(page):
                words = "done by another command meanwhile"
            elif isinstance(error, UserError):
                words = out.refused[page.path] = reason_of(error, page.path)
            else:
                raise
        print(f"{number}/{len(left)} {page.path.name}: {words}", flush=True)
    return out


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
    """Hash of weights, a file or the ``.safetensors`` of a folder; "" if there is neither."""
    path = Path(weights)
    if path.is_file():
        return atomic.file_sha256(path)
    digest = hashlib.sha256()
    for file in find_files(path, "**/*.safetensors"):
        digest.update(f"{file.relative_to(path)} {atomic.file_sha256(file)}\n".encode())
    return digest.hexdigest() if path.is_dir() else ""


def changed_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``KEY OLD, not NEW`` of the first entry that differs, for a message; of settings only those that differ."""
    key = next(key for key in {**now, **before} if before.get(key) != now.get(key))
    old, new = before.get(key), now.get(key)
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
