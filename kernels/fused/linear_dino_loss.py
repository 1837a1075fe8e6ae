"""The DINO loss of linear logits as two Triton passes over the prototypes: see logit_free.py for the maths.

Forward: a program of ``attend_kernel`` owns a block of rows and a split of the prototypes, and keeps the running
maximum, sum and weighted sum of its logits; ``combine_kernel`` merges the splits in a fixed order. Backward: a program
owns a block of prototypes, loops over the student's rows and then the teacher's, and writes its gradient once. No
atomics: every run is bit-identical.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import logit_free
from ..arguments import LinearDinoLoss
from ..blocked import linear_dino_loss as blocked
from ..logit_free import Passes, Side, cast_for_autocast
from ..namespace import NAMESPACE
from ..registration import LINEAR_DINO_LOSS_BWD, LINEAR_DINO_LOSS_FWD, register_linear_dino_loss
from .dot import dot
from .linear_pairs import TINY, pair_loss, pair_sums, widths_of

MAX_WIDTH = 256  # of a row: a block of sums this wide fills the registers
WAVES = 4  # maximum number of programs per multiprocessor that share the prototypes of one row
LOWEST = tl.constexpr(-1.0e30)  # in place of -inf, because -inf - -inf is NaN
LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """Rows and prototypes that a program processes at a time, and its launch options."""

    rows: int
    prototypes: int
    num_warps: int = 8
    num_stages: int = 2


class Tiles(NamedTuple):
    attend: Tile
    gradient: Tile


# The largest tiles without register spills at a width of 256, keyed by the bytes of shared memory that a block needs.
TILES_16_BIT = {
    197_120: Tiles(attend=Tile(128, 64), gradient=Tile(64, 128)),  # sm_90
    147_968: Tiles(attend=Tile(64, 64), gradient=Tile(64, 128)),  # sm_80
    69_888: Tiles(attend=Tile(64, 32), gradient=Tile(32, 64)),  # sm_86, sm_89
}
TILES_FLOAT32 = Tiles(attend=Tile(32, 16), gradient=Tile(16, 32))


@triton.jit
def load_rows(matrix, start, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Load ``matrix[start : start + ROWS]`` as ``[ROWS, LANES]``, with zeros beyond its rows and columns."""
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    inside = row < num_rows - start
    if LANES > WIDTH:
        inside &= lane < WIDTH
    return tl.load(matrix + tl.cast(start, tl.int64) * WIDTH + (row * WIDTH + lane), mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def attend_kernel(
    queries,  # [N, d]
    keys,  # [K, d]
    values,  # [K, d]; read only for the teacher: the student's values are its keys
    center,  # [K] float32; read only for the teacher
    peaks,  # [splits, N] float32: largest logit of a split of the prototypes
    totals,  # [splits, N] float32: sum of exponentials after subtracting the largest
    sums,  # [splits, N, d] float32: sum of values weighted by those exponentials
    num_rows,
    prototypes_of_a_split,
    inverse_temp,
    TEACHER: tl.constexpr,
    NUM_PROTOTYPES: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
):
    """One program per block of rows and split of the prototypes."""
    first_row, split = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1)
    scale = inverse_temp * LOG2_E
    query = load_rows(queries, first_row, num_rows, WIDTH, BLOCK_ROWS, LANES)
    peak = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    weighted = tl.zeros([BLOCK_ROWS, LANES], tl.float32)
    first = split * prototypes_of_a_split
    last = tl.minimum(first + prototypes_of_a_split, NUM_PROTOTYPES)
    for start in range(first, last, BLOCK_PROTOTYPES):
        column = start + tl.arange(0, BLOCK_PROTOTYPES)
        key = load_rows(keys, start, NUM_PROTOTYPES, WIDTH, BLOCK_PROTOTYPES, LANES)
        x = dot(query, tl.trans(key), tl.zeros([BLOCK_ROWS, BLOCK_PROTOTYPES], tl.float32))
        if TEACHER:
            x -= tl.load(center + column, mask=column < NUM_PROTOTYPES, other=0.0)[None, :]
            value = load_rows(values, start, NUM_PROTOTYPES, WIDTH, BLOCK_PROTOTYPES, LANES)
        else:
            value = key
        if NUM_PROTOTYPES % BLOCK_PROTOTYPES:
            x = tl.where((column < NUM_PROTOTYPES)[None, :], x, LOWEST)
        new_peak = tl.maximum(peak, tl.max(x, 1))
        shrink = tl.exp2((peak - new_peak) * scale)
        p = tl.exp2((x - new_peak[:, None]) * scale)
        total = total * shrink + tl.sum(p, 1)
        weighted = dot(p, value, weighted * shrink[:, None])
        peak = new_peak
    row = first_row + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, LANES)
    place = split.to(tl.int64) * num_rows + row
    tl.store(peaks + place, peak, mask=row < num_rows)
    tl.store(totals + place, total, mask=row < num_rows)
    inside = (row < num_rows)[:, None] & (lane < WIDTH)[None, :]
    tl.store(sums + place[:, None] * WIDTH + lane[None, :], weighted, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def combine_kernel(
    peaks,  # [splits, N]
    totals,  # [splits, N]
    sums,  # [splits, N, d]
    stats,  # [N, 2] float32: largest logit, sum of exponentials after subtracting the largest
    mean,  # [N, d] float32
    num_rows,
    num_splits,
    inverse_temp,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    scale = inverse_temp * LOG2_E
    peak = tl.full([BLOCK_SPLITS], LOWEST, tl.float32)
    for start in range(0, num_splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        place = split.to(tl.int64) * num_rows + row
        peak = tl.maximum(peak, tl.load(peaks + place, mask=split < num_splits, other=LOWEST))
    row_peak = tl.max(peak, 0)
    total = tl.zeros([BLOCK_SPLITS], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    for start in range(0, num_splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        place = split.to(tl.int64) * num_rows + row
        share = tl.exp2((tl.load(peaks + place, mask=split < num_splits, other=LOWEST) - row_peak) * scale)
        total += share * tl.load(totals + place, mask=split < num_splits, other=0.0)
        inside = (split < num_splits)[:, None] & (lane < WIDTH)[None, :]
        part = tl.load(sums + place[:, None] * WIDTH + lane[None, :], mask=inside, other=0.0)
        weighted += tl.sum(share[:, None] * part, 0)
    row_total = tl.sum(total, 0)
    tl.store(stats + row * 2, row_peak)
    tl.store(stats + row * 2 + 1, row_total)
    tl.store(mean + row * WIDTH + lane, weighted / row_total, mask=lane < WIDTH)


@triton.jit
def add_side(
    gradient,  # [BLOCK_PROTOTYPES, LANES]
    prototype,  # [BLOCK_PROTOTYPES, LANES]
    bias,  # [BLOCK_PROTOTYPES]; subtracted from the teacher's logits
    rows,  # [N, d]
    values,  # [N, d]; read only for the teacher: the student's values are its rows
    stats,  # [N, 2] float32, of which peaks are read
    coefficients,  # [N] float32
    inverse_unit,
    num_rows,
    inverse_temp,
    TEACHER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """``gradient + sum_n coefficient_n / unit * exp((x_kn - peak_n) / temp) value_n`` over all rows."""
    scale = inverse_temp * LOG2_E
    for start in range(0, num_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        key = load_rows(rows, start, num_rows, WIDTH, BLOCK_ROWS, prototype.shape[1])
        # Rows past the end contribute exp2(-inf) * 0, whatever the bias is.
        peak = tl.load(stats + row * 2, mask=row < num_rows, other=-LOWEST)
        coefficient = tl.load(coefficients + row, mask=row < num_rows, other=0.0) * inverse_unit
        x = dot(prototype, tl.trans(key), tl.zeros([prototype.shape[0], BLOCK_ROWS], tl.float32))
        if TEACHER:
            x -= bias[:, None]
            value = load_rows(values, start, num_rows, WIDTH, BLOCK_ROWS, prototype.shape[1])
        else:
            value = key
        gradient = dot(tl.exp2((x - peak[None, :]) * scale) * coefficient[None, :], value, gradient)
    return gradient


@triton.jit(do_not_specialize=["num_students", "num_teachers"])
def prototype_gradient_kernel(
    student_z,  # [Ns, d]
    student_W,  # [K, d]
    student_stats,  # [Ns, 2] float32
    student_coefficients,  # [Ns] float32
    teacher_z,  # [Nt, d]
    teacher_W,  # [K, d]
    teacher_stats,  # [Nt, 2] float32
    teacher_coefficients,  # [Nt] float32
    teacher_values,  # [Nt, d]
    center,  # [K] float32
    largest_student,  # [] float32: the largest coefficient in absolute value
    largest_teacher,  # [] float32
    gradient,  # [K, d]
    num_students,
    num_teachers,
    inverse_student_temp,
    inverse_teacher_temp,
    NUM_PROTOTYPES: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
):
    """One program per block of prototypes.

    Exponentials are at most 1, and are rounded to 16 bits after multiplying by their coefficient. In float16, weights
    of 1e-3 times probabilities of 1e-5 would underflow, so the coefficients are scaled to a maximum of 1 too.
    """
    unit = tl.maximum(tl.maximum(tl.load(largest_student), tl.load(largest_teacher)), TINY)
    first = tl.program_id(0) * BLOCK_PROTOTYPES
    column = first + tl.arange(0, BLOCK_PROTOTYPES)
    lane = tl.arange(0, LANES)
    bias = tl.load(center + column, mask=column < NUM_PROTOTYPES, other=-LOWEST)
    total = tl.zeros([BLOCK_PROTOTYPES, LANES], tl.float32)
    w = load_rows(student_W, first, NUM_PROTOTYPES, WIDTH, BLOCK_PROTOTYPES, LANES)
    total = add_side(
        total,
        w,
        bias,
        student_z,
        student_z,
        student_stats,
        student_coefficients,
        1 / unit,
        num_students,
        inverse_student_temp,
        False,
        WIDTH,
        BLOCK_ROWS,
    )
    w = load_rows(teacher_W, first, NUM_PROTOTYPES, WIDTH, BLOCK_PROTOTYPES, LANES)
    total = add_side(
        total,
        w,
        bias,
        teacher_z,
        teacher_values,
        teacher_stats,
        teacher_coefficients,
        1 / unit,
        num_teachers,
        inverse_teacher_temp,
        True,
        WIDTH,
        BLOCK_ROWS,
    )
    total *= unit
    inside = (column < NUM_PROTOTYPES)[:, None] & (lane < WIDTH)[None, :]
    place = column.to(tl.int64)[:, None] * WIDTH + lane[None, :]
    tl.store(gradient + place, total.to(gradient.dtype.element_ty), mask=inside)


def linear_dino_loss(arguments: LinearDinoLoss) -> Tensor:
    """Compute ``dino_loss`` of the logits ``z @ W.T``, which are never stored: ``[P]`` float32, not reduced.

    The gradient flows to ``student_z`` and ``student_W``. bfloat16 and float16 features are multiplied on tensor cores,
    float32 ones in full float32, which is far slower. ``blocked.linear_dino_loss`` handles features wider than 256.
    """
    if arguments.student_z.shape[1] > MAX_WIDTH:
        return blocked.linear_dino_loss(arguments)
    return linear_dino_loss_fwd(*cast_for_autocast(arguments))[0]


@torch.library.custom_op(f"{NAMESPACE}::linear_dino_loss_fwd", mutates_args=(), schema=LINEAR_DINO_LOSS_FWD)
def linear_dino_loss_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    return logit_free.forward(PASSES, LinearDinoLoss(*arguments))


@torch.library.custom_op(f"{NAMESPACE}::linear_dino_loss_bwd", mutates_args=(), schema=LINEAR_DINO_LOSS_BWD)
def linear_dino_loss_bwd(loss_gradient: Tensor, *saved_and_arguments: Any) -> tuple[Tensor, Tensor]:
    saved, arguments = saved_and_arguments[:4], saved_and_arguments[4:]
    return logit_free.backward(PASSES, loss_gradient, *saved, LinearDinoLoss(*arguments))


register_linear_dino_loss(linear_dino_loss_fwd, linear_dino_loss_bwd)


def attend(queries: Tensor, keys: Tensor, values: Tensor, center: Tensor | None, temp: float) -> tuple[Tensor, Tensor]:
    queries, keys, values = as_operands(queries, keys, values)
    tile = tiles_of(queries).attend
    num_rows, width = queries.shape
    num_tiles = triton.cdiv(len(keys), tile.prototypes)
    row_blocks = triton.cdiv(num_rows, tile.rows)
    tiles_of_a_split = choose_split(row_blocks, num_tiles, num_multiprocessors(queries.device))
    num_splits = triton.cdiv(num_tiles, tiles_of_a_split)
    widths = widths_of(queries)

    stats, mean = (torch.empty(num_rows, n, dtype=torch.float32, device=queries.device) for n in (2, width))
    peaks, totals = stats.new_empty(num_splits, num_rows), stats.new_empty(num_splits, num_rows)
    sums = stats.new_empty(num_splits, num_rows, width)
    with torch.cuda.device_of(queries):
        attend_kernel[(row_blocks, num_splits)](
            queries,
            keys,
            values,
            peaks if center is None else center.float().contiguous(),
            peaks,
            totals,
            sums,
            num_rows,
            tiles_of_a_split * tile.prototypes,
            1 / temp,
            TEACHER=center is not None,
            NUM_PROTOTYPES=len(keys),
            **widths,
            BLOCK_ROWS=tile.rows,
            BLOCK_PROTOTYPES=tile.prototypes,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        combine_kernel[(num_rows,)](
            peaks, totals, sums, stats, mean, num_rows, num_splits, 1 / temp, **widths, BLOCK_SPLITS=8
        )
    return stats, mean


def prototype_gradient(student: Side, teacher: Side, dtype: torch.dtype) -> Tensor:
    largest = [torch.linalg.vector_norm(side.coefficients, torch.inf) for side in (student, teacher)]
    features = student.rows, student.prototypes, teacher.rows, teacher.prototypes
    student_z, student_W, teacher_z, teacher_W = as_operands(*features)
    tile = tiles_of(student_z).gradient
    num_prototypes, width = student_W.shape
    gradient = torch.empty(num_prototypes, width, dtype=dtype, device=student_W.device)
    with torch.cuda.device_of(student_z):
        prototype_gradient_kernel[(triton.cdiv(num_prototypes, tile.prototypes),)](
            student_z,
            student_W,
            student.stats,
            student.coefficients,
            teacher_z,
            teacher_W,
            teacher.stats,
            teacher.coefficients,
            teacher.values.to(student_z.dtype),
            teacher.center.float().contiguous(),
            *largest,
            gradient,
            len(student_z),
            len(teacher_z),
            1 / student.temp,
            1 / teacher.temp,
            NUM_PROTOTYPES=num_prototypes,
            **widths_of(student_z),
            BLOCK_ROWS=tile.rows,
            BLOCK_PROTOTYPES=tile.prototypes,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return gradient


PASSES = Passes(attend, pair_loss, pair_sums, prototype_gradient)


def as_operands(*matrices: Tensor) -> list[Tensor]:
    """Return the matrices contiguous and in one dtype."""
    dtype = functools.reduce(torch.promote_types, [matrix.dtype for matrix in matrices])
    return [matrix.to(dtype).contiguous() for matrix in matrices]


def tiles_of(operand: Tensor) -> Tiles:
    """Return the largest tiles that fit the device, or the smallest for the interpreter."""
    if operand.dtype == torch.float32:
        return TILES_FLOAT32
    available = min(TILES_16_BIT)
    if operand.is_cuda:
        available = torch.cuda.get_device_properties(operand.device).shared_memory_per_block_optin
    return next((tiles for needed, tiles in TILES_16_BIT.items() if needed <= available), TILES_FLOAT32)


def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def choose_split(row_blocks: int, num_tiles: int, multiprocessors: int) -> int:
    """Return how many tiles of prototypes a program loops over, for the least time if all tiles take the same time.

    Few blocks of rows would leave most of a GPU idle, so several programs share the prototypes then.
    """
    most_splits = min(num_tiles, max(1, WAVES * multiprocessors // row_blocks))

    def time(splits: int) -> int:
        return triton.cdiv(row_blocks * splits, multiprocessors) * triton.cdiv(num_tiles, splits)

    return triton.cdiv(num_tiles, min(range(1, most_splits + 1), key=time))
