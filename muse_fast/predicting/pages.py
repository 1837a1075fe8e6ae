"""Pages, which are slides or plain images, read in pieces at the um per pixel that a network expects.

Positions are in level-0 pixels, in pixels of a level, or in pixels of the page scaled to other um per pixel. All have
the same origin, so they differ only by factors.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images.mpp import MppTables
from muse_fast.images.slide import Level, Lost, Slide, find_slides, open_slide
from muse_fast.sources.wsi import usable_cpus

SAME_SCALE = 0.02  # relative difference in um per pixel below which pixels are not resampled
MAX_ENLARGEMENT = 2.0  # in coarser slides a network would see only blur


class PageFile(NamedTuple):
    """A page that has not been opened yet."""

    path: Path
    mpp: float | None  # None: from the header
    listed: bool = False  # in a table, from which ``mpp`` is

    @property
    def name(self) -> str:
        return self.path.stem

    def open(self) -> Slide:
        """Open it; errors as in `open_slide`."""
        return open_slide(self.path, self.mpp)


def find_pages(inputs: Sequence[Path], mpp: float | None, out: Path | None = None) -> tuple[list[PageFile], list[str]]:
    """The slides and images that ``inputs`` name, including those in folders and their subfolders.

    um per pixel comes from the nearest ``mpp.csv`` that lists the file (in its folder or above, up to the given one),
    else from ``mpp``, else from the header.

    Args:
        out: folder of results, in which nothing is an input.

    Returns:
        The pages, those in a table first, and lines for the user about rows of the tables that list none of them.

    Raises:
        UserError: an input does not exist or contains no slides or images, or a table is invalid.
    """
    pages, tables = dict[Path, PageFile](), MppTables()
    for given in inputs:
        root = given if given.is_dir() else given.parent
        if given.is_dir():
            tables.read_all(given)
        for path in find_slides(given, images=True):
            row = tables.find(path, root)
            pages[path] = PageFile(path, row.mpp if row else mpp, row is not None)
    found = [page for page in pages.values() if out is None or out.resolve() not in page.path.resolve().parents]
    return sorted(found, key=lambda page: not page.listed), tables.without_effect()


def reading_threads(asked: int | None) -> int:
    """Number of threads that read a page: as many as asked for, else one per core, at most 8."""
    return asked or min(8, usable_cpus())


class PagePerThread:
    """A page, opened by each thread that reads it: an error would close a shared handle for the other threads too.

    Attributes:
        first: open, for the thread that made this.

    Raises:
        UserError: as in `open_slide`.
    """

    def __init__(self, file: PageFile) -> None:
        self._file, self.first = file, file.open()
        self._opened, self._lock, self._local = [self.first], threading.Lock(), threading.local()
        self._local.page = self.first

    def own(self) -> Slide:
        """The page as opened by this thread; an image, which is in memory, is opened once."""
        if self.first.in_memory:
            return self.first
        if not hasattr(self._local, "page"):
            page = self._file.open()
            with self._lock:
                self._opened.append(page)
            self._local.page = page
        own: Slide = self._local.page
        return own

    def close(self) -> None:
        for page in self._opened:
            page.close()


class Scale:
    """A page at the um per pixel that a network expects.

    It is read from the coarsest level that is fine enough. A level within ``SAME_SCALE`` is used as it is.

    Attributes:
        mpp: um per pixel, that of a level if one is close enough.
        step: level-0 pixels per pixel, along x and y.
        width, height: of the page, in whole pixels of this scale; a remainder at the right and bottom is dropped.

    Raises:
        UserError: the slide is too coarse.
    """

    def __init__(self, page: Slide, mpp: float) -> None:
        if page.mpp > MAX_ENLARGEMENT * mpp * (1 + SAME_SCALE):
            raise UserError(
                f"{page.path}: {page.mpp:g} um/px is too coarse for a network that works at {mpp:g}, "
                f"expected at most {MAX_ENLARGEMENT * mpp:g}"
            )
        wanted = mpp / page.mpp
        ratios = [_ratios(page, level) for level in page.levels]
        fine = [i for i, ratio in enumerate(ratios) if max(ratio) <= wanted * (1 + SAME_SCALE)]
        self._number = max(fine, key=lambda i: ratios[i], default=0)
        self._level, ratio = page.levels[self._number], ratios[self._number]
        same = wanted * (1 - SAME_SCALE) <= max(ratio) <= wanted * (1 + SAME_SCALE)
        self.step = ratio if same else (wanted, wanted)
        self.mpp = page.mpp * self.step[0]
        self._shrink = self.step[0] / ratio[0], self.step[1] / ratio[1]  # pixels of the level per pixel
        self.width, self.height = (
            max(1, math.floor(side / shrink)) for side, shrink in zip(self._level[:2], self._shrink, strict=True)
        )

    def read(self, page: Slide, x: int, y: int, width: int, height: int, lost: Lost) -> NDArray[np.uint8]:
        """``[height, width, 3]`` RGB with the corner at ``x``, ``y``, in pixels of this scale, all of it on the page.

        A pixel does not depend on the piece in which it is read. Damage is treated as by `Slide.salvage`.
        """
        left, first_x, columns = self._span(x, width, self._shrink[0], self._level.width)
        top, first_y, rows = self._span(y, height, self._shrink[1], self._level.height)
        block = page.salvage(first_x, first_y, columns, rows, self._number, lost)
        right, bottom = left + width * self._shrink[0], top + height * self._shrink[1]
        box = (left, top, min(right, columns), min(bottom, rows))  # a page may be less than a pixel of this scale
        if box == (0, 0, columns, rows) == (0, 0, width, height):
            return block
        return np.asarray(Image.fromarray(block).resize((width, height), Image.Resampling.BICUBIC, box))

    def _span(self, start: int, length: int, shrink: float, side: int) -> tuple[float, int, int]:
        """The block to read along one axis: start of the piece in it, its first level-0 pixel, and its length."""
        downsample = self._level.downsample
        exact = shrink == 1 and downsample == round(downsample)
        margin = 0 if exact else math.ceil(2 * max(1.0, shrink)) + 1  # pixels that the filter needs
        first = max(0, math.floor(start * shrink) - margin)
        last = min(side, math.ceil((start + length) * shrink) + margin)
        # `Slide.read` takes whole level-0 pixels, which may lie between two pixels of the level.
        location = math.ceil(first * downsample - 1e-6)
        return start * shrink - location / downsample, location, last - first


def _ratios(page: Slide, level: Level) -> tuple[float, float]:
    """Level-0 pixels per pixel of a level, along x and y.

    Sides of levels are rounded to whole pixels, so their quotient is slightly off. A whole number that explains
    them is used instead: over half a million level-0 pixels, 4.0001 instead of 4 is off by 12.
    """
    return _ratio(page.width, level.width), _ratio(page.height, level.height)


def _ratio(full: int, reduced: int) -> float:
    whole = round(full / reduced)
    return float(whole) if abs(full - whole * reduced) < whole else full / reduced
