"""Resizing and concatenation of maps in PyTorch, whose backward takes one axis of a map after the other.

Bilinear weights of a pixel are products of those of its row and its column, so the gradient of a map is

    dx = R^T dy C,    R [H, h] and C [H, w], see `weights`

for every channel. On a CPU these products of matrices take a seventh to a quarter of the time of torch's backward,
which adds pixel by pixel; on a GPU they are deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def resize_concat(maps: Sequence[Tensor], side: int) -> Tensor:
    """See `muse_fast.ops.resize_concat`."""
    with torch.autocast(maps[0].device.type, enabled=False):  # autocast would return float32
        resized = [x if x.shape[2:] == (side, side) else _Resized.apply(x, side) for x in maps]
        return torch.cat(resized, dim=1) if len(resized) > 1 else resized[0]


class _Resized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, side: int) -> Tensor:
        ctx.size = x.shape[2:]
        return F.interpolate(x, (side, side), mode="bilinear", align_corners=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(grad.device.type, enabled=False):
            return _backward(grad, *ctx.size).to(grad.dtype), None


def _backward(grad: Tensor, height: int, width: int) -> Tensor:
    """``dy [I, c, H, H]`` -> ``dx [I, c, h, w]``, in float32 (float64 for float64)."""
    precise = grad.to(torch.promote_types(grad.dtype, torch.float32))
    rows, columns = (weights(coarse, grad.shape[-1], like=precise) for coarse in (height, width))
    last = precise.permute(0, 2, 3, 1)  # [I, H, H, c]
    if last.stride(-1) != 1:  # not channels-last
        return rows.T @ (precise @ columns)
    narrow = (columns.T @ last).flatten(2)  # [I, H, w * c]
    return (rows.T @ narrow).unflatten(2, (width, grad.shape[1])).permute(0, 3, 1, 2)


def weights(coarse: int, fine: int, *, like: Tensor) -> Tensor:
    """``[fine, coarse]``: weight ``hat(q (coarse - 1) / (fine - 1) - i)`` of pixel i in pixel q, corners aligned."""
    position = torch.arange(fine, dtype=torch.float64, device=like.device) * ((coarse - 1) / max(fine - 1, 1))
    away = position[:, None] - torch.arange(coarse, device=like.device)
    return (1 - away.abs()).clamp(min=0).to(like.dtype)
