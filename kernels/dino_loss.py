"""DINO's cross-entropy over pairs of rows, from stored logits, without a stored softmax.

With m the largest entry of a row and s its log-sum-exp after subtracting m, both found in one pass over the row,

    p_jk = exp((t_jk - c_k - m_j) / tt - s_j)        the teacher, centred and sharpened
    q_ik = exp((x_ik - m_i) / ts - s_i)              the student

    loss_p         = -sum_k p_jk log q_ik            (j, i) = (teacher_rows[p], student_rows[p])
    d loss / d x_i = sum_{p of row i} g_p (q_i - p_j) / ts

so that memory holds two numbers per row besides the logits. Each program of the backward owns one block of one student
row and adds up the pairs of that row in their given order: no atomics, the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
LOWEST = tl.constexpr(-1.0e30)  # stands for -inf: two of those would subtract to NaN


@triton.jit
def row_stats_kernel(
    logits,  # [rows, K]
    center,  # [K]; read when CENTERED
    stats,  # [rows, 2] float32: largest entry, log-sum-exp after subtracting it
    row_stride,
    inverse_temp,
    CENTERED: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row. Every lane keeps a running maximum and sum of its own; they meet at the end."""
    row = tl.program_id(0).to(tl.int64)
    peak = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, NUM_COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < NUM_COLUMNS
        x = tl.load(logits + row * row_stride + column, mask=inside, other=LOWEST).to(tl.float32)
        if CENTERED:
            x -= tl.load(center + column, mask=inside, other=0.0).to(tl.float32)
        new_peak = tl.maximum(peak, x)
        total = total * tl.exp((peak - new_peak) * inverse_temp) + tl.exp((x - new_peak) * inverse_temp)
        peak = new_peak
    row_peak = tl.max(peak, 0)
    row_total = tl.sum(total * tl.exp((peak - row_peak) * inverse_temp), 0)
    tl.store(stats + row * 2, row_peak)
    tl.store(stats + row * 2 + 1, tl.log(row_total))


@triton.jit
def pair_loss_kernel(
    student,  # [Ns, K]
    teacher,  # [Nt, K]
    center,  # [K]
    student_stats,  # [Ns, 2]
    teacher_stats,  # [Nt, 2]
    teacher_rows,  # [P] int64
    student_rows,  # [P] int64
    loss,  # [P] float32
    student_stride,
    teacher_stride,
    inverse_student_temp,
    inverse_teacher_temp,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per pair."""
    pair = tl.program_id(0).to(tl.int64)
    i = tl.load(student_rows + pair)
    j = tl.load(teacher_rows + pair)
    student_peak, student_sum = tl.load(student_stats + i * 2), tl.load(student_stats + i * 2 + 1)
    teacher_peak, teacher_sum = tl.load(teacher_stats + j * 2), tl.load(teacher_stats + j * 2 + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, NUM_COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < NUM_COLUMNS
        x = tl.load(student + i * student_stride + column, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(teacher + j * teacher_stride + column, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(center + column, mask=inside, other=0.0).to(tl.float32)
        target = tl.exp((t - c - teacher_peak) * inverse_teacher_temp - teacher_sum)
        log_prediction = (x - student_peak) * inverse_student_temp - student_sum
        total += tl.where(inside, target * log_prediction, 0.0)
    tl.store(loss + pair, -tl.sum(total, 0))


@triton.jit
def student_gradient_kernel(
    student,  # [Ns, K]
    teacher,  # [Nt, K]
    center,  # [K]
    student_stats,  # [Ns, 2]
    teacher_stats,  # [Nt, 2]
    teacher_rows,  # [P] int64
    pairs,  # [P] int64: the pairs, those of one student row next to each other
    first_pair,  # [Ns + 1] int64: pairs[first_pair[i] : first_pair[i + 1]] are those of row i
    loss_gradient,  # [P] float32
    gradient,  # [Ns, K], contiguous
    student_stride,
    teacher_stride,
    inverse_student_temp,
    inverse_teacher_temp,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per student row and block of prototypes; rows without a pair get zeros."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < NUM_COLUMNS
    x = tl.load(student + i * student_stride + column, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(center + column, mask=inside, other=0.0).to(tl.float32)
    student_peak, student_sum = tl.load(student_stats + i * 2), tl.load(student_stats + i * 2 + 1)
    prediction = tl.exp((x - student_peak) * inverse_student_temp - student_sum)
    total = tl.zeros([BLOCK], tl.float32)
    position, last = tl.load(first_pair + i), tl.load(first_pair + i + 1)
    while position < last:
        pair = tl.load(pairs + position)
        j = tl.load(teacher_rows + pair)
        teacher_peak, teacher_sum = tl.load(teacher_stats + j * 2), tl.load(teacher_stats + j * 2 + 1)
        t = tl.load(teacher + j * teacher_stride + column, mask=inside, other=0.0).to(tl.float32)
        target = tl.exp((t - c - teacher_peak) * inverse_teacher_temp - teacher_sum)
        total += tl.load(loss_gradient + pair) * (prediction - target)
        position += 1
    out = total * inverse_student_temp
    tl.store(gradient + i * NUM_COLUMNS + column, out.to(gradient.dtype.element_ty), mask=inside)


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """``-sum_k softmax((t_j - c) / tt)_k log_softmax(x_i / ts)_k`` for every pair, with a gradient for the student.

    Args:
        student_logits: ``[Ns, K]`` float32, float16 or bfloat16.
        teacher_logits: ``[Nt, K]`` float32, float16 or bfloat16.
        center: ``[K]``.
        teacher_rows, student_rows: ``[P]`` int64; rows of the two, which must exist (not checked).
        student_temp, teacher_temp: temperatures, above 0.

    Returns:
        ``[P]`` float32, not reduced.
    """
    arguments = (student_logits, teacher_logits, center, teacher_rows, student_rows, student_temp, teacher_temp)
    return dino_loss_fwd(*arguments)[0]


@torch.library.custom_op("muse_fast::dino_loss_fwd", mutates_args=())
def dino_loss_fwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss ``[P]``, and of every row its largest entry and log-sum-exp: ``[Ns, 2]``, ``[Nt, 2]``."""
    student, teacher = rows_of(student_logits), rows_of(teacher_logits)
    center, teacher_rows, student_rows = center.contiguous(), teacher_rows.contiguous(), student_rows.contiguous()
    num_columns = student.shape[1]
    block = block_size(num_columns)
    loss, student_stats, teacher_stats = empty_outputs(student, teacher, teacher_rows)
    if loss.numel() == 0:
        return loss, student_stats.zero_(), teacher_stats.zero_()
    with torch.cuda.device_of(student):
        row_stats_kernel[(student.shape[0],)](
            student, center, student_stats, student.stride(0), 1 / student_temp, False, num_columns, block
        )
        row_stats_kernel[(teacher.shape[0],)](
            teacher, center, teacher_stats, teacher.stride(0), 1 / teacher_temp, True, num_columns, block
        )
        pair_loss_kernel[(loss.shape[0],)](
            student,
            teacher,
            center,
            student_stats,
            teacher_stats,
            teacher_rows,
            student_rows,
            loss,
            student.stride(0),
            teacher.stride(0),
            1 / student_temp,
            1 / teacher_temp,
            NUM_COLUMNS=num_columns,
            BLOCK=block,
        )
    return loss, student_stats, teacher_stats


@dino_loss_fwd.register_fake
def _(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(student_logits, teacher_logits, teacher_rows)


@torch.library.custom_op("muse_fast::dino_loss_bwd", mutates_args=())
def dino_loss_bwd(
    loss_gradient: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    student_stats: Tensor,
    teacher_stats: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """The gradient of the student logits ``[Ns, K]``, contiguous, in their dtype."""
    student, teacher = rows_of(student_logits), rows_of(teacher_logits)
    num_rows, num_columns = student.shape
    gradient = torch.empty((num_rows, num_columns), dtype=student.dtype, device=student.device)
    if gradient.numel() == 0:
        return gradient
    sorted_rows, pairs = student_rows.sort(stable=True)
    first_pair = torch.searchsorted(sorted_rows, torch.arange(num_rows + 1, device=student.device))
    block = block_size(num_columns)
    with torch.cuda.device_of(student):
        student_gradient_kernel[(num_rows, triton.cdiv(num_columns, block))](
            student,
            teacher,
            center.contiguous(),
            student_stats,
            teacher_stats,
            teacher_rows.contiguous(),
            pairs,
            first_pair,
            loss_gradient.contiguous(),
            gradient,
            student.stride(0),
            teacher.stride(0),
            1 / student_temp,
            1 / teacher_temp,
            NUM_COLUMNS=num_columns,
            BLOCK=block,
        )
    return gradient


@dino_loss_bwd.register_fake
def _(loss_gradient: Tensor, student_logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(student_logits.shape, dtype=student_logits.dtype, device=student_logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, center, teacher_rows, student_rows, ctx.student_temp, ctx.teacher_temp = inputs
    _, student_stats, teacher_stats = output
    ctx.mark_non_differentiable(student_stats, teacher_stats)
    ctx.save_for_backward(student, teacher, center, student_stats, teacher_stats, teacher_rows, student_rows)


def _backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradient = None
    if ctx.needs_input_grad[0]:
        gradient = dino_loss_bwd(loss_gradient, *ctx.saved_tensors, ctx.student_temp, ctx.teacher_temp)
    return gradient, None, None, None, None, None, None


dino_loss_fwd.register_autograd(_backward, setup_context=_setup_context)


def rows_of(logits: Tensor) -> Tensor:
    """The logits with neighbouring columns next to each other; rows may lie apart."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def block_size(num_columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(num_columns))


def empty_outputs(student: Tensor, teacher: Tensor, teacher_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (teacher_rows.shape[0],), (student.shape[0], 2), (teacher.shape[0], 2)
    loss, student_stats, teacher_stats = (
        torch.empty(shape, dtype=torch.float32, device=student.device) for shape in shapes
    )
    return loss, student_stats, teacher_stats
