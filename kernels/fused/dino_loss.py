"""DINO's cross-entropy over pairs of rows, from stored logits, without a stored softmax.

With m the largest entry of a row and Z the sum of its exponentials after subtracting m,

    p_jk = exp((t_jk - c_k - m_j) / tt) / Z_j        the teacher, centred and sharpened
    q_ik = exp((x_ik - m_i) / ts) / Z_i              the student

    loss_p         = -sum_k p_jk log q_ik = log Z_i - sum_k p_jk (x_ik - m_i) / ts
    d loss / d x_i = sum_{p of row i} g_p (q_i - p_j) / ts            (j, i) = (teacher_rows[p], student_rows[p])

so memory holds two numbers per row in addition to the logits. A program of the forward reads one block of columns of
one pair and stores five numbers, from which a second kernel computes the loss, m and Z. A program of the backward owns
one block of one student row and adds up the pairs of that row in their given order: no atomics, every run is
bit-identical. Programs of the same columns start together, so a row in many pairs is read from memory once, then from
L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..namespace import NAMESPACE
from ..registration import register_dino_loss

BLOCK = 2048
LOWEST = tl.constexpr(-1.0e30)  # in place of -inf, because -inf - -inf is NaN
LOG2_E = tl.constexpr(1.4426950408889634)  # exp(v) = exp2(v * LOG2_E), and exp2 is a single instruction


@triton.jit
def block_sums_kernel(
    student,  # [Ns, K]
    teacher,  # [Nt, K]
    center,  # [K]
    teacher_rows,  # [P] int64
    student_rows,  # [P] int64
    sums,  # [P, 5, blocks] float32, added up by pair_loss_kernel
    student_stride,
    teacher_stride,
    inverse_student_temp,
    inverse_teacher_temp,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per pair and block of columns."""
    pair = tl.program_id(0).to(tl.int64)
    i = tl.load(student_rows + pair)
    j = tl.load(teacher_rows + pair)
    if (i >= 0) & (j >= 0):
        column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = column < NUM_COLUMNS
        x = tl.load(student + i * student_stride + column, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(teacher + j * teacher_stride + column, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(center + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x, LOWEST)  # not as `other` of the load: in float16 it would become -inf
        u = tl.where(inside, t - c, LOWEST)
        student_peak = tl.max(x, 0)
        teacher_peak = tl.maximum(tl.max(u, 0), LOWEST)  # a whole block of prototypes may be -inf
        below = x - student_peak
        target = tl.exp2((u - teacher_peak) * (inverse_teacher_temp * LOG2_E))
        prediction = tl.exp2(below * (inverse_student_temp * LOG2_E))
        num_blocks = tl.num_programs(1)
        place = sums + pair * 5 * num_blocks + tl.program_id(1)
        tl.store(place, student_peak)
        tl.store(place + num_blocks, tl.sum(prediction, 0))
        tl.store(place + num_blocks * 2, teacher_peak)
        tl.store(place + num_blocks * 3, tl.sum(target, 0))
        tl.store(place + num_blocks * 4, tl.sum(target * below, 0))


@triton.jit
def pair_loss_kernel(
    sums,  # [P, 5, NUM_BLOCKS] float32
    teacher_rows,  # [P] int64
    student_rows,  # [P] int64
    loss,  # [P] float32
    student_stats,  # [Ns, 2] float32: m and Z
    teacher_stats,  # [Nt, 2] float32
    inverse_student_temp,
    inverse_teacher_temp,
    NUM_BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per pair. All pairs of a row compute identical bits of its m and Z, and all store them."""
    pair = tl.program_id(0).to(tl.int64)
    i = tl.load(student_rows + pair)
    j = tl.load(teacher_rows + pair)
    value = tl.full((), 0.0, tl.float32)
    if (i >= 0) & (j >= 0):
        block = tl.arange(0, LANES)
        inside = block < NUM_BLOCKS
        place = sums + pair * 5 * NUM_BLOCKS + block
        student_peaks = tl.load(place, mask=inside, other=LOWEST)
        student_totals = tl.load(place + NUM_BLOCKS, mask=inside, other=0.0)
        teacher_peaks = tl.load(place + NUM_BLOCKS * 2, mask=inside, other=LOWEST)
        teacher_totals = tl.load(place + NUM_BLOCKS * 3, mask=inside, other=0.0)
        products = tl.load(place + NUM_BLOCKS * 4, mask=inside, other=0.0)

        student_peak = tl.max(student_peaks, 0)
        teacher_peak = tl.max(teacher_peaks, 0)
        below = student_peaks - student_peak
        share = tl.exp2((teacher_peaks - teacher_peak) * (inverse_teacher_temp * LOG2_E))
        student_total = tl.sum(student_totals * tl.exp2(below * (inverse_student_temp * LOG2_E)), 0)
        teacher_total = tl.sum(teacher_totals * share, 0)
        product = tl.sum((products + teacher_totals * below) * share, 0)
        value = tl.log(student_total) - product / teacher_total * inverse_student_temp

        tl.store(student_stats + i * 2, student_peak)
        tl.store(student_stats + i * 2 + 1, student_total)
        tl.store(teacher_stats + j * 2, teacher_peak)
        tl.store(teacher_stats + j * 2 + 1, teacher_total)
    tl.store(loss + pair, value)


@triton.jit
def student_gradient_kernel(
    student,  # [Ns, K]
    teacher,  # [Nt, K]
    center,  # [K]
    student_stats,  # [Ns, 2]
    teacher_stats,  # [Nt, 2]
    teacher_rows,  # [P] int64
    pairs,  # [P] int64: the pairs, sorted by student row
    first_pair,  # [Ns + 1] int64: row i has pairs[first_pair[i] : first_pair[i + 1]]
    loss_gradient,  # [P] float32
    gradient,  # [Ns, K], contiguous
    student_stride,
    teacher_stride,
    inverse_student_temp,
    inverse_teacher_temp,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per student row and block of columns; the gradient of rows without pairs is zero."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < NUM_COLUMNS
    position, last = tl.load(first_pair + i), tl.load(first_pair + i + 1)
    paired = position < last
    x = tl.load(student + i * student_stride + column, mask=inside & paired, other=-float("inf")).to(tl.float32)
    c = tl.load(center + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)  # sum_p g_p (q_i - p_j)
    weight = tl.full((), 0.0, tl.float32)  # sum_p g_p
    while position < last:
        pair = tl.load(pairs + position)
        j = tl.load(teacher_rows + pair)
        g = tl.load(loss_gradient + pair)
        t = tl.load(teacher + j * teacher_stride + column, mask=inside, other=-float("inf")).to(tl.float32)
        teacher_peak, teacher_total = tl.load(teacher_stats + j * 2), tl.load(teacher_stats + j * 2 + 1)
        target = tl.exp2((t - c - teacher_peak) * (inverse_teacher_temp * LOG2_E))
        total -= target * (g / teacher_total)
        weight += g
        position += 1
    student_peak = tl.load(student_stats + i * 2, mask=paired, other=0.0)
    student_total = tl.load(student_stats + i * 2 + 1, mask=paired, other=1.0)
    prediction = tl.exp2((x - student_peak) * (inverse_student_temp * LOG2_E))
    total += prediction * (weight / student_total)
    out = total * inverse_student_temp
    tl.store(gradient + i * NUM_COLUMNS + column, out.to(gradient.dtype.element_ty), mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::dino_loss_fwd", mutates_args=())
def dino_loss_fwd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss ``[P]``, and m and Z of every row in a pair: ``[Ns, 2]``, ``[Nt, 2]``, zeros elsewhere."""
    student, teacher = rows_of(student_logits), rows_of(teacher_logits)
    teacher_rows, student_rows = teacher_rows.contiguous(), student_rows.contiguous()
    num_pairs, num_columns = teacher_rows.shape[0], student.shape[1]
    block = block_size(num_columns)
    num_blocks = triton.cdiv(num_columns, block)
    single = {"dtype": torch.float32, "device": student.device}
    loss = torch.empty(num_pairs, **single)
    student_stats, teacher_stats = torch.zeros(len(student), 2, **single), torch.zeros(len(teacher), 2, **single)
    if num_pairs == 0:
        return loss, student_stats, teacher_stats
    sums = torch.empty(num_pairs, 5, num_blocks, **single)
    inverse_temps = 1 / student_temp, 1 / teacher_temp
    with torch.cuda.device_of(student):
        block_sums_kernel[(num_pairs, num_blocks)](
            student,
            teacher,
            center.contiguous(),
            teacher_rows,
            student_rows,
            sums,
            student.stride(0),
            teacher.stride(0),
            *inverse_temps,
            NUM_COLUMNS=num_columns,
            BLOCK=block,
        )
        pair_loss_kernel[(num_pairs,)](
            sums,
            teacher_rows,
            student_rows,
            loss,
            student_stats,
            teacher_stats,
            *inverse_temps,
            NUM_BLOCKS=num_blocks,
            LANES=triton.next_power_of_2(num_blocks),
            num_warps=1,
        )
    return loss, student_stats, teacher_stats


@torch.library.custom_op(f"{NAMESPACE}::dino_loss_bwd", mutates_args=())
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
    """Return the gradient of the student logits ``[Ns, K]``, contiguous, in their dtype."""
    student, teacher = rows_of(student_logits), rows_of(teacher_logits)
    num_rows, num_columns = student.shape
    gradient = torch.empty((num_rows, num_columns), dtype=student.dtype, device=student.device)
    if gradient.numel() == 0:
        return gradient
    padding_first = torch.where(teacher_rows < 0, -1, student_rows)
    sorted_rows, pairs = padding_first.sort(stable=True)
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


register_dino_loss(dino_loss_fwd, dino_loss_bwd)


def rows_of(logits: Tensor) -> Tensor:
    """Return the logits with contiguous columns; rows may be strided."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def block_size(num_columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(num_columns))
