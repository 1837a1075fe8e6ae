"""The windows of a page from which its nuclei are read.

They lie on a grid that depends only on the size of the page, the side of a window and the margin, so the window of a
nucleus does not depend on other nuclei, on batches or on the order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import require
from muse_fast.predicting.tiles import ALIGNMENT


class Window(NamedTuple):
    """A window and its nuclei."""

    left: int  # of its corner, in pixels of the scale; negative if the page is smaller than a window
    top: int
    area: float  # of its core, in square pixels
    nuclei: NDArray[np.int64]  # [n] rows of the nuclei that are read from it, ascending, n >= 1


class Windows:
    """Windows of ``side`` x ``side`` pixels whose cores cover a page without overlap.

    A window shows at least ``margin`` pixels around its core, less only at the border of the page. The windows begin at
    multiples of ``ALIGNMENT``, so that the tokens and cells of a network fall on the same pixels in all of them, except
    the last column and row, which end with the page. A page smaller than a window lies in its middle.

    Args:
        width, height: of the page, in pixels of the scale.

    Raises:
        UserError: ``side`` is too small for a core.
    """

    def __init__(self, width: int, height: int, side: int, margin: int) -> None:
        least = 2 * margin + ALIGNMENT
        require(side >= least, "window", side, f"at least {least}, as each nucleus is shown with {margin} px around it")
        (self._lefts, self._x), (self._tops, self._y) = (_axis(length, side, margin) for length in (width, height))

    def number(self, xy: NDArray[np.float64]) -> NDArray[np.int64]:
        """The window ``[n]``, counted row by row, whose core contains each of the points ``[n, 2]`` on the page."""
        column = np.searchsorted(self._x[1:-1], xy[:, 0], side="right")
        row = np.searchsorted(self._y[1:-1], xy[:, 1], side="right")
        return row.astype(np.int64) * len(self._lefts) + column

    def occupied(self, xy: NDArray[np.float64]) -> Iterator[Window]:
        """The windows with nuclei at ``xy [n, 2]``, row by row."""
        number = self.number(xy)
        order = np.argsort(number, kind="stable")
        firsts = np.flatnonzero(np.diff(number[order], prepend=-1))
        for first, end in pairwise([*firsts.tolist(), len(order)]):
            row, column = divmod(int(number[order[first]]), len(self._lefts))
            area = (self._x[column + 1] - self._x[column]) * (self._y[row + 1] - self._y[row])
            yield Window(self._lefts[column], self._tops[row], float(area), order[first:end])


def _axis(length: int, side: int, margin: int) -> tuple[list[int], NDArray[Any]]:
    """Start of each of w windows along one axis, and the borders ``[w + 1]`` of their cores."""
    if length <= side:
        return [(length - side) // 2], np.array([0.0, length])
    stride = (side - 2 * margin) // ALIGNMENT * ALIGNMENT
    count = 1 + math.ceil((length - side) / stride)
    starts = [min(i * stride, length - side) for i in range(count)]
    return starts, np.array([0, *((left + side + right) / 2 for left, right in pairwise(starts)), length])
