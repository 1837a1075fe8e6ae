"""The baselines of the fast backends.

``LITERAL`` does what public code does: a set intersection in Python, a loop over images that samples the full unified
map, a stored log-softmax. ``EAGER`` has the batched PyTorch forms that a careful user would write instead, by name;
ratios to eager refer to the fastest of them. Ratios to only the literal version would flatter us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast.images.imagenet import normalise
from muse_fast.ops import reference
from muse_fast.views.boxes import ViewBox
from muse_fast.views.colours import UNSTAINED, Colour, apply_colour


def literal_match(index: Tensor, offsets: Tensor, num_rois: int, num_globals: int) -> tuple[Tensor, Tensor]:
    """Build a dictionary per image, and intersect their keys."""
    bounds, ids = offsets.tolist(), index.tolist()
    rows = [{ids[row]: row for row in range(start, stop)} for start, stop in pairwise(bounds)]
    teacher, student = [], []
    for g in range(num_globals):
        for v in range(len(rows) // num_rois):
            for b in range(num_rois if v != g else 0):
                of_teacher, of_student = rows[g * num_rois + b], rows[v * num_rois + b]
                for nucleus in sorted(of_teacher.keys() & of_student.keys()):
                    teacher.append(of_teacher[nucleus])
                    student.append(of_student[nucleus])
    return torch.tensor(teacher, device=index.device), torch.tensor(student, device=index.device)


def literal_sample(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    """Call grid_sample per image. The backward of each slice fills a gradient of the whole batch."""
    unified = unified_map(levels)
    counts = torch.bincount(image_index, minlength=len(unified)).tolist()
    rows = []
    for image, points in enumerate(xy.split(counts)):
        features = to_single(unified[image : image + 1])  # as autocast does for grid_sample
        grid = (2 * points / view_size - 1).view(1, -1, 1, 2).to(features.dtype)
        rows.append(F.grid_sample(features, grid, align_corners=True)[0, :, :, 0].T)
    return torch.cat(rows).to(unified.dtype)


def batched_grid_sample(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    """Call grid_sample once for all images, with their points padded to the largest count."""
    unified = to_single(unified_map(levels))
    place = (image_index, place_in_image(image_index, len(unified)))
    grid = padded(2 * xy / view_size - 1, place, len(unified)).unsqueeze(1).to(unified.dtype)
    rows = F.grid_sample(unified, grid, align_corners=True).squeeze(2)  # [I, D, most]
    return rows.transpose(1, 2)[place].to(levels[0].dtype)


def sample_by_matmul(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    """Upsample and sample with one matrix ``[points, pixels]`` of weights per image and level, as both are linear."""
    images, _, side, _ = levels[0].shape
    place = (image_index, place_in_image(image_index, images))
    points = padded(xy / view_size * (side - 1), place, images)
    fine = torch.arange(side, device=xy.device, dtype=xy.dtype)
    column, row = (hat(points[..., axis : axis + 1] - fine) for axis in (0, 1))  # [I, most, side]
    parts = []
    for level in levels:
        coarse = torch.arange(level.shape[-1], device=xy.device, dtype=xy.dtype)
        resize = hat(fine.unsqueeze(1) * ((len(coarse) - 1) / (side - 1)) - coarse)  # [side, side of the level]
        weights = ((row @ resize).unsqueeze(-1) * (column @ resize).unsqueeze(-2)).flatten(2).to(level.dtype)
        parts.append(weights @ level.flatten(2).transpose(1, 2))
    return torch.cat(parts, dim=-1)[place]


def unified_map(levels: Sequence[Tensor]) -> Tensor:
    size = levels[0].shape[-2:]
    return torch.cat([F.interpolate(level, size, mode="bilinear", align_corners=True) for level in levels], dim=1)


def place_in_image(image_index: Tensor, images: int) -> Tensor:
    """Return the number of each point among those of its image; points are sorted by image."""
    counts = torch.bincount(image_index, minlength=images)
    return torch.arange(len(image_index), device=image_index.device) - (counts.cumsum(0) - counts)[image_index]


def padded(points: Tensor, place: tuple[Tensor, Tensor], images: int) -> Tensor:
    """Unpack points ``[N, 2]`` to ``[images, most, 2]``, padded with zeros."""
    out = torch.zeros(images, int(place[1].max()) + 1, 2, dtype=points.dtype, device=points.device)
    out[place] = points
    return out


def hat(distance: Tensor) -> Tensor:
    """Return the weight of a pixel at this distance under linear interpolation."""
    return (1 - distance.abs()).clamp(min=0)


def to_single(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def literal_loss(
    student: Tensor, teacher: Tensor, center: Tensor, teacher_rows: Tensor, student_rows: Tensor, ts: float, tt: float
) -> Tensor:
    """Gather a row of logits per pair, then take their softmax."""
    log_prediction = F.log_softmax(to_single(student[student_rows]) / ts, dim=-1)
    target = F.softmax((to_single(teacher[teacher_rows]) - center) / tt, dim=-1)
    return torch.sum(-target * log_prediction, dim=-1)


def all_pairs_loss(
    student: Tensor, teacher: Tensor, center: Tensor, teacher_rows: Tensor, student_rows: Tensor, ts: float, tt: float
) -> Tensor:
    """Multiply every student row with every teacher row in one matrix product, and select the pairs."""
    log_prediction = F.log_softmax(to_single(student) / ts, dim=-1)
    target = F.softmax((to_single(teacher) - center) / tt, dim=-1)
    return -(log_prediction @ target.T)[student_rows, teacher_rows]


def of_logits(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn a loss of logits into the same loss of features and prototypes."""

    def linear_loss(student_z: Tensor, student_W: Tensor, teacher_z: Tensor, teacher_W: Tensor, *rest: Any) -> Tensor:
        return loss(student_z @ student_W.T, teacher_z @ teacher_W.T, *rest)

    return linear_loss


def literal_stats(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Store the projected map, then take its mean and the variance around it."""
    y = to_single(F.conv2d(x, weight[:, :, None, None]))
    mean = y.mean((0, 2, 3))
    return mean, (y - mean[:, None, None]).square().mean((0, 2, 3))


def literal_add_norm(
    x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Drop paths, add, normalise: an operation each."""
    x = x + branch * scale
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


def literal_gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """Give the bias its gradient by another pass, as a linear layer does."""
    return F.gelu(hidden + bias.to(hidden.dtype) - bias.detach().to(hidden.dtype))


def literal_join(parts: Sequence[Tensor], with_sums: bool) -> tuple[Tensor, Tensor]:
    """Stack, concatenate, sum: an operation each, as autograd does."""
    stacks = [torch.stack(list(parts[first : first + 3]), 2) for first in range(0, len(parts), 3)]
    joined = torch.cat([stack.flatten(0, 1).flatten(1) for stack in stacks])
    return joined, joined.sum(0)


def literal_batch_norm(x: Tensor, residual: Tensor, *arguments: Any) -> Tensor:
    """Normalise, add, cut: an operation each."""
    weight, bias, mean, var, num_batches, momentum, eps, _ = arguments
    num_batches += 1
    return F.relu(F.batch_norm(x, mean, var, weight, bias, True, momentum, eps) + residual)


def literal_resize(maps: Sequence[Tensor], side: int) -> Tensor:
    """Resize every map, whether or not it must be, then concatenate."""
    return torch.cat([F.interpolate(x, (side, side), mode="bilinear", align_corners=True) for x in maps], dim=1)


def literal_views(pixels: Tensor, images: Tensor, boxes: Tensor, colours: Tensor, size: int) -> Tensor:
    """Make one view after the other, each step with torchvision on uint8, as data loaders do."""
    views = []
    for box, colour in zip(boxes.tolist(), colours.tolist(), strict=True):
        number, x, y, side, flip, turns = box
        start, height, width = images[number].tolist()
        roi = pixels[start : start + 3 * height * width].view(3, height, width)
        view = ViewBox(x, y, side, size, bool(flip), turns).render(roi)
        views.append(normalise(apply_colour(view, colour_of(colour))))
    return torch.stack(views)


def colour_of(row: Sequence[float]) -> Colour:
    brightness, contrast, saturation, hue, *order, grey, sigma, solarise = row[:11]
    steps, stain = tuple(int(step) for step in order), tuple(row[11:])
    flags = bool(grey), sigma or None, bool(solarise)
    return Colour(brightness, contrast, saturation, hue or None, steps, *flags, None if stain == UNSTAINED else stain)


LITERAL: dict[str, Callable[..., Any]] = {
    "match_nuclei": literal_match,
    "sample_nuclei": literal_sample,
    "projection_stats": literal_stats,
    "augment_views": literal_views,
    "add_layer_norm": literal_add_norm,
    "gelu": literal_gelu,
    "join_heads": literal_join,
    "batch_norm": literal_batch_norm,
    "resize_concat": literal_resize,
    "dino_loss": literal_loss,
    "linear_dino_loss": of_logits(literal_loss),
}
EAGER: dict[str, dict[str, Callable[..., Any]]] = {
    "match_nuclei": {"": reference.match_nuclei},
    "sample_nuclei": {"grid_sample": batched_grid_sample, "matmul": sample_by_matmul},
    "projection_stats": {"": reference.projection_stats},
    "augment_views": {"": reference.augment_views},
    "add_layer_norm": {"": reference.add_layer_norm},
    "gelu": {"": reference.gelu},
    "join_heads": {"": reference.join_heads},
    "batch_norm": {"": reference.batch_norm},
    "resize_concat": {"": reference.resize_concat},
    "dino_loss": {"gather": reference.dino_loss, "all pairs": all_pairs_loss},
    "linear_dino_loss": {"gather": reference.linear_dino_loss, "all pairs": of_logits(all_pairs_loss)},
}
