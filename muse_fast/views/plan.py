"""The plan of a ROI's views, drawn before a pixel is decoded.

A plan contains the views' boxes and colours. Pixels and nuclei agree with every backend, because the same boxes crop
the pixels and move the nuclei.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch

from muse_fast.batch import PackedNuclei, PlannedViews
from muse_fast.config import ViewsConfig
from muse_fast.roiset.records import Roi
from muse_fast.views.boxes import ViewBox, draw_boxes
from muse_fast.views.colours import Colour, draw_colour


@dataclass(frozen=True, slots=True)
class Plan:
    """The views of one ROI: globals first."""

    roi: Roi
    epoch: int
    boxes: tuple[ViewBox, ...]  # [V]
    colours: tuple[Colour, ...]  # [V]
    num_globals: int

    def window(self) -> tuple[int, int, int, int]:
        """Return the smallest rectangle of ROI pixels that contains every box: x, y, width, height."""
        left, top = min(box.x for box in self.boxes), min(box.y for box in self.boxes)
        right, bottom = max(box.x + box.side for box in self.boxes), max(box.y + box.side for box in self.boxes)
        return left, top, right - left, bottom - top

    def cut(self) -> tuple[bytes, int]:
        """Return a JPEG of the rows that the views cover and the ROI row where it starts; see `Roi.cut_rows`."""
        _, top, _, height = self.window()
        return self.roi.cut_rows(top, top + height)

    def nuclei(self) -> PackedNuclei:
        """Return the nuclei of all views, in the order of the views."""
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
    globals_, locals_ = draw_boxes(rng, roi.width, roi.height, roi.mpp, roi.xy, config)
    roles = ["first", "second", *["local"] * len(locals_)]
    return Plan(
        roi=roi,
        epoch=epoch,
        boxes=(*globals_, *locals_),
        colours=tuple(draw_colour(rng, role, config) for role in roles),
        num_globals=len(globals_),
    )


def pack(plans: Sequence[Plan]) -> PlannedViews:
    """Convert plans to a view-major batch of tensors, which loader processes pass on if the device renders.

    It contains only the rows of every ROI that its views cover.

    Raises:
        UserError: a JPEG is inconsistent with the set; names the set and the ROI.
    """
    views = range(len(plans[0].boxes))
    boxes = [(b, plan.boxes[view], plan) for view in views for b, plan in enumerate(plans)]
    cuts = [plan.cut() for plan in plans]
    jpegs = [np.frombuffer(data, np.uint8) for data, _ in cuts]
    nuclei = view_major([plan.nuclei() for plan in plans])
    num_globals = plans[0].num_globals
    return PlannedViews(
        jpegs=torch.from_numpy(np.concatenate(jpegs)),
        jpeg_bounds=torch.from_numpy(np.cumsum([0, *map(len, jpegs)])),
        shapes=torch.tensor([simplejpeg.decode_jpeg_header(data)[:2] for data, _ in cuts]),
        boxes=torch.tensor(
            [(b, box.x, box.y - cuts[b][1], box.side, box.flip, box.turns) for b, box, _ in boxes], dtype=torch.int32
        ),
        colours=torch.tensor([plan.colours[view].row() for view in views for plan in plans], dtype=torch.float32),
        num_globals=num_globals,
        nuclei=nuclei,
        num_global_nuclei=int(nuclei.offsets[num_globals * len(plans)]),
        mpp=torch.tensor([box.mpp(plan.roi.mpp) for _, box, plan in boxes]),
        roi_ids=torch.tensor([plan.roi.id for plan in plans]),
        epochs=torch.tensor([plan.epoch for plan in plans]),
        path=str(plans[0].roi.path),
    )


def view_major(rois: Sequence[PackedNuclei]) -> PackedNuclei:
    """Join the nuclei of single ROIs: view after view, and ROI after ROI within a view."""
    parts = [nuclei.images(view, view + 1) for view in range(rois[0].num_images) for nuclei in rois]
    return PackedNuclei(
        xy=torch.cat([part.xy for part in parts]),
        index=torch.cat([part.index for part in parts]),
        offsets=torch.tensor([0, *np.cumsum([len(part.index) for part in parts])], dtype=torch.int32),
    )
