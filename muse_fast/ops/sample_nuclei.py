"""Read one feature row per nucleus out of the decoder's levels (the sampling step of NuLo)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muse_fast.ops import backends, reference


def sample_nuclei(
    levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int, *, backend: str | None = None
) -> Tensor:
    """Rows of the unified map at the nuclei: ``bilinear(cat(upsample(levels)), xy)``.

    Level 0 gives the size ``[H, W]`` of the unified map; the others are resized to it bilinearly with corners aligned.
    A point (x, y) stands at column ``x / view_size * (W - 1)`` and row ``y / view_size * (H - 1)``; points outside are
    moved onto the border.

    Args:
        levels: tensors ``[I, c_l, h_l, w_l]`` of one dtype and device, finest first.
        xy: ``[N, 2]`` float32, pixels of the view.
        image_index: ``[N]`` int64, the image of each point, in 0..I - 1.
        view_size: R, pixels along a side of the view.
        backend: ``reference`` to force it.

    Returns:
        ``[N, sum(c_l)]`` in the dtype of the levels; the gradient flows to the levels, not to ``xy``.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    _check(levels, xy, image_index, view_size)
    backends.choose("sample_nuclei", xy.device.type, backend)
    return reference.sample_nuclei(levels, xy.detach(), image_index, view_size)


def _check(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> None:
    if not levels or any(level.dim() != 4 for level in levels):
        raise ValueError(
            f"sample_nuclei: levels must be tensors [I, c, h, w], got {[tuple(level.shape) for level in levels]}"
        )
    first = levels[0]
    for number, level in enumerate(levels):
        if (level.shape[0], level.dtype, level.device) != (first.shape[0], first.dtype, first.device):
            raise ValueError(
                f"sample_nuclei: level {number} has {level.shape[0]} images, {level.dtype}, {level.device}; "
                f"level 0 has {first.shape[0]} images, {first.dtype}, {first.device}"
            )
    if xy.dim() != 2 or xy.shape[1] != 2 or not xy.dtype.is_floating_point:
        raise ValueError(f"sample_nuclei: xy must be floating point [N, 2], got {xy.dtype} {tuple(xy.shape)}")
    if image_index.shape != xy.shape[:1] or image_index.dtype != torch.int64:
        raise ValueError(
            f"sample_nuclei: image_index must be int64 [{xy.shape[0]}], "
            f"got {image_index.dtype} {tuple(image_index.shape)}"
        )
    if not xy.device == image_index.device == first.device:
        raise ValueError(
            f"sample_nuclei: levels are on {first.device}, xy on {xy.device}, image_index on {image_index.device}"
        )
    if view_size < 1:
        raise ValueError(f"sample_nuclei: view_size must be positive, got {view_size}")
