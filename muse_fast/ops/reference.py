"""Every op in plain PyTorch: the definition that the fast backends are tested against.

Nothing here is shared with a fast backend, so that one mistake cannot hide in both. Statistics, softmax and losses are
computed in float32 at least; float64 inputs stay float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def match_nuclei(index: Tensor, offsets: Tensor, num_rois: int, num_globals: int) -> tuple[Tensor, Tensor]:
    """Pairs by binary search of each teacher view's (ROI, nucleus) keys in each student view's."""
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
    return torch.cat(teacher), torch.cat(student)


def sample_nuclei(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    """Upsample, concatenate, then weigh the four pixels around each point."""
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
    return (upper * (1 - bottom_share) + lower * bottom_share).to(pixels.dtype)


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Stored softmax and log-softmax, gathered into pairs."""
    precision = torch.promote_types(student_logits.dtype, torch.float32)
    centred = teacher_logits.detach().to(precision) - center.detach().to(precision)
    target = F.softmax(_sharpen(centred, teacher_temp), dim=-1)
    log_prediction = F.log_softmax(_sharpen(student_logits.to(precision), student_temp), dim=-1)
    return -(target[teacher_rows] * log_prediction[student_rows]).sum(dim=-1)


def _sharpen(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, after taking out the largest: a shift common to a row must cost no digits."""
    return (logits - logits.detach().amax(dim=-1, keepdim=True)) / temperature


def linear_dino_loss(
    student_z: Tensor,
    student_W: Tensor,
    teacher_z: Tensor,
    teacher_W: Tensor,
    center: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Stored logits (in the dtype of the inputs, or of autocast), then :func:`dino_loss`."""
    with torch.no_grad():
        teacher_logits = F.linear(teacher_z, teacher_W)
    student_logits = F.linear(student_z, student_W)
    return dino_loss(student_logits, teacher_logits, center, teacher_rows, student_rows, student_temp, teacher_temp)
