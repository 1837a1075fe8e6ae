"""The parts of the DINO loss of linear logits that run over pairs of rows, in one launch each: see logit_free.py.

A program of the forward owns a pair, one of the backward a row of the student or the teacher, whose pairs it adds up in
their order: no atomics, every run is bit-identical.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import LinearDinoLoss
from ..logit_free import PairSums, padding
from .dot import rounded

TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


@triton.jit
def linear_pair_loss_kernel(
    student_z,  # [Ns, d]
    student_stats,  # [Ns, 2] float32: largest logit, sum of exponentials after subtracting it
    teacher_mean,  # [Nt, d] float32
    teacher_rows,  # [P] int64
    student_rows,  # [P] int64
    loss,  # [P] float32
    inverse_temp,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per pair."""
    pair = tl.program_id(0)
    i, j = tl.load(student_rows + pair), tl.load(teacher_rows + pair)
    value = tl.full((), 0.0, tl.float32)
    if (i >= 0) & (j >= 0):
        lane = tl.arange(0, LANES)
        z = tl.load(student_z + i * WIDTH + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
        mean = tl.load(teacher_mean + j * WIDTH + lane, mask=lane < WIDTH, other=0.0)
        score = tl.sum(z * mean, 0)
        value = (tl.load(student_stats + i * 2) - score) * inverse_temp + tl.log(tl.load(student_stats + i * 2 + 1))
    tl.store(loss + pair, value)


@triton.jit(do_not_specialize=["num_students", "num_pairs"])
def linear_pair_sums_kernel(
    loss_gradient,  # [P] float32
    student_z,  # [Ns, d]
    student_stats,  # [Ns, 2] float32
    student_mean,  # [Ns, d] float32
    teacher_stats,  # [Nt, 2] float32
    teacher_mean,  # [Nt, d] float32
    teacher_rows,  # [P] int64
    student_rows,  # [P] int64
    order,  # [2 P] int64, see group_pairs
    first,  # [Ns + Nt + 1] int64
    z_gradient,  # [Ns, d]
    student_coefficients,  # [Ns] float32
    teacher_coefficients,  # [Nt] float32
    teacher_values,  # [Nt, d]
    gradient_stride,
    num_students,
    num_pairs,
    inverse_temp,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per student row, then one per teacher row."""
    row = tl.program_id(0).to(tl.int64)
    position, last = tl.load(first + row), tl.load(first + row + 1)
    lane = tl.arange(0, LANES)
    inside = lane < WIDTH
    total = tl.zeros([LANES], tl.float32)
    weight = tl.full((), 0.0, tl.float32)
    if row < num_students:
        mean = tl.load(student_mean + row * WIDTH + lane, mask=inside, other=0.0)
        while position < last:
            pair = tl.load(order + position)
            w = tl.load(loss_gradient + pair * gradient_stride) * inverse_temp
            j = tl.load(teacher_rows + pair)
            total += w * (mean - tl.load(teacher_mean + j * WIDTH + lane, mask=inside, other=0.0))
            weight += w
            position += 1
        tl.store(z_gradient + row * WIDTH + lane, rounded(total, z_gradient.dtype.element_ty), mask=inside)
        tl.store(student_coefficients + row, weight / tl.load(student_stats + row * 2 + 1))
    else:
        row -= num_students
        while position < last:
            pair = tl.load(order + position) - num_pairs
            w = tl.load(loss_gradient + pair * gradient_stride) * inverse_temp
            i = tl.load(student_rows + pair)
            total += w * tl.load(student_z + i * WIDTH + lane, mask=inside, other=0.0).to(tl.float32)
            weight += tl.abs(w)
            position += 1
        weight = tl.maximum(weight, TINY)
        values = rounded(total / weight, teacher_values.dtype.element_ty)
        tl.store(teacher_values + row * WIDTH + lane, values, mask=inside)
        tl.store(teacher_coefficients + row, -weight / tl.load(teacher_stats + row * 2 + 1))


def pair_loss(student_stats: Tensor, teacher_mean: Tensor, arguments: LinearDinoLoss) -> Tensor:
    student_z, rows = arguments.student_z.contiguous(), arguments.teacher_rows
    loss = student_stats.new_empty(len(rows))
    with torch.cuda.device_of(student_z):
        linear_pair_loss_kernel[(len(rows),)](
            student_z,
            student_stats,
            teacher_mean,
            rows.contiguous(),
            arguments.student_rows.contiguous(),
            loss,
            1 / arguments.student_temp,
            **widths_of(student_z),
            num_warps=1,
        )
    return loss


def pair_sums(
    loss_gradient: Tensor,
    student_stats: Tensor,
    student_mean: Tensor,
    teacher_stats: Tensor,
    teacher_mean: Tensor,
    arguments: LinearDinoLoss,
) -> PairSums:
    student_z, teacher_z = arguments.student_z.contiguous(), arguments.teacher_z
    order, first = group_pairs(arguments)
    sums = PairSums(
        torch.empty_like(student_z),
        student_stats.new_empty(len(student_z)),
        student_stats.new_empty(len(teacher_z)),
        torch.empty_like(teacher_mean, dtype=student_z.dtype),
    )
    with torch.cuda.device_of(student_z):
        linear_pair_sums_kernel[(len(student_z) + len(teacher_z),)](
            loss_gradient,
            student_z,
            student_stats,
            student_mean,
            teacher_stats,
            teacher_mean,
            arguments.teacher_rows.contiguous(),
            arguments.student_rows.contiguous(),
            order,
            first,
            *sums,
            loss_gradient.stride(0),
            len(student_z),
            len(arguments.teacher_rows),
            1 / arguments.student_temp,
            **widths_of(student_z),
            num_warps=1,
        )
    return sums


def group_pairs(arguments: LinearDinoLoss) -> tuple[Tensor, Tensor]:
    """Group the pairs by their rows, on the device and without a host synchronisation.

    Returns:
        ``order [2 P]``: padding, then the pairs sorted by student, then P + the pairs sorted by teacher; those of a row
        keep their order. ``first [Ns + Nt + 1]``: the pairs of student i are ``order[first[i] : first[i + 1]]``, and
        those of teacher j are ``order[first[Ns + j] : first[Ns + j + 1]] - P``.
    """
    num_students, num_teachers = len(arguments.student_z), len(arguments.teacher_z)
    teacher_rows, student_rows = arguments.teacher_rows, arguments.student_rows
    rows = torch.stack([student_rows, teacher_rows + num_students])
    rows.masked_fill_(padding(teacher_rows, student_rows), -1)
    ordered, order = rows.flatten().int().sort(stable=True)  # half the passes of a sort of int64
    numbers = torch.arange(num_students + num_teachers + 1, dtype=torch.int32, device=rows.device)
    return order, torch.searchsorted(ordered, numbers)


def widths_of(rows: Tensor) -> dict[str, int]:
    width = rows.shape[1]
    return {"WIDTH": width, "LANES": max(16, triton.next_power_of_2(width))}
