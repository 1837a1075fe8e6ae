"""Cross-entropy between given probabilities and a softmax, without a stored softmax.

With m the largest entry of a row x and s its log-sum-exp after subtracting m, both at temperature tau,

    log q_k     = (x_k - m) / tau - s
    loss        = -sum_k t_k log q_k  =  s sum_k t_k - sum_k t_k (x_k - m) / tau
    d loss / dx = (q sum_k t_k - t) / tau

The forward reads logits and targets once: whenever a lane meets a larger entry, its sums are rescaled to the new one.
The backward writes the gradient once. Memory holds three numbers per row in addition to the inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..namespace import NAMESPACE
from ..registration import empty_loss_and_stats, register_soft_cross_entropy
from .dino_loss import LOWEST, block_size, rows_of


@triton.jit
def soft_loss_kernel(
    student,  # [N, K]
    target,  # [N, K]
    stats,  # [N, 3] float32: largest entry, log-sum-exp after subtracting the largest, sum of the targets
    loss,  # [N] float32
    student_stride,
    target_stride,
    inverse_temp,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row. Every lane keeps its own maximum and sums; they are merged at the end."""
    row = tl.program_id(0).to(tl.int64)
    peak = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)  # of exp((x - peak) / tau)
    mass = tl.zeros([BLOCK], tl.float32)  # of t
    score = tl.zeros([BLOCK], tl.float32)  # of t (x - peak) / tau
    for start in range(0, NUM_COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < NUM_COLUMNS
        x = tl.load(student + row * student_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x, LOWEST)  # not as `other` of the load: in float16 it would become -inf
        t = tl.load(target + row * target_stride + column, mask=inside, other=0.0).to(tl.float32)
        new_peak = tl.maximum(peak, x)
        moved = (peak - new_peak) * inverse_temp
        below = (x - new_peak) * inverse_temp
        total = total * tl.exp(moved) + tl.exp(below)
        score += mass * moved + t * below
        mass += t
        peak = new_peak
    row_peak = tl.max(peak, 0)
    moved = (peak - row_peak) * inverse_temp
    log_total = tl.log(tl.sum(total * tl.exp(moved), 0))
    row_mass = tl.sum(mass, 0)
    tl.store(stats + row * 3, row_peak)
    tl.store(stats + row * 3 + 1, log_total)
    tl.store(stats + row * 3 + 2, row_mass)
    tl.store(loss + row, log_total * row_mass - tl.sum(score + mass * moved, 0))


@triton.jit
def soft_gradient_kernel(
    student,  # [N, K]
    target,  # [N, K]
    stats,  # [N, 3] float32
    loss_gradient,  # [N] float32
    gradient,  # [N, K], contiguous
    student_stride,
    target_stride,
    inverse_temp,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < NUM_COLUMNS
    x = tl.load(student + row * student_stride + column, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(target + row * target_stride + column, mask=inside, other=0.0).to(tl.float32)
    peak, log_total = tl.load(stats + row * 3), tl.load(stats + row * 3 + 1)
    mass = tl.load(stats + row * 3 + 2)
    prediction = tl.exp((x - peak) * inverse_temp - log_total)
    out = (prediction * mass - t) * (tl.load(loss_gradient + row) * inverse_temp)
    tl.store(gradient + row * NUM_COLUMNS + column, out.to(gradient.dtype.element_ty), mask=inside)


def soft_cross_entropy(student_logits: Tensor, target: Tensor, temp: float) -> Tensor:
    """Compute ``-sum_k target_k log_softmax(student_logits / temp)_k`` of every row, with a gradient for the logits.

    Args:
        student_logits: ``[..., K]`` float32, float16 or bfloat16.
        target: ``[..., K]`` float32, float16 or bfloat16; rows need not sum to 1.
        temp: above 0.

    Returns:
        ``[...]`` float32.
    """
    num_columns = student_logits.shape[-1]
    student, targets = (rows_of(tensor.reshape(-1, num_columns)) for tensor in (student_logits, target))
    return soft_cross_entropy_fwd(student, targets, temp)[0].view(student_logits.shape[:-1])


@torch.library.custom_op(f"{NAMESPACE}::soft_cross_entropy_fwd", mutates_args=())
def soft_cross_entropy_fwd(student_logits: Tensor, target: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """Return the loss ``[N]``, and the largest entry, log-sum-exp and sum of targets of every row: ``[N, 3]``."""
    student, target = rows_of(student_logits), rows_of(target)
    num_rows, num_columns = student.shape
    loss, stats = empty_loss_and_stats(student, target, temp)
    if num_rows == 0:
        return loss, stats
    with torch.cuda.device_of(student):
        soft_loss_kernel[(num_rows,)](
            student,
            target,
            stats,
            loss,
            student.stride(0),
            target.stride(0),
            1 / temp,
            NUM_COLUMNS=num_columns,
            BLOCK=block_size(num_columns),
        )
    return loss, stats


@torch.library.custom_op(f"{NAMESPACE}::soft_cross_entropy_bwd", mutates_args=())
def soft_cross_entropy_bwd(
    loss_gradient: Tensor, student_logits: Tensor, target: Tensor, stats: Tensor, temp: float
) -> Tensor:
    """Return the gradient of the logits ``[N, K]``, contiguous, in their dtype."""
    student, target = rows_of(student_logits), rows_of(target)
    num_rows, num_columns = student.shape
    gradient = torch.empty((num_rows, num_columns), dtype=student.dtype, device=student.device)
    if num_rows == 0:
        return gradient
    block = block_size(num_columns)
    with torch.cuda.device_of(student):
        soft_gradient_kernel[(num_rows, triton.cdiv(num_columns, block))](
            student,
            target,
            stats,
            loss_gradient.contiguous(),
            gradient,
            student.stride(0),
            target.stride(0),
            1 / temp,
            NUM_COLUMNS=num_columns,
            BLOCK=block,
        )
    return gradient


register_soft_cross_entropy(soft_cross_entropy_fwd, soft_cross_entropy_bwd)
