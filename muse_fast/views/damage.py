"""Which ROI of a batch cannot be decoded: a decoder that takes whole batches does not say."""

from __future__ import annotations

import simplejpeg
import torch
from torch import Tensor

from muse_fast.batch import PlannedViews
from muse_fast.errors import UserError
from muse_fast.images.jpeg import REMEDY


def damaged_jpeg(planned: PlannedViews, error: object) -> UserError:
    """The ROI for which a decoder failed with ``error``, found by decoding each strictly on the CPU."""
    for b in range(planned.num_rois):
        height, width = planned.shapes[b].tolist()
        try:
            found = decode_strictly(planned.jpeg(b)).shape[:2]
            if found == (height, width):
                continue
            reason = f"it has {found[1]} x {found[0]} px, expected {width} x {height}"
        except ValueError as cause:
            reason = str(cause)
        return UserError(
            f"{planned.path}, ROI {int(planned.roi_ids[b])}: the JPEG cannot be decoded ({reason}); {REMEDY}"
        )
    return UserError(
        f"{planned.path}: ROIs {planned.roi_ids.tolist()} cannot be rendered ({error}), though the CPU decodes them; "
        "set data.backend=cpu"
    )


def decode_strictly(jpeg: Tensor) -> Tensor:
    """``[H, W, 3]`` uint8 RGB from bytes; ValueError where libjpeg so much as warns."""
    return torch.from_numpy(simplejpeg.decode_jpeg(jpeg.numpy(), colorspace="RGB", strict=True))
