"""Every op in plain PyTorch: the definition that the fast backends are tested against.

Nothing here is shared with a fast backend, so that one mistake cannot hide in both. Statistics, softmax and losses are
computed in at least float32; float64 inputs stay float64. A negative row or image number marks padding: it yields zeros
and has no gradient. The two losses are in kernels/reference.py, so that folder can be copied on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast.kernels.reference import dino_loss, linear_dino_loss

__all__ = [
    "add_layer_norm",
    "augment_views",
    "batch_norm",
    "dino_loss",
    "gelu",
    "join_heads",
    "linear_dino_loss",
    "match_nuclei",
    "projection_stats",
    "resize_concat",
    "sample_nuclei",
]


class _BiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.sum(0).to(ctx.dtype)


def bias_gradient(rows: Tensor, bias: Tensor | None) -> Tensor:
    """``rows`` ``[M, C]``, to which ``bias`` ``[C]`` has been added without a gradient: here it gets that gradient."""
    return rows if bias is None or not torch.is_grad_enabled() else _BiasGradient.apply(rows, bias)


def gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(bias_gradient(hidden, bias))


def join_heads(parts: Sequence[Tensor], with_sums: bool) -> tuple[Tensor, Tensor | None]:
    """Copy each part to its place, then sum."""
    rows = [part.shape[0] * part.shape[1] for part in parts[::3]]
    joined = parts[0].new_empty(sum(rows), 3, *parts[0].shape[2:])
    targets = [target for of_resolution in joined.split(rows) for target in of_resolution.unbind(1)]
    for target, part in zip(targets, parts, strict=True):
        target.unflatten(0, part.shape[:2]).copy_(part)
    joined = joined.flatten(1)
    return joined, joined.sum(0) if with_sums else None


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale, add, normalise and cast, one after the other."""
    if branch is not None:
        branch = bias_gradient(branch, branch_bias)
        x = x + (branch if scale is None else branch * scale.detach())
    normed = F.layer_norm(x, weight.shape, weight, bias, eps)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        normed = normed.to(torch.get_autocast_dtype(x.device.type))
    return x, normed


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """Normalise, add and cut, one after the other."""
    if num_batches is not None:
        num_batches.add_(1)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    if residual is not None:
        y = y + residual
    return y.relu_() if relu else y


def match_nuclei(
    index: Tensor, offsets: Tensor, num_rois: int, num_globals: int, *, capacity: int | None = None
) -> tuple[Tensor, ...]:
    """Find pairs by binary search of each teacher view's (ROI, nucleus) keys in each student view's."""
    sizes = offsets.diff().long()
    if (sizes < 0).any() or offsets[0] != 0 or offsets[-1] != index.numel():
        raise ValueError(f"match_nuclei: offsets must rise from 0 to N = {index.numel()}, got {offsets.tolist()}")
    image = torch.repeat_interleave(sizes)
    key = (image % num_rois << 32) + index.long()  # sorted inside a view: ROI first, then nucleus
    if ((key.diff() <= 0) & (image.diff() == 0)).any():
        raise ValueError("match_nuclei: the rows of an image must be sorted by nucleus index, each index once")

    bounds = offsets[::num_rois].tolist()
    rows = [torch.arange(start, stop, device=index.device) for start, stop in pairwise(bounds)]
    teacher, student = [rows[0][:0]], [rows[0][:0]]
    for g in range(num_globals):
        for v in range(len(rows)):
            if v == g or rows[v].numel() == 0:
                continue
            wanted, present = key[rows[g]], key[rows[v]]
            place = torch.searchsorted(present, wanted).clamp(max=present.numel() - 1)
            found = present[place] == wanted
            teacher.append(rows[g][found])
            student.append(rows[v][place[found]])
    pairs = torch.cat(teacher), torch.cat(student)
    if capacity is None:
        return pairs
    count = torch.tensor(len(pairs[0]), device=index.device)
    return _cut_or_pad(pairs[0], capacity), _cut_or_pad(pairs[1], capacity), count


def _cut_or_pad(rows: Tensor, capacity: int) -> Tensor:
    return F.pad(rows, (0, capacity - len(rows)), value=-1)


def resize_concat(maps: Sequence[Tensor], side: int) -> Tensor:
    """Resize each map in its dtype, then concatenate."""
    size = (side, side)
    with torch.autocast(maps[0].device.type, enabled=False):  # autocast would return float32
        resized = [
            x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=True) for x in maps
        ]
        return torch.cat(resized, dim=1)


def sample_nuclei(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    """Upsample, concatenate, then weigh the four pixels around each point."""
    padding = image_index < 0
    image_index = image_index.clamp(min=0)
    height, width = levels[0].shape[-2:]
    upsampled = [F.interpolate(level, (height, width), mode="bilinear", align_corners=True) for level in levels[1:]]
    unified = torch.cat([levels[0], *upsampled], dim=1)  # [I, D, H, W]
    pixels = unified.permute(0, 2, 3, 1).flatten(0, 2)  # [I * H * W, D]

    precision = torch.promote_types(pixels.dtype, torch.float32)
    u = (xy[:, 0].to(precision) / view_size * (width - 1)).clamp(0, width - 1)
    v = (xy[:, 1].to(precision) / view_size * (height - 1)).clamp(0, height - 1)
    left, top = u.long(), v.long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    right_share, bottom_share = (u - left).unsqueeze(1), (v - top).unsqueeze(1)

    def tap(row: Tensor, column: Tensor) -> Tensor:
        return pixels.index_select(0, (image_index * height + row) * width + column).to(precision)

    upper = tap(top, left) * (1 - right_share) + tap(top, right) * right_share
    lower = tap(bottom, left) * (1 - right_share) + tap(bottom, right) * right_share
    rows = upper * (1 - bottom_share) + lower * bottom_share
    return rows.masked_fill(padding.unsqueeze(1), 0).to(pixels.dtype)


def projection_stats(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Store the projected map (in the dtype of the inputs), then take its moments."""
    y = torch.einsum("ichw,oc->iohw", x, weight)
    var, mean = torch.var_mean(y.to(torch.promote_types(y.dtype, torch.float32)), dim=(0, 2, 3), correction=0)
    return mean, var


def augment_views(
    pixels: Tensor,
    images: Tensor,
    boxes: Tensor,
    colours: Tensor,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Make one view after the other in float32; values between steps are whole levels in 0..255."""
    mean = torch.tensor([0.485, 0.456, 0.406], device=pixels.device).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], device=pixels.device).view(3, 1, 1)
    out = torch.empty(len(boxes), 3, size, size, dtype=dtype, device=pixels.device)
    for row, (box, colour) in enumerate(zip(boxes.tolist(), colours.tolist(), strict=True)):
        image, x, y, side, flip, turns = box
        start, height, width = images[image].tolist()
        roi = pixels[start : start + 3 * height * width].view(3, height, width)
        view = roi[:, y : y + side, x : x + side].float()
        view = F.interpolate(view[None], (size, size), mode="bicubic", antialias=True)[0].round().clamp(0, 255)
        view = torch.rot90(view.flip(-1) if flip else view, turns, (-2, -1))
        view = _coloured(view, colour)
        out[row] = (view / 255 - mean) / deviation
    return out


def _coloured(view: Tensor, colour: list[float]) -> Tensor:
    """Stains, jitter in the given order, then grey, blur, solarise; levels ``[3, R, R]`` in and out."""
    *strengths, first, second, third, fourth, grey, sigma, solarise = colour[:11]
    factors, shifts = colour[11:14], colour[14:]
    if factors != [1, 1, 1] or shifts != [0, 0, 0]:
        view = _restained(view, factors, shifts)
    for step in (int(first), int(second), int(third), int(fourth)):
        strength = strengths[step]
        if step == 3:
            view = _hue_shifted(view, strength) if strength else view
        else:
            centre = (torch.zeros(()), _grey(view).mean(), _grey(view))[step]
            view = (view * strength + centre * (1 - strength)).clamp(0, 255).floor()
    if grey:
        view = _grey(view).expand_as(view)
    if sigma > 0:
        view = _blurred(view, sigma)
    return torch.where(view >= 128, 255 - view, view) if solarise else view


def _restained(view: Tensor, factors: list[float], shifts: list[float]) -> Tensor:
    """Scale and shift the amounts of the stains: solve for those whose vectors add up to the pixel's density."""
    vectors = view.new_tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], dtype=torch.float64)
    density = -(view.double().clamp(min=0.25) / 255).log()
    amounts = torch.linalg.solve(vectors.T, density.flatten(1))
    amounts = amounts * amounts.new_tensor(factors)[:, None] + amounts.new_tensor(shifts)[:, None]
    levels = 255 * (-vectors.T @ amounts).exp()
    return levels.round().clamp(max=255).view_as(view).to(view.dtype)


def _grey(view: Tensor) -> Tensor:
    return (0.2989 * view[0] + 0.587 * view[1] + 0.114 * view[2]).floor()


def _hue_shifted(view: Tensor, shift: float) -> Tensor:
    """Convert to hue, saturation and value, shift the hue, and convert back, sextant by sextant."""
    red, green, blue = view / 255
    value, chroma = view.amax(0) / 255, (view.amax(0) - view.amin(0)) / 255
    safe = chroma.where(chroma > 0, 1)
    by_largest = [(green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4]
    hue = torch.stack(by_largest).gather(0, view.argmax(0, keepdim=True))[0]
    hue = (hue / 6 + shift).remainder(1) * 6
    sextant, rest = hue.long() % 6, hue.frac()
    low, falling, rising = value - chroma, value - chroma * rest, value - chroma * (1 - rest)
    red = torch.stack([value, falling, low, low, rising, value]).gather(0, sextant[None])
    green = torch.stack([rising, value, value, falling, low, low]).gather(0, sextant[None])
    blue = torch.stack([low, low, rising, value, value, falling]).gather(0, sextant[None])
    return (torch.cat([red, green, blue]) * 255.999).floor()


def _blurred(view: Tensor, sigma: float) -> Tensor:
    radius = min(max(1, round(3 * sigma)), view.shape[-1] // 2 - 1)
    away = torch.arange(-radius, radius + 1, device=view.device)
    weight = torch.softmax(-(away**2) / (2 * sigma**2), 0)
    padded = F.pad(view[:, None], [radius] * 4, mode="reflect")
    across = F.conv2d(padded, weight.view(1, 1, 1, -1))
    return F.conv2d(across, weight.view(1, 1, -1, 1))[:, 0].round()
