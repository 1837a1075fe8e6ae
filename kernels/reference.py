"""The losses in plain PyTorch: the definition that the kernels are tested against, and the fallback without Triton.

Nothing here is shared with a kernel, so that one mistake cannot hide in both. Softmax and losses are computed in at
least float32; float64 inputs stay float64. A pair with a negative row is padding: its loss is 0 and it has no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Store softmax and log-softmax, and gather both into pairs."""
    precision = torch.promote_types(student_logits.dtype, torch.float32)
    centred = teacher_logits.detach().to(precision) - center.detach().to(precision)
    target = F.softmax(sharpen(centred, teacher_temp), dim=-1)
    log_prediction = F.log_softmax(sharpen(student_logits.to(precision), student_temp), dim=-1)
    if not len(target) or not len(log_prediction):  # then all pairs are padding
        return log_prediction[:0].sum() + log_prediction.new_zeros(len(student_rows))
    padding = (teacher_rows < 0) | (student_rows < 0)
    loss = -(target[teacher_rows.clamp(min=0)] * log_prediction[student_rows.clamp(min=0)]).sum(dim=-1)
    return loss.masked_fill(padding, 0)


def sharpen(logits: Tensor, temperature: float) -> Tensor:
    """Subtract the largest logit, then divide by the temperature: a shift common to a row must not cost digits."""
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
    """Store the logits (in the dtype of the inputs, or of autocast), then call :func:`dino_loss`."""
    with torch.no_grad():
        teacher_logits = F.linear(teacher_z, teacher_W)
    student_logits = F.linear(student_z, student_W)
    return dino_loss(student_logits, teacher_logits, center, teacher_rows, student_rows, student_temp, teacher_temp)


def soft_cross_entropy(student_logits: Tensor, target: Tensor, temp: float) -> Tensor:
    """Store the log-softmax."""
    precision = torch.promote_types(student_logits.dtype, torch.float32)
    log_prediction = F.log_softmax(sharpen(student_logits.to(precision), temp), dim=-1)
    return -(target.detach().to(precision) * log_prediction).sum(dim=-1)
