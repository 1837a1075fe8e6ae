"""The tiles that cover a page, and where on it there is tissue."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import require
from muse_fast.images.slide import Slide
from muse_fast.images.tissue import MASK_UM, tissue_mask
from muse_fast.predicting.pages import Scale

ALIGNMENT = 32  # pixels: the coarsest stride of the networks
_RIM = 2  # pixels of the mask around tissue that count as tissue too: a nucleus at its edge


class Span(NamedTuple):
    """One axis of a tile, in pixels of the scale."""

    start: int  # of the tile
    core: int  # from where on nuclei belong to the tile
    end: int  # from where on they do not
    stop: int  # of the tile

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
    """Tiles of ``tile`` x ``tile`` pixels, smaller at the far sides; their cores cover the page without overlap.

    Around its core a tile shows ``margin`` pixels or more, less only where the page ends, so that every nucleus of the
    core is seen as it would be on the whole page. Tiles begin at multiples of ``ALIGNMENT``, so that the cells of a
    network fall on the same pixels in all of them.

    Raises:
        UserError: ``tile`` leaves no room for a core.
    """

    def __init__(self, scale: Scale, tile: int, margin: int) -> None:
        least = 2 * margin + ALIGNMENT
        require(tile >= least, "tile", tile, f"{least} or more, for {margin} px around a nucleus matter on each side")
        self._columns, self._rows = (_spans(side, tile, margin) for side in (scale.width, scale.height))

    def tiles(self) -> Iterator[Tile]:
        """All tiles, row by row."""
        for row, y in enumerate(self._rows):
            for column, x in enumerate(self._columns):
                yield Tile(row * len(self._columns) + column, row, x, y)


def _spans(side: int, tile: int, margin: int) -> list[Span]:
    pace = (tile - 2 * margin) // ALIGNMENT * ALIGNMENT
    count = 1 + max(0, math.ceil((side - tile) / pace))
    cuts = [0, *(i * pace + margin for i in range(1, count)), side]
    return [Span(i * pace, cuts[i], cuts[i + 1], min(i * pace + tile, side)) for i in range(count)]


class Tissue:
    """Where on a page nuclei are looked for.

    Args:
        everywhere: the whole page counts, and no mask is made.
        max_unreadable_px: pixels of level 0, see `Slide.thumbnail`.

    Attributes:
        area_mm2: of the tissue, or of the page.
    """

    def __init__(self, page: Slide, everywhere: bool, max_unreadable_px: float) -> None:
        from scipy.ndimage import binary_dilation

        self._pitch = MASK_UM / page.mpp  # level-0 pixels per pixel of the mask
        self._mask = None
        area = page.width * page.height * page.mpp**2
        if not everywhere:
            mask = tissue_mask(page.thumbnail(MASK_UM, max_unreadable_px), MASK_UM)
            area = min(area, float(mask.sum()) * MASK_UM**2)  # pixels of the mask stick out of the page
            self._mask = binary_dilation(mask, iterations=_RIM)
        self.area_mm2 = area / 1e6

    def meets(self, left: float, top: float, right: float, bottom: float) -> bool:
        """Whether there is tissue in a rectangle, in level-0 pixels."""
        if self._mask is None:
            return True
        columns = slice(math.floor(left / self._pitch), math.ceil(right / self._pitch))
        rows = slice(math.floor(top / self._pitch), math.ceil(bottom / self._pitch))
        return bool(self._mask[rows, columns].any())

    def holds(self, xy: NDArray[Any]) -> NDArray[np.bool_]:
        """Which of the points ``[n, 2]`` on the page, in level-0 pixels, lie in tissue."""
        if self._mask is None:
            return np.ones(len(xy), bool)
        column, row = np.floor(xy / self._pitch).astype(np.int64).T
        return self._mask[row, column]
