"""The nuclei of one image as points: those inside it, and non-maximum suppression."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError

_MAX_OUTSIDE = 0.1  # largest share of outlines whose centre may lie outside their image


@dataclass(frozen=True, slots=True)
class Points:
    """The nuclei of one image, tile or slide, found or annotated; positions are float32 unless scoring needs more.

    Attributes:
        xy: ``[n, 2]`` float, pixels.
        label: ``[n]`` int, the class from 0, or -1 for unknown; None: no classes.
        score: ``[n]`` float, confidence; None: no scores.
    """

    xy: NDArray[Any]
    label: NDArray[Any] | None = None
    score: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.xy)

    def classes(self) -> NDArray[Any]:
        """``label``, or zeros without labels: all are of one class."""
        return np.zeros(len(self.xy), np.int64) if self.label is None else self.label

    def confidence(self) -> NDArray[Any]:
        """``score``, or zeros without scores, so that the order of the points decides."""
        return np.zeros(len(self.xy)) if self.score is None else self.score

    def take(self, which: NDArray[Any]) -> Points:
        """The points at the rows ``which``, or where that mask is true."""
        label = None if self.label is None else self.label[which]
        return Points(self.xy[which], label, None if self.score is None else self.score[which])

    def within(self, x: int, y: int, side: int) -> Points:
        """The points inside a square, in pixels of that square; its right and lower borders are outside."""
        xy = self.xy - np.array([x, y], np.float32)
        return Points(xy, self.label, self.score).take(np.all((xy >= 0) & (xy < side), axis=1))


def drop_outside(
    points: Points, box: tuple[float, float, float, float], path: Path, area: str, expected: str
) -> tuple[Points, int]:
    """The points inside a box (left, top, right, bottom), as float32, and the number of those outside.

    Outlines may cross the border of an image, so the centre of a few may lie outside.

    Args:
        path, area, expected: for the message: the file, what the box is, and what the positions should be.

    Raises:
        UserError: more than a tenth lie outside, and more than one: the positions belong to something else.
    """
    left, top, right, bottom = box
    # Test the float32 values that are stored: rounding may put a centre on the border, which counts as outside.
    xy = points.xy.astype(np.float32)
    inside = np.all((xy >= (left, top)) & (xy < (right, bottom)), axis=1)
    outside = len(xy) - int(inside.sum())
    if outside > max(1, _MAX_OUTSIDE * len(xy)):
        x, y = points.xy[~inside][0]
        raise UserError(
            f"{path}: {outside} of {len(xy)} nuclei lie outside {area} (the first at {x:g}, {y:g}); expected {expected}"
        )
    return Points(xy, points.label, points.score).take(inside), outside


def non_maximum_suppression(xy: NDArray[Any], radius: float) -> NDArray[np.bool_]:
    """Which points ``[n, 2]``, most confident first, to keep: each one kept removes later ones within ``radius``.

    Returns:
        ``[n]`` bool.
    """
    from scipy.spatial import KDTree

    keep = np.ones(len(xy), bool)
    if len(xy) and radius > 0:
        pairs = KDTree(xy).query_pairs(radius, output_type="ndarray")  # in a pair the first index is the lower
        for better, worse in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tolist():
            if keep[better]:  # final, as all pairs in which it is the worse one came before
                keep[worse] = False
    return keep
