"""Find the ROI of a batch that cannot be decoded; a decoder of whole batches does not say which."""

from __future__ import annotations

import simplejpeg
import torch
from torch import Tensor

from muse_fast.batch import PlannedViews
from muse_fast.errors import UserError
from muse_fast.images.jpeg import REMEDY


def damaged_jpeg(planned: PlannedViews, error: object) -> UserError:
    """Return an error that names the damaged ROI of a batch for which a decoder failed with ``error``.

    Decodes every ROI strictly on the CPU to find it.
    """
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
    """Decode bytes to ``[H, W, 3]`` uint8 RGB; raises ValueError even if libjpeg only warns."""
    return torch.from_numpy(simplejpeg.decode_jpeg(jpeg.numpy(), colorspace="RGB", strict=True))
