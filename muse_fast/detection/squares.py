"""Squares cut from an image; outside the image they show mirrored tissue or glass."""

from __future__ import annotations

import torch
from torch import Tensor

SURROUNDINGS = ("reflect", "mask")
GLASS = 255


def cut_square(image: Tensor, left: int, top: int, size: int, surroundings: str) -> Tensor:
    """``[..., H, W]`` uint8 -> the square ``[..., size, size]`` whose top-left corner is pixel (left, top).

    Outside, it shows the image mirrored at its border, repeatedly if needed (``reflect``), or white (``mask``).
    """
    height, width = image.shape[-2:]
    if 0 <= left <= width - size and 0 <= top <= height - size:
        return image[..., top : top + size, left : left + size].clone(memory_format=torch.contiguous_format)
    y = torch.arange(top, top + size, device=image.device)
    x = torch.arange(left, left + size, device=image.device)
    square = image.index_select(-2, _mirrored(y, height)).index_select(-1, _mirrored(x, width))
    if surroundings == "mask":
        square = square.masked_fill(~inside(left, top, size, width, height).to(image.device), GLASS)
    return square


def inside(left: int, top: int, size: int, width: int, height: int) -> Tensor:
    """``[size, size]`` bool: which pixels of the square lie in an image of ``width`` x ``height``."""
    y, x = torch.arange(top, top + size), torch.arange(left, left + size)
    return ((y >= 0) & (y < height))[:, None] & (x >= 0) & (x < width)


def _mirrored(position: Tensor, length: int) -> Tensor:
    folded = position % (2 * length)
    return torch.minimum(folded, 2 * length - 1 - folded)
