"""The gradients of queries, keys and values, joined into that of the layer that makes all three, and its column sums.

Attention returns them apart, and for each resolution by itself. A program owns some columns of a run of rows, and moves
these of all three. It sums what it moves in registers, and runs are summed in order: no atomics, every run is
bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..namespace import NAMESPACE
from ..registration import empty_joined
from .gelu import BLOCK_COLUMNS, BLOCK_ROWS, runs_of


@triton.jit
def join_heads_kernel(
    first,  # [images, tokens, heads, HEAD], and so are the other two
    second,
    third,
    joined,  # [rows, 3 * WIDTH], WIDTH = heads * HEAD
    run_sums,  # [runs, 3 * WIDTH] float32
    num_rows,
    rows_per_run,  # a multiple of BLOCK_ROWS
    tokens,
    image_stride,
    token_stride,
    head_stride,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program per run of rows and block of columns."""
    run = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    known = column < WIDTH
    of_column = (column // HEAD).to(tl.int64) * head_stride + column % HEAD
    first_sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    second_sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    third_sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, rows_per_run, BLOCK_ROWS):
        row = run * rows_per_run + start + tl.arange(0, BLOCK_ROWS)
        inside = (row < num_rows)[:, None] & known[None, :]
        of_row = row // tokens * image_stride + row % tokens * token_stride
        source = of_row[:, None] + of_column[None, :]
        target = joined + row[:, None] * 3 * WIDTH + column[None, :]
        first_sums += move(first + source, target, inside)
        second_sums += move(second + source, target + WIDTH, inside)
        third_sums += move(third + source, target + 2 * WIDTH, inside)
    sums = run_sums + run * 3 * WIDTH + column
    tl.store(sums, tl.sum(first_sums, 0), mask=known)
    tl.store(sums + WIDTH, tl.sum(second_sums, 0), mask=known)
    tl.store(sums + 2 * WIDTH, tl.sum(third_sums, 0), mask=known)


@triton.jit
def move(source, target, inside):
    value = tl.load(source, mask=inside, other=0.0)
    tl.store(target, value, mask=inside)
    return value.to(tl.float32)


@torch.library.custom_op(f"{NAMESPACE}::join_heads", mutates_args=())
def join_heads(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join heads, then q, k and v, then the rows of all resolutions.

    Args:
        parts: q, k and v of each resolution in turn, ``[images, tokens, heads, d]`` float32, float16 or bfloat16.

    Returns:
        ``[M, 3 * heads * d]``, and its column sums in float32.
    """
    joined, sums = empty_joined(parts)
    of_resolutions = [parts[start : start + 3] for start in range(0, len(parts), 3) if parts[start].numel()]
    heads, head = parts[0].shape[2:]
    width = heads * head
    rows = [part.shape[0] * part.shape[1] for part, *_ in of_resolutions]
    grids = [runs_of(count, width) for count in rows]
    run_sums = sums.new_empty(sum(runs for (runs, _), _ in grids), 3 * width)
    targets = zip(joined.split(rows), run_sums.split([runs for (runs, _), _ in grids]), strict=True)
    for three, (grid, rows_per_run), target in zip(of_resolutions, grids, targets, strict=True):
        strides = three[0].stride()
        if strides[3] != 1 or any(part.stride() != strides for part in three):
            three = [part.contiguous() for part in three]
        with torch.cuda.device_of(joined):
            join_heads_kernel[grid](
                *three,
                *target,
                len(target[0]),
                rows_per_run,
                three[0].shape[1],
                *three[0].stride()[:3],
                WIDTH=width,
                HEAD=head,
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_COLUMNS=BLOCK_COLUMNS,
            )
    return joined, torch.sum(run_sums, 0, out=sums)


torch.library.register_fake(join_heads, empty_joined)
