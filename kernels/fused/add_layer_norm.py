"""The residual stream of a transformer: add a branch, normalise the sum, cast it; in one pass over the rows.

    t = x + s b        n = (t - mean) rstd w + b'        rstd = 1 / sqrt(var + eps)

With g = dn w and the normalised rows h = (t - mean) rstd, the backward is

    dx = dt + rstd (g - mean(g) - h mean(g h))        db = s dx        dw = sum_rows dn h        db' = sum_rows dn

where dt is the gradient that reaches the sum from elsewhere. A program owns rows, so dx and db are written once. dw and
db' are summed over long runs of rows in registers, and over the runs in order: no atomics, every run is bit-identical.
So is sum_rows db, the gradient of the bias of the linear layer whose output the branch is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..namespace import NAMESPACE
from ..registration import empty_norm_gradients, empty_norms, register_add_layer_norm

MAX_WIDTH = 4096  # columns of a row that fit in registers
TILE = 2048  # values per step of a program, if rows are narrower
RUNS = 528  # programs of the backward, about four per multiprocessor; each stores partial sums of every column


@triton.jit
def add_norm_kernel(
    x,  # [M, WIDTH]
    branch,  # [M, WIDTH], or None
    scale,  # [M], or None
    weight,  # [WIDTH]
    bias,  # [WIDTH]
    total,  # [M, WIDTH]; None without a branch
    normed,  # [M, WIDTH]
    stats,  # [2, M] float32: mean and reciprocal deviation of each row of the sum
    num_rows,
    eps,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program per block of rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, LANES)
    given, known = row < num_rows, column < WIDTH
    inside = given[:, None] & known[None, :]
    place = row[:, None] * WIDTH + column[None, :]

    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        if scale is not None:
            added *= tl.load(scale + row, mask=given, other=0.0).to(tl.float32)[:, None]
        stored = (value + added).to(total.dtype.element_ty)
        tl.store(total + place, stored, mask=inside)
        value = stored.to(tl.float32)  # the backward sees what was stored

    mean = tl.sum(value, 1) / WIDTH
    centred = tl.where(inside, value - mean[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    w = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    out = centred * inverse[:, None] * w[None, :] + b[None, :]
    tl.store(normed + place, out.to(normed.dtype.element_ty), mask=inside)
    tl.store(stats + row, mean, mask=given)
    tl.store(stats + num_rows + row, inverse, mask=given)


@triton.jit
def add_norm_gradient_kernel(
    total_gradient,  # [M, WIDTH], or None if the sum is not used elsewhere
    normed_gradient,  # [M, WIDTH]
    total,  # [M, WIDTH]
    stats,  # [2, M] float32
    weight,  # [WIDTH]
    scale,  # [M], or None
    x_gradient,  # [M, WIDTH]
    branch_gradient,  # [M, WIDTH], or None without a branch
    run_gradients,  # [runs, SUMS, WIDTH] float32, of weight, bias and, if SUMS is 3, the bias in the branch
    num_rows,
    rows_per_run,  # a multiple of BLOCK_ROWS
    SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program per run of rows."""
    run = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, LANES)
    known = column < WIDTH
    w = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    weight_gradient = tl.zeros([BLOCK_ROWS, LANES], tl.float32)
    bias_gradient = tl.zeros([BLOCK_ROWS, LANES], tl.float32)
    branch_sums = tl.zeros([BLOCK_ROWS, LANES], tl.float32)
    for start in range(0, rows_per_run, BLOCK_ROWS):
        row = run * rows_per_run + start + tl.arange(0, BLOCK_ROWS)
        given = row < num_rows
        inside = given[:, None] & known[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        mean = tl.load(stats + row, mask=given, other=0.0)
        inverse = tl.load(stats + num_rows + row, mask=given, other=0.0)
        value = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        dn = tl.load(normed_gradient + place, mask=inside, other=0.0).to(tl.float32)

        h = tl.where(inside, (value - mean[:, None]) * inverse[:, None], 0.0)
        g = dn * w[None, :]
        along = tl.sum(g * h, 1) / WIDTH
        dx = (g - (tl.sum(g, 1) / WIDTH)[:, None] - h * along[:, None]) * inverse[:, None]
        if total_gradient is not None:
            dx += tl.load(total_gradient + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_gradient + place, dx.to(x_gradient.dtype.element_ty), mask=inside)
        if branch_gradient is not None:
            if scale is not None:
                dx *= tl.load(scale + row, mask=given, other=0.0).to(tl.float32)[:, None]
            tl.store(branch_gradient + place, dx.to(branch_gradient.dtype.element_ty), mask=inside)
            branch_sums += dx
        weight_gradient += dn * h
        bias_gradient += dn
    sums = run_gradients + run * SUMS * WIDTH + column
    tl.store(sums, tl.sum(weight_gradient, 0), mask=known)
    tl.store(sums + WIDTH, tl.sum(bias_gradient, 0), mask=known)
    if SUMS == 3:
        tl.store(sums + 2 * WIDTH, tl.sum(branch_sums, 0), mask=known)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``total = x + branch * scale`` and its LayerNorm over columns.

    Args:
        x: ``[M, C]`` float32, float16 or bfloat16, C at most 4096.
        branch: ``[M, C]``, or None to normalise x itself.
        scale: ``[M, 1]``, without gradient, or None for 1.
        weight, bias: ``[C]``.
        dtype: of the second result; by default that of the sum.
        branch_bias: ``[C]``, already added to the branch, or None. Its values are not used; it gets its gradient here,
            the column sums of the branch's.

    Returns:
        ``(total, normed)``, both ``[M, C]``. ``total`` has the type that torch gives the sum; without a branch it is
        ``x``.

    Raises:
        ValueError: rows are too wide.
    """
    if x.shape[1] > MAX_WIDTH:
        raise ValueError(f"add_layer_norm: triton takes at most {MAX_WIDTH} columns, got {x.shape[1]}")
    total, normed, _ = add_layer_norm_fwd(x, branch, scale, branch_bias, weight, bias, eps, dtype)
    return x if branch is None else total, normed


@torch.library.custom_op(f"{NAMESPACE}::add_layer_norm_fwd", mutates_args=())
def add_layer_norm_fwd(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum (empty without a branch), its LayerNorm, and mean and reciprocal deviation of its rows ``[2, M]``.

    A result must not be an input, so the sum is not ``x`` where they are equal.
    """
    total, normed, stats = empty_norms(x, branch, scale, branch_bias, weight, bias, eps, dtype)
    num_rows, width = x.shape
    if x.numel() == 0:
        return total, normed, stats
    tile, num_warps = tile_of(width)
    with torch.cuda.device_of(x):
        add_norm_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
            x.contiguous(),
            None if branch is None else branch.contiguous(),
            None if scale is None else scale.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            None if branch is None else total,
            normed,
            stats,
            num_rows,
            eps,
            **tile,
            num_warps=num_warps,
        )
    return total, normed, stats


@torch.library.custom_op(f"{NAMESPACE}::add_layer_norm_bwd", mutates_args=())
def add_layer_norm_bwd(
    total_gradient: Tensor | None,
    normed_gradient: Tensor,
    total: Tensor,
    stats: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the branch (empty if ``branch_dtype`` is None), and of weight, bias and, if
    ``biased``, the bias in the branch, ``[2, C]`` or ``[3, C]`` float32."""
    gradients = empty_norm_gradients(
        total_gradient, normed_gradient, total, stats, weight, scale, x_dtype, branch_dtype, biased
    )
    x_gradient, branch_gradient, sums = gradients
    num_rows, width = total.shape
    if total.numel() == 0:
        return x_gradient, branch_gradient, sums.zero_()
    tile, num_warps = tile_of(width)
    rows_per_run = triton.cdiv(triton.cdiv(num_rows, RUNS), tile["BLOCK_ROWS"]) * tile["BLOCK_ROWS"]
    run_gradients = stats.new_empty(triton.cdiv(num_rows, rows_per_run), *sums.shape)
    with torch.cuda.device_of(total):
        add_norm_gradient_kernel[(len(run_gradients),)](
            None if total_gradient is None else total_gradient.contiguous(),
            normed_gradient.contiguous(),
            total.contiguous(),
            stats,
            weight.contiguous(),
            None if scale is None else scale.contiguous(),
            x_gradient,
            None if branch_dtype is None else branch_gradient,
            run_gradients,
            num_rows,
            rows_per_run,
            SUMS=len(sums),
            **tile,
            num_warps=num_warps,
        )
    return x_gradient, branch_gradient, torch.sum(run_gradients, 0, out=sums)


register_add_layer_norm(add_layer_norm_fwd, add_layer_norm_bwd)


def tile_of(width: int) -> tuple[dict[str, int], int]:
    """Return the constants of a tile of rows, and the warps that share it: at least 16 values per thread."""
    lanes = triton.next_power_of_2(width)
    rows = max(1, TILE // lanes)
    tile = {"WIDTH": width, "LANES": lanes, "BLOCK_ROWS": rows}
    return tile, max(4, rows * lanes // 512)
