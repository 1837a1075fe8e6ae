"""Bilinear resizing and concatenation of maps in one pass, as in every stage of a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muse_fast.kernels.blocked.resize_concat import resize_concat as blocked
from muse_fast.ops import backends, reference


def resize_concat(maps: Sequence[Tensor], side: int, *, backend: str | None = None) -> Tensor:
    r"""Resize every map to ``side`` x ``side`` pixels, corners aligned, and concatenate them along channels.

    .. math:: y_{qp} = \sum_{ij} \mathrm{hat}(q \tfrac{h-1}{H-1} - i) \, \mathrm{hat}(p \tfrac{w-1}{H-1} - j) \, x_{ij},
              \qquad \mathrm{hat}(t) = \max(0, 1 - |t|)

    ``torch.cat([F.interpolate(x, (H, H), mode="bilinear", align_corners=True) for x in maps], dim=1)``, also under
    autocast in the dtype of the maps. ``triton`` stores no resized map, and its backward is deterministic: it gathers
    in float32, where torch's adds by atomics, and 16-bit values in their own type. ``blocked`` resizes as torch does;
    its backward multiplies by the weights of columns, then of rows, in float32 (float64 for float64).

    Args:
        maps: ``[I, c_l, h_l, w_l]`` floating point with at least one pixel, one or more.
        side: H, at least 1.
        backend: ``reference``, ``blocked`` or ``triton`` to force one.

    Returns:
        ``[I, sum(c_l), H, H]``, in the dtype that torch promotes those of the maps to. One map of this size already is
        returned as it is.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    _check(maps, side)
    dtype = maps[0].dtype
    for x in maps[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    chosen = backends.choose("resize_concat", maps[0].device.type, backend, dtype)
    if len(maps) == 1 and maps[0].shape[2:] == (side, side):
        return maps[0]
    if chosen == "triton":
        from muse_fast.kernels.fused.resize_concat import resize_concat as fused  # needs triton

        return fused(maps, side)
    if chosen == "blocked":
        return blocked(maps, side)
    return reference.resize_concat(maps, side)


def _check(maps: Sequence[Tensor], side: int) -> None:
    shapes = [tuple(x.shape) for x in maps]
    if not maps or any(x.dim() != 4 or x.shape[0] != maps[0].shape[0] or 0 in x.shape[2:] for x in maps):
        raise ValueError(f"resize_concat: expected maps [I, c, h, w] with at least one pixel, got {shapes}")
    if side < 1:
        raise ValueError(f"resize_concat: side must be at least 1, got {side}")
    for x in maps:
        if not x.dtype.is_floating_point:
            raise ValueError(f"resize_concat: maps must be floating point, got {x.dtype}")
        if x.device != maps[0].device:
            raise ValueError(f"resize_concat: maps are on {maps[0].device} and {x.device}")
