"""GELU of a linear layer's output, whose backward also sums the gradient over the rows: that of the layer's bias.

    y = h Phi(h)        dh = dy (Phi(h) + h phi(h))        db = sum_rows dh

Phi and phi are the distribution and the density of the standard normal (Hendrycks & Gimpel, 2016). The forward is
torch's, which already reads and writes every value once. So does this backward, where with torch another pass over dh
gives db. A program owns some columns of a run of rows. It sums these in registers, and runs are summed in order: no
atomics, every run is bit-identical.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..namespace import NAMESPACE
from ..registration import empty_gelu_gradients, register_gelu

BLOCK_ROWS, BLOCK_COLUMNS = 16, 128
PROGRAMS = 528  # about four per multiprocessor


@triton.jit
def gelu_gradient_kernel(
    gradient,  # [M, WIDTH], of the result
    hidden,  # [M, WIDTH]
    hidden_gradient,  # [M, WIDTH]
    run_sums,  # [runs, WIDTH] float32
    num_rows,
    rows_per_run,  # a multiple of BLOCK_ROWS
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program per run of rows and block of columns."""
    run = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    known = column < WIDTH
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, rows_per_run, BLOCK_ROWS):
        row = run * rows_per_run + start + tl.arange(0, BLOCK_ROWS)
        inside = (row < num_rows)[:, None] & known[None, :]
        place = row[:, None] * WIDTH + column[None, :]
        h = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        distribution = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        dh = dy * (distribution + h * density)
        tl.store(hidden_gradient + place, dh.to(hidden_gradient.dtype.element_ty), mask=inside)
        sums += dh
    tl.store(run_sums + run * WIDTH + column, tl.sum(sums, 0), mask=known)


def gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """Return GELU of a linear layer's output.

    Args:
        hidden: ``[M, C]`` float32, float16 or bfloat16; ``bias`` is already added.
        bias: ``[C]``. Its values are not used; it gets its gradient here.

    Returns:
        ``[M, C]`` in the dtype of ``hidden``.
    """
    return gelu_fwd(hidden, bias)


@torch.library.custom_op(f"{NAMESPACE}::gelu_fwd", mutates_args=())
def gelu_fwd(hidden: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(hidden.contiguous())


@torch.library.custom_op(f"{NAMESPACE}::gelu_bwd", mutates_args=())
def gelu_bwd(gradient: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``hidden`` and of the bias, the latter ``[C]`` float32."""
    hidden_gradient, bias_gradient = empty_gelu_gradients(gradient, hidden)
    if hidden.numel() == 0:
        return hidden_gradient, bias_gradient.zero_()
    grid, rows_per_run = runs_of(*hidden.shape)
    run_sums = bias_gradient.new_empty(grid[0], hidden.shape[1])
    with torch.cuda.device_of(hidden):
        gelu_gradient_kernel[grid](
            gradient.contiguous(),
            hidden.contiguous(),
            hidden_gradient,
            run_sums,
            hidden.shape[0],
            rows_per_run,
            WIDTH=hidden.shape[1],
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
        )
    return hidden_gradient, torch.sum(run_sums, 0, out=bias_gradient)


register_gelu(gelu_fwd, gelu_bwd)


def runs_of(rows: int, columns: int) -> tuple[tuple[int, int], int]:
    """Return runs and blocks of columns for about ``PROGRAMS`` programs, and the rows of a run."""
    blocks = triton.cdiv(columns, BLOCK_COLUMNS)
    tiles = triton.cdiv(triton.cdiv(rows, BLOCK_ROWS), max(1, PROGRAMS // blocks))
    return (triton.cdiv(rows, tiles * BLOCK_ROWS), blocks), tiles * BLOCK_ROWS
