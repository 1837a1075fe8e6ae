"""Mean and variance of a 1x1 convolution whose output is never stored: the statistics of the BatchNorm after it.

With y_p = W x_p at each of M positions, and a, b the gradients of mean and variance,

    mean = 1/M sum_p y_p                    var = 1/M sum_p (y_p - mean)^2
    dy_p = (a + 2 b (y_p - mean)) / M       dx_p = W^T dy_p       dW = sum_p dy_p x_p^T

A program projects a tile of positions on the tensor cores and keeps only the mean and the squares around that mean;
tiles are merged in order by the rule of Chan, Golub and LeVeque (1979), so that a mean far larger than the deviation
does not cost digits. The backward recomputes the projection. dx has one writer per entry; dW is summed over long runs
of tiles in registers, and over the runs in order: no atomics, every run is bit-identical.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocked import projection_stats as blocked
from ..blocked.projection_stats import positions_of
from ..namespace import NAMESPACE
from ..registration import dense, empty_statistics, register_projection_stats
from .dot import dot

MAX_OUTPUTS = 256  # the most per tile of positions that fit in registers
BLOCK_OUTPUTS, BLOCK_COLUMNS = 64, 128
STATISTICS_RUNS = 1024  # about eight programs per multiprocessor
WEIGHT_GRADIENT_PROGRAMS = 256  # about two per multiprocessor; each stores 32 KB of partial sums


@triton.jit
def project(
    rows,  # [positions of the tile]: pointers to their first channels
    inside,  # [positions of the tile]
    weight,  # [outputs, channels], contiguous
    output,  # [outputs of the tile]: their indices
    channel_stride,
    NUM_CHANNELS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Return y of one tile, ``[positions, outputs]`` float32; zero outside."""
    y = tl.zeros([rows.shape[0], output.shape[0]], tl.float32)
    for start in range(0, NUM_CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        known = channel < NUM_CHANNELS
        x = tl.load(rows[:, None] + channel[None, :] * channel_stride, mask=inside[:, None] & known[None, :], other=0.0)
        w = tl.load(
            weight + output[None, :] * NUM_CHANNELS + channel[:, None],
            mask=known[:, None] & (output < NUM_OUTPUTS)[None, :],
            other=0.0,
        )
        y = dot(x, w, y)
    return y


@triton.jit
def y_gradient(y, output, mean, mean_gradient, var_gradient, NUM_OUTPUTS: tl.constexpr):
    """Return M times the gradient of the tile ``y``: dividing by M last avoids underflow in float16."""
    known = output < NUM_OUTPUTS
    offset = tl.load(mean_gradient + output, mask=known, other=0.0)
    slope = 2 * tl.load(var_gradient + output, mask=known, other=0.0)
    center = tl.load(mean + output, mask=known, other=0.0)
    return offset[None, :] + slope[None, :] * (y - center[None, :])


@triton.jit
def locate(x, tile, num_positions, image_stride, position_stride, BLOCK_POSITIONS: tl.constexpr):
    """Return pointers to the positions of a tile, and which are inside the image. A tile never spans two images."""
    tiles_per_image = tl.cdiv(num_positions, BLOCK_POSITIONS)
    image = (tile // tiles_per_image).to(tl.int64)
    position = (tile % tiles_per_image).to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    return x + image * image_stride + position * position_stride, position < num_positions


@triton.jit
def run_stats_kernel(
    x,  # [images, positions, channels], strided
    weight,  # [outputs, channels]
    run_counts,  # [runs] float32
    run_means,  # [runs, outputs] float32
    run_squares,  # [runs, outputs] float32, summed around the mean of the run
    num_positions,  # of an image
    num_tiles,
    tiles_per_run,
    image_stride,
    position_stride,
    channel_stride,
    NUM_CHANNELS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program per run of tiles and block of outputs."""
    run = tl.program_id(0)
    output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    count = 0.0
    mean = tl.zeros([BLOCK_OUTPUTS], tl.float32)
    squares = tl.zeros([BLOCK_OUTPUTS], tl.float32)
    for tile in range(run * tiles_per_run, tl.minimum((run + 1) * tiles_per_run, num_tiles)):
        rows, inside = locate(x, tile, num_positions, image_stride, position_stride, BLOCK_POSITIONS)
        y = project(rows, inside, weight, output, channel_stride, NUM_CHANNELS, NUM_OUTPUTS, BLOCK_CHANNELS)
        tile_count = tl.sum(inside.to(tl.float32), 0)
        tile_mean = tl.sum(y, 0) / tile_count
        centred = tl.where(inside[:, None], y - tile_mean[None, :], 0.0)
        share = tile_count / (count + tile_count)
        shift = tile_mean - mean
        squares += tl.sum(centred * centred, 0) + count * share * shift * shift
        mean += share * shift
        count += tile_count
    place = run * NUM_OUTPUTS + output
    tl.store(run_counts + run, count)
    tl.store(run_means + place, mean, mask=output < NUM_OUTPUTS)
    tl.store(run_squares + place, squares, mask=output < NUM_OUTPUTS)


@triton.jit
def join_runs_kernel(
    run_counts,  # [runs] float32
    run_means,  # [runs, outputs] float32
    run_squares,  # [runs, outputs] float32
    mean,  # [outputs] float32
    var,  # [outputs] float32
    num_runs,
    NUM_OUTPUTS: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
):
    """One program per block of outputs, in two passes over the runs: their mean, then squares around that mean."""
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    known = output < NUM_OUTPUTS
    count = 0.0
    total = tl.zeros([BLOCK_OUTPUTS], tl.float32)
    for start in range(0, num_runs, BLOCK_RUNS):
        run = start + tl.arange(0, BLOCK_RUNS)
        place, there = run[:, None] * NUM_OUTPUTS + output[None, :], (run < num_runs)[:, None] & known[None, :]
        run_count = tl.load(run_counts + run, mask=run < num_runs, other=0.0)
        count += tl.sum(run_count, 0)
        total += tl.sum(run_count[:, None] * tl.load(run_means + place, mask=there, other=0.0), 0)
    center = total / count
    squares = tl.zeros([BLOCK_OUTPUTS], tl.float32)
    for start in range(0, num_runs, BLOCK_RUNS):
        run = start + tl.arange(0, BLOCK_RUNS)
        place, there = run[:, None] * NUM_OUTPUTS + output[None, :], (run < num_runs)[:, None] & known[None, :]
        run_count = tl.load(run_counts + run, mask=run < num_runs, other=0.0)
        shift = tl.load(run_means + place, mask=there, other=0.0) - center[None, :]
        inner = tl.load(run_squares + place, mask=there, other=0.0)
        squares += tl.sum(inner + run_count[:, None] * shift * shift, 0)
    tl.store(mean + output, center, mask=known)
    tl.store(var + output, squares / count, mask=known)


@triton.jit
def x_gradient_kernel(
    x,  # [images, positions, channels], strided
    weight,  # [outputs, channels]
    mean,  # [outputs] float32
    mean_gradient,  # [outputs] float32
    var_gradient,  # [outputs] float32
    gradient,  # [images, positions, channels], strides of x
    num_positions,  # of an image
    inverse_count,  # 1 / M
    image_stride,
    position_stride,
    channel_stride,
    NUM_CHANNELS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program per tile."""
    tile = tl.program_id(0)
    output = tl.arange(0, BLOCK_OUTPUTS)
    rows, inside = locate(x, tile, num_positions, image_stride, position_stride, BLOCK_POSITIONS)
    y = project(rows, inside, weight, output, channel_stride, NUM_CHANNELS, NUM_OUTPUTS, BLOCK_CHANNELS)
    dy = y_gradient(y, output, mean, mean_gradient, var_gradient, NUM_OUTPUTS)
    rows, inside = locate(gradient, tile, num_positions, image_stride, position_stride, BLOCK_POSITIONS)
    for start in range(0, NUM_CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        known = channel < NUM_CHANNELS
        w = tl.load(
            weight + output[:, None] * NUM_CHANNELS + channel[None, :],
            mask=(output < NUM_OUTPUTS)[:, None] & known[None, :],
            other=0.0,
        )
        dx = dot(dy, w, tl.zeros([BLOCK_POSITIONS, BLOCK_CHANNELS], tl.float32)) * inverse_count
        tl.store(
            rows[:, None] + channel[None, :] * channel_stride,
            dx.to(gradient.dtype.element_ty),
            mask=inside[:, None] & known[None, :],
        )


@triton.jit
def weight_gradient_kernel(
    x,  # [images, positions, channels], strided
    weight,  # [outputs, channels]
    mean,  # [outputs] float32
    mean_gradient,  # [outputs] float32
    var_gradient,  # [outputs] float32
    run_gradients,  # [runs, outputs, channels] float32
    num_positions,  # of an image
    num_tiles,
    tiles_per_run,
    inverse_count,  # 1 / M
    image_stride,
    position_stride,
    channel_stride,
    NUM_CHANNELS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program per run of tiles, block of outputs, and block of columns of the weight."""
    run = tl.program_id(0)
    output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    column = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_COLUMNS], tl.float32)
    for tile in range(run * tiles_per_run, tl.minimum((run + 1) * tiles_per_run, num_tiles)):
        rows, inside = locate(x, tile, num_positions, image_stride, position_stride, BLOCK_POSITIONS)
        y = project(rows, inside, weight, output, channel_stride, NUM_CHANNELS, NUM_OUTPUTS, BLOCK_CHANNELS)
        dy = y_gradient(y, output, mean, mean_gradient, var_gradient, NUM_OUTPUTS)
        columns_of_x = tl.load(
            rows[:, None] + column[None, :] * channel_stride,
            mask=inside[:, None] & (column < NUM_CHANNELS)[None, :],
            other=0.0,  # positions outside add nothing
        )
        total = dot(tl.trans(dy), columns_of_x, total)
    tl.store(
        run_gradients + (run * NUM_OUTPUTS + output[:, None]) * NUM_CHANNELS + column[None, :],
        total * inverse_count,
        mask=(output < NUM_OUTPUTS)[:, None] & (column < NUM_CHANNELS)[None, :],
    )


def projection_stats(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance ``[o]`` of ``weight @ x`` over all images and pixels, float32.

    Args:
        x: ``[I, c, h, w]`` float32, float16 or bfloat16, with at least one position; NCHW or channels-last.
        weight: ``[o, c]`` in the dtype of ``x``; ``blocked.projection_stats`` handles more than 256 outputs.
    """
    if weight.shape[0] > MAX_OUTPUTS:
        return blocked.projection_stats(x, weight)
    return projection_stats_fwd(x, weight)


@torch.library.custom_op(f"{NAMESPACE}::projection_stats_fwd", mutates_args=())
def projection_stats_fwd(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    positions, weight = positions_of(dense(x)), weight.contiguous()
    num_outputs = weight.shape[0]
    tile = tile_of(weight)
    num_tiles = count_tiles(positions, tile)
    num_runs, tiles_per_run = split(num_tiles, STATISTICS_RUNS)
    mean, var = empty_statistics(x, weight)
    run_counts = mean.new_empty(num_runs)
    run_means, run_squares = mean.new_empty(num_runs, num_outputs), mean.new_empty(num_runs, num_outputs)
    with torch.cuda.device_of(x):
        run_stats_kernel[(num_runs, triton.cdiv(num_outputs, BLOCK_OUTPUTS))](
            positions,
            weight,
            run_counts,
            run_means,
            run_squares,
            positions.shape[1],
            num_tiles,
            tiles_per_run,
            *positions.stride(),
            **tile,
            BLOCK_OUTPUTS=BLOCK_OUTPUTS,
            num_warps=8,
        )
        join_runs_kernel[(triton.cdiv(num_outputs, 16),)](
            run_counts, run_means, run_squares, mean, var, num_runs, num_outputs, BLOCK_RUNS=64, BLOCK_OUTPUTS=16
        )
    return mean, var


@torch.library.custom_op(f"{NAMESPACE}::projection_stats_bwd", mutates_args=())
def projection_stats_bwd(
    mean_gradient: Tensor, var_gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x``, in its layout, and of ``weight``."""
    x, weight = dense(x), weight.contiguous()
    positions = positions_of(x)
    tile = tile_of(weight)
    num_tiles, inverse_count = count_tiles(positions, tile), 1 / positions.shape[:2].numel()
    blocks = triton.cdiv(weight.shape[0], BLOCK_OUTPUTS), triton.cdiv(weight.shape[1], BLOCK_COLUMNS)
    num_runs, tiles_per_run = split(num_tiles, max(1, WEIGHT_GRADIENT_PROGRAMS // math.prod(blocks)))

    statistics = mean, mean_gradient.contiguous(), var_gradient.contiguous()
    x_gradient, run_gradients = torch.empty_like(x), mean.new_empty(num_runs, *weight.shape)
    with torch.cuda.device_of(x):
        x_gradient_kernel[(num_tiles,)](
            positions,
            weight,
            *statistics,
            x_gradient,
            positions.shape[1],
            inverse_count,
            *positions.stride(),
            **tile,
            BLOCK_OUTPUTS=all_outputs(weight),
            num_warps=8,
            num_stages=2,
        )
        weight_gradient_kernel[(num_runs, *blocks)](
            positions,
            weight,
            *statistics,
            run_gradients,
            positions.shape[1],
            num_tiles,
            tiles_per_run,
            inverse_count,
            *positions.stride(),
            **tile,
            BLOCK_OUTPUTS=BLOCK_OUTPUTS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=8,
        )
    return x_gradient, run_gradients.sum(0).to(weight.dtype)


register_projection_stats(projection_stats_fwd, projection_stats_bwd)


def tile_of(weight: Tensor) -> dict[str, int]:
    """Return the constants that all kernels share; float32 does not use tensor cores, and halves the tile."""
    return {
        "NUM_CHANNELS": weight.shape[1],
        "NUM_OUTPUTS": weight.shape[0],
        "BLOCK_POSITIONS": 128 // weight.element_size(),
        "BLOCK_CHANNELS": 64 // weight.element_size(),
    }


def all_outputs(weight: Tensor) -> int:
    return max(16, triton.next_power_of_2(weight.shape[0]))


def count_tiles(positions: Tensor, tile: dict[str, int]) -> int:
    num_images, num_positions, _ = positions.shape
    return num_images * triton.cdiv(num_positions, tile["BLOCK_POSITIONS"])


def split(num_tiles: int, at_most: int) -> tuple[int, int]:
    """Split the tiles into non-empty runs: return the number of runs, and of tiles in each run but the last."""
    tiles_per_run = triton.cdiv(num_tiles, at_most)
    return triton.cdiv(num_tiles, tiles_per_run), tiles_per_run
