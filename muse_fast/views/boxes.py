"""MPP views: their boxes in a ROI, their pixels and their nuclei (equations 4 and 5 of the paper).

A view is a square box of whole ROI pixels, resized to ``size`` pixels, then flipped and turned. The box's side is
rounded to whole pixels, and the recorded um/px is the exact one of that box, so pixels, nuclei and scale always agree.
One ``ViewBox`` transforms both pixels and points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from muse_fast.config import ViewsConfig
from muse_fast.errors import UserError


@dataclass(frozen=True, slots=True)
class ViewBox:
    """One view of a ROI: ``side`` x ``side`` ROI pixels at (``x``, ``y``), shown as ``size`` x ``size`` pixels."""

    x: int
    y: int
    side: int
    size: int
    flip: bool = False  # mirror left-right, before the turn
    turns: int = 0  # quarter turns, counter-clockwise

    def mpp(self, roi_mpp: float) -> float:
        """Return the um per pixel of the view."""
        return roi_mpp * self.side / self.size

    def map_points(self, xy: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map ROI pixels ``[n, 2]`` to view pixels ``[n, 2]`` (float32); points outside the view stay outside."""
        # In float64, so that the result is the correctly rounded position for any size of ROI.
        out = (xy.astype(np.float64) - (self.x, self.y)) * (self.size / self.side)
        if self.flip:
            out[:, 0] = self.size - out[:, 0]
        for _ in range(self.turns):
            out = np.stack([out[:, 1], self.size - out[:, 0]], axis=1)
        return out.astype(np.float32)

    def nuclei(self, xy: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return the ROI's nuclei in the view: view pixels ``[m, 2]`` and their indices ``[m]``, ascending.

        A nucleus is in the view if it is in the box before flip and turns, with the left and top border inside and the
        right and bottom border outside. If a flip or rounding puts it on the far border of the view, which is outside,
        it moves to the last float32 before the border; ROI sets do the same.
        """
        offset = xy.astype(np.float64) - (self.x, self.y)
        index = np.flatnonzero(((offset >= 0) & (offset < self.side)).all(axis=1))
        last = np.nextafter(np.float32(self.size), np.float32(0))
        return np.minimum(self.map_points(xy[index]), last), index.astype(np.int32)

    def render(self, image: Tensor) -> Tensor:
        """Render the view, uint8 ``[3, size, size]``, from the pixels of the ROI, uint8 ``[3, H, W]``.

        The resize is bicubic, and antialiased where the view is coarser than the ROI. The memory format is
        channels-last, which torch resizes several times faster.
        """
        crop = image[None, :, self.y : self.y + self.side, self.x : self.x + self.side]
        crop = crop.contiguous(memory_format=torch.channels_last)
        if self.side != self.size:
            crop = F.interpolate(crop, size=(self.size, self.size), mode="bicubic", antialias=True)
        view = crop[0]
        if self.flip:
            view = view.flip(-1)
        return torch.rot90(view, self.turns, (-2, -1)) if self.turns else view


def draw_boxes(
    rng: np.random.Generator, width: int, height: int, roi_mpp: float, xy: NDArray[np.float32], config: ViewsConfig
) -> tuple[list[ViewBox], list[ViewBox]]:
    """Draw the global and local boxes of one ROI.

    The globals lie in an anchor region just large enough for them, placed at random in the ROI, so that any two share
    at least ``min_overlap`` of the smaller side on each axis; each local lies inside a randomly chosen global. If views
    were placed independently in a 2048 px ROI, almost no nucleus would be in two of them. An anchor with fewer than
    ``min_nuclei`` nuclei is placed again, up to ``anchor_redraws`` times.

    Args:
        width, height: of the ROI, pixels.
        roi_mpp: um per pixel of the ROI.
        xy: its nuclei, ``[n, 2]`` pixels.

    Raises:
        UserError: the ROI is too small for the finest view that the settings allow.
    """
    room = min(width, height)
    sides = [
        _draw_side(rng, config.global_size, roi_mpp, config.global_mpp_min, config.global_mpp_max, room)
        for _ in range(config.num_globals)
    ]
    shortest, second = sorted(sides)[:2]
    anchor_side = min(room, shortest + second - math.ceil(config.min_overlap * shortest))
    for _ in range(1 + config.anchor_redraws):
        anchor_x = int(rng.integers(width - anchor_side + 1))
        anchor_y = int(rng.integers(height - anchor_side + 1))
        offset = xy - (anchor_x, anchor_y)
        if ((offset >= 0) & (offset < anchor_side)).all(axis=1).sum() >= config.min_nuclei:
            break
    globals_ = []
    for side in sides:
        x, y = (int(v) for v in rng.integers(anchor_side - side + 1, size=2))
        globals_.append(ViewBox(anchor_x + x, anchor_y + y, side, config.global_size, *_draw_turn(rng, config)))

    locals_ = []
    for _ in range(config.num_locals):
        side = _draw_side(rng, config.local_size, roi_mpp, config.local_mpp_min, config.local_mpp_max, room)
        host = globals_[int(rng.integers(len(globals_)))]
        x = _place_within(rng, side, host.x, host.side, width)
        y = _place_within(rng, side, host.y, host.side, height)
        locals_.append(ViewBox(x, y, side, config.local_size, *_draw_turn(rng, config)))
    return globals_, locals_


def check_room(width: int, height: int, roi_mpp: float, config: ViewsConfig) -> None:
    """Check that a ROI is large enough for the finest views.

    Raises:
        UserError: the ROI is too small; gives the size that is needed.
    """
    for kind, size, mpp in (
        ("global", config.global_size, config.global_mpp_min),
        ("local", config.local_size, config.local_mpp_min),
    ):
        needed = _side(size, mpp, roi_mpp)
        if needed > min(width, height):
            raise UserError(
                f"a {width} x {height} px ROI at {roi_mpp:.4g} um/px is too small for a {size} px {kind} view at "
                f"{mpp:.4g} um/px, which needs {needed} px: lower views.{kind}_size or views.{kind}_mpp_min, or "
                "prepare larger ROIs"
            )


def _side(size: int, view_mpp: float, roi_mpp: float) -> int:
    return max(1, round(size * view_mpp / roi_mpp))


def _draw_side(rng: np.random.Generator, size: int, roi_mpp: float, low: float, high: float, room: int) -> int:
    # If the ROI is too small for the coarsest views, shorten the range. Clamping the draw would pile views up at the
    # limit.
    coarsest = min(high, (room + 0.49) * roi_mpp / size)
    return min(room, _side(size, rng.uniform(low, max(low, coarsest)), roi_mpp))


def _draw_turn(rng: np.random.Generator, config: ViewsConfig) -> tuple[bool, int]:
    return (bool(rng.integers(2)), int(rng.integers(4))) if config.turns else (False, 0)


def _place_within(rng: np.random.Generator, side: int, start: int, length: int, limit: int) -> int:
    """Draw the first of ``side`` pixels inside ``start : start + length``; if ``side`` is longer, centre it there."""
    if side <= length:
        return start + int(rng.integers(length - side + 1))
    return min(max(start + (length - side) // 2, 0), limit - side)
