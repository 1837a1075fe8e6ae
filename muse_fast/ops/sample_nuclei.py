"""Sample one feature row per nucleus from the decoder's levels (the sampling step of NuLo)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muse_fast.kernels.registration import register_sample_nuclei
from muse_fast.ops import backends, reference


def sample_nuclei(
    levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int, *, backend: str | None = None
) -> Tensor:
    """Sample the unified map at the nuclei: ``bilinear(cat(upsample(levels)), xy)``.

    The unified map has the size ``[H, W]`` of level 0; the other levels are resized to it bilinearly with corners
    aligned. A point (x, y) is at column ``x / view_size * (W - 1)`` and row ``y / view_size * (H - 1)``; points outside
    are moved onto the border.

    ``reference`` stores the map. ``cpp`` and ``triton`` read only the pixels of a level that a point depends on (at
    most 9, or 16 if the level is larger than level 0), and their backward writes every level once; their results are
    bit-identical in every run, for any number of threads. All sum in float32 (float64 for float64 levels) and keep the
    dtype of the levels, also under autocast.

    Args:
        levels: tensors ``[I, c_l, h_l, w_l]`` of one floating-point dtype and device, finest first, with any strides.
        xy: ``[N, 2]`` floating point, finite, pixels of the view.
        image_index: ``[N]`` int64, the image of each point, in 0..I - 1 (not checked on CUDA), in any order. A negative
            value marks padding: its row is zero and has no gradient.
        view_size: R, the side of the view in pixels.
        backend: ``reference``, ``cpp`` or ``triton`` to force one; ``triton`` rejects float64.

    Returns:
        ``[N, sum(c_l)]`` in the dtype of the levels. The gradient flows to the levels, not to ``xy``; it is
        channels-last if all levels are, else contiguous.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run. On the CPU, images out of range
            raise IndexError (``reference``) or RuntimeError (``cpp``).
    """
    _check(levels, xy, image_index, view_size)
    arguments = (levels, xy.detach(), image_index, view_size)
    chosen = backends.choose("sample_nuclei", xy.device.type, backend, levels[0].dtype)
    if chosen == "cpp":
        return torch.ops.muse_fast.sample_nuclei_fwd(*arguments)
    if chosen == "triton":
        from muse_fast.kernels.fused.sample_nuclei import sample_nuclei as fused  # needs triton

        return fused(*arguments)
    with torch.autocast(xy.device.type, enabled=False):
        return reference.sample_nuclei(*arguments)


def _check(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> None:
    if not levels or any(level.dim() != 4 or 0 in level.shape[2:] for level in levels):
        raise ValueError(
            "sample_nuclei: levels must be tensors [I, c, h, w] with h and w above 0, got "
            f"{[tuple(level.shape) for level in levels]}"
        )
    first = levels[0]
    if not first.is_floating_point():
        raise ValueError(f"sample_nuclei: levels must be floating point, got {first.dtype}")
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


if backends.library_error() is None:
    register_sample_nuclei(torch.ops.muse_fast.sample_nuclei_fwd.default, torch.ops.muse_fast.sample_nuclei_bwd.default)
