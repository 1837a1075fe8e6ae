"""What is to be made of a ROI, drawn before a pixel of it is decoded.

A plan holds the views' boxes and colours. Whatever backend then renders them, pixels and nuclei agree: the boxes that
cut the pixels are those that move the nuclei.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from muse_fast.batch import PackedNuclei
from muse_fast.config import ViewsConfig
from muse_fast.data.augment import Colour, draw_colour
from muse_fast.data.roiset_format import Roi
from muse_fast.data.views import ViewBox, draw_boxes


@dataclass(frozen=True, slots=True)
class Plan:
    """The views of one ROI: globals first."""

    roi: Roi
    epoch: int
    boxes: tuple[ViewBox, ...]  # [V], of the globals and then of the locals
    colours: tuple[Colour, ...]  # [V]
    num_globals: int

    def window(self) -> tuple[int, int, int, int]:
        """The least rectangle of ROI pixels that holds every box: x, y, width, height."""
        left, top = min(box.x for box in self.boxes), min(box.y for box in self.boxes)
        right, bottom = max(box.x + box.side for box in self.boxes), max(box.y + box.side for box in self.boxes)
        return left, top, right - left, bottom - top

    def nuclei(self) -> PackedNuclei:
        """The nuclei of every view, view after view."""
        seen = [box.nuclei(self.roi.xy) for box in self.boxes]
        return PackedNuclei(
            xy=torch.from_numpy(np.concatenate([points for points, _ in seen])),
            index=torch.from_numpy(np.concatenate([index for _, index in seen])),
            offsets=torch.from_numpy(np.cumsum([0, *(len(index) for _, index in seen)], dtype=np.int32)),
        )


def draw_plan(roi: Roi, epoch: int, seed: int, config: ViewsConfig) -> Plan:
    """Draw the views of ``roi``; every choice derives from (seed, epoch, ROI id).

    Raises:
        UserError: the ROI is too small for the views.
    """
    rng = np.random.default_rng([seed, epoch, roi.id])
    globals_, locals_ = draw_boxes(rng, roi.width, roi.height, roi.mpp, config)
    roles = ["first", "second", *["local"] * len(locals_)]
    return Plan(
        roi=roi,
        epoch=epoch,
        boxes=(*globals_, *locals_),
        colours=tuple(draw_colour(rng, role, config) for role in roles),
        num_globals=len(globals_),
    )
