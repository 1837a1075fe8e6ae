"""The tiles that cover a page, and its tissue."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import require
from muse_fast.images.slide import Slide
from muse_fast.images.tissue import MASK_UM, Damage, tissue_mask
from muse_fast.predicting.pages import Scale

ALIGNMENT = 32  # pixels: the coarsest stride of the networks
_RIM = 2  # mask pixels around tissue that count as tissue too, for nuclei at its edge


class Span(NamedTuple):
    """One axis of a tile, in pixels of the scale."""

    start: int  # of the tile
    core: int  # start of the core, whose nuclei belong to the tile
    end: int  # of the core, exclusive
    stop: int  # of the tile, exclusive

    @property
    def length(self) -> int:
        return self.stop - self.start


class Tile(NamedTuple):
    """A tile of a page."""

    number: int
    row: int
    x: Span
    y: Span


class Grid:
    """Tiles of ``tile`` x ``tile`` pixels, smaller at the right and bottom; their cores cover the page without overlap.

    A tile shows at least ``margin`` pixels around its core, less only at the border of the page, so that every nucleus
    of the core looks as it would on the whole page. Tiles begin at multiples of ``ALIGNMENT``, so that the cells of a
    network fall on the same pixels in all of them.

    Raises:
        UserError: ``tile`` is too small for a core.
    """

    def __init__(self, scale: Scale, tile: int, margin: int) -> None:
        least = 2 * margin + ALIGNMENT
        require(tile >= least, "tile", tile, f"at least {least}, as {margin} px around a nucleus affect it")
        self._columns, self._rows = (_spans(side, tile, margin) for side in (scale.width, scale.height))

    def tiles(self) -> Iterator[Tile]:
        """All tiles, row by row."""
        for row, y in enumerate(self._rows):
            for column, x in enumerate(self._columns):
                yield Tile(row * len(self._columns) + column, row, x, y)


def _spans(side: int, tile: int, margin: int) -> list[Span]:
    stride = (tile - 2 * margin) // ALIGNMENT * ALIGNMENT
    count = 1 + max(0, math.ceil((side - tile) / stride))
    cuts = [0, *(i * stride + margin for i in range(1, count)), side]
    return [Span(i * stride, cuts[i], cuts[i + 1], min(i * stride + tile, side)) for i in range(count)]


class Tissue:
    """The part of a page in which to look for nuclei.

    Args:
        everywhere: the whole page.
        max_unreadable: share of it that may be unreadable.

    Attributes:
        damage: what of it is unreadable so far: what the overview lacks, which may be tissue, and what is added.

    Raises:
        UserError: too much of it is unreadable.
    """

    def __init__(self, page: Slide, everywhere: bool, max_unreadable: float) -> None:
        from scipy.ndimage import binary_dilation

        self._pitch = MASK_UM / page.mpp  # level-0 pixels per pixel of the mask
        self._page_mm2 = page.width * page.height * page.mpp**2 / 1e6
        overview = page.overview(MASK_UM, max_unreadable)
        shape = overview.pixels.shape[:2]
        mask = np.ones(shape, bool) if everywhere else tissue_mask(overview.pixels, MASK_UM)
        unreadable = overview.lost.mask(shape, self._pitch)
        self._mask = binary_dilation(mask & ~unreadable, iterations=_RIM)
        self.damage = Damage(mask | unreadable, self._pitch, max_unreadable)
        self.damage.add(overview.lost)

    @property
    def area_mm2(self) -> float:
        """Area of the tissue, or of the page, without what is unreadable."""
        return min(self._page_mm2, self.damage.readable_mm2)  # mask pixels extend beyond the page

    def overlaps(self, left: float, top: float, right: float, bottom: float) -> bool:
        """Whether there is tissue in a rectangle, in level-0 pixels."""
        columns = slice(math.floor(left / self._pitch), math.ceil(right / self._pitch))
        rows = slice(math.floor(top / self._pitch), math.ceil(bottom / self._pitch))
        return bool(self._mask[rows, columns].any())

    def contains(self, xy: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of the points ``[n, 2]`` on the page, in level-0 pixels, lie in tissue."""
        column, row = np.floor(xy / self._pitch).astype(np.int64).T
        return self._mask[row, column]
