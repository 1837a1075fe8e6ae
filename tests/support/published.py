"""Formulas of published code, written from their equations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dino_pos_embed(table: Tensor, grid: int) -> Tensor:
    """DINO's `interpolate_pos_encoding` (Caron et al., 2021), unless ``grid`` is the stored one.

    Bicubic with the scale ``(grid + 0.1) / stored``: ``[1, 1 + stored * stored, C] -> [1, 1 + grid * grid, C]``. DINOv2
    with its default ``interpolate_offset=0.1`` and the ViT of MUSE do the same.
    """
    stored = math.isqrt(table.shape[1] - 1)
    maps = table[:, 1:].reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / stored
    maps = F.interpolate(maps, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], maps.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def keys_cubic(distance: float, a: float = -0.75) -> float:
    """The weight of a sample in bicubic interpolation (Keys, 1981), with the a of torch and OpenCV."""
    t = abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def keys_weights(old: int, new: int, scale: float) -> list[list[float]]:
    """Weights ``[new, old]`` of samples at ``(i + 1/2) / scale - 1/2``; beyond the border the last sample repeats."""
    rows = []
    for i in range(new):
        at = (i + 0.5) / scale - 0.5
        row = [0.0] * old
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            row[min(max(j, 0), old - 1)] += keys_cubic(at - j)
        rows.append(row)
    return rows
