"""BatchNorm of a batch, residual addition and ReLU: two passes over the maps forward, two backward.

    y = relu(w (x - mean) rstd + b + r)        rstd = 1 / sqrt(var + eps)

with mean and biased variance per channel over all N values of the batch. With g = dy where y > 0, else 0, the backward
is

    db = sum(g)        s = sum(g (x - mean))        dw = s rstd
    dr = g             dx = w rstd (g - db / N - (x - mean) rstd^2 s / N)

A row is one pixel of one image. A program owns a run of rows of some channels. Sums are taken in registers over a run,
and over the runs in order: no atomics, every run is bit-identical. The variance comes from Welford's updates and is
merged as Chan et al. (1983) do it, so a large mean costs no digits. Where a residual was added, y tells where g is 0;
where none was, x does, and y is not kept.

Several processes can share their statistics: `batch_moments` and `gradient_sums` are each one pass over the maps, and
what they return may be merged over processes before `batch_norm_fwd` and `input_gradient`, the other passes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..namespace import NAMESPACE
from ..registration import dense, empty_batch_gradients, empty_batch_norm, register_batch_norm

TILE = 2048  # values per step of a program
PROGRAMS = 1056  # at most, about eight per multiprocessor
BLOCK_RUNS = 128  # of the kernels that merge runs
MERGED_CHANNELS = 16


@triton.jit
def places(row, channel, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """Where rows and channels lie in a dense map of ``pixels`` pixels."""
    if CHANNELS_LAST:
        return row[:, None] * channels + channel[None, :]
    else:
        image, pixel = row // pixels, row % pixels
        return ((image * channels)[:, None] + channel[None, :]) * pixels + pixel[:, None]


@triton.jit
def run_moments_kernel(
    x,
    run_moments,  # [runs, 3, channels] float32: mean, biased variance and count
    rows,
    pixels,
    channels,
    rows_per_run,  # a multiple of BLOCK_ROWS
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Moments of each run: those of every BLOCK_ROWS-th row by Welford's updates, then merged."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    run = tl.program_id(1).to(tl.int64)
    known = channel < channels
    lane = tl.arange(0, BLOCK_ROWS)
    count = tl.zeros([BLOCK_ROWS], tl.float32)
    mean = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for start in range(0, rows_per_run, BLOCK_ROWS):
        row = run * rows_per_run + start + lane
        given = row < rows
        inside = given[:, None] & known[None, :]
        place = places(row, channel, pixels, channels, CHANNELS_LAST)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        count += given.to(tl.float32)
        away = tl.where(inside, value - mean, 0.0)
        mean += away * (1 / tl.maximum(count, 1.0))[:, None]
        squares += away * (value - mean)

    total = tl.sum(count, 0)
    first = tl.sum(tl.where((lane == 0)[:, None], mean, 0.0), 0)
    merged = first + tl.sum(count[:, None] * (mean - first[None, :]), 0) / total  # differences keep their digits
    away = mean - merged[None, :]
    var = tl.sum(squares + count[:, None] * away * away, 0) / total
    out = run_moments + run * 3 * channels + channel
    tl.store(out, merged, mask=known)
    tl.store(out + channels, var, mask=known)
    tl.store(out + 2 * channels, tl.zeros_like(var) + total, mask=known)


@triton.jit
def merge_moments_kernel(
    run_moments,  # [runs, 3, channels] float32
    moments,  # [3, channels] float32
    running_mean,  # [channels], or None
    running_var,
    num_batches,  # one int64
    runs,
    channels,
    momentum,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Moments of all runs, in order; and the running statistics, with the unbiased variance."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = channel < channels
    first = tl.load(run_moments + channel, mask=known, other=0.0)
    total = tl.zeros([BLOCK_CHANNELS], tl.float32)
    away = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for start in range(0, runs, BLOCK_RUNS):
        run = start + tl.arange(0, BLOCK_RUNS)
        inside = (run < runs)[:, None] & known[None, :]
        place = run_moments + run[:, None] * 3 * channels + channel[None, :]
        count = tl.load(place + 2 * channels, mask=inside, other=0.0)
        total += tl.sum(count, 0)
        away += tl.sum(count * (tl.load(place, mask=inside, other=0.0) - first[None, :]), 0)
    total = tl.maximum(total, 1.0)  # channels that do not exist
    mean = first + away / total
    squares = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for start in range(0, runs, BLOCK_RUNS):
        run = start + tl.arange(0, BLOCK_RUNS)
        inside = (run < runs)[:, None] & known[None, :]
        place = run_moments + run[:, None] * 3 * channels + channel[None, :]
        apart = tl.load(place, mask=inside, other=0.0) - mean[None, :]
        var = tl.load(place + channels, mask=inside, other=0.0)
        squares += tl.sum(tl.load(place + 2 * channels, mask=inside, other=0.0) * (var + apart * apart), 0)
    var = squares / total
    tl.store(moments + channel, mean, mask=known)
    tl.store(moments + channels + channel, var, mask=known)
    tl.store(moments + 2 * channels + channel, total, mask=known)

    if running_mean is not None:
        old = tl.load(running_mean + channel, mask=known, other=0.0).to(tl.float32)
        tl.store(running_mean + channel, old + momentum * (mean - old), mask=known)
        old = tl.load(running_var + channel, mask=known, other=0.0).to(tl.float32)
        unbiased = squares / tl.maximum(total - 1, 1.0)
        tl.store(running_var + channel, old + momentum * (unbiased - old), mask=known)
        if tl.program_id(0) == 0:
            tl.store(num_batches, tl.load(num_batches) + 1)


@triton.jit
def normalising(moments, weight, bias, channel, known, channels, eps):
    """Mean, reciprocal deviation, weight and bias of channels."""
    mean = tl.load(moments + channel, mask=known, other=0.0)
    inverse = 1 / tl.sqrt(tl.load(moments + channels + channel, mask=known, other=1.0) + eps)
    w, b = tl.full(mean.shape, 1.0, tl.float32), tl.zeros_like(mean)
    if weight is not None:
        w = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
        b = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    return mean, inverse, w, b


@triton.jit
def normalise_kernel(
    x,
    residual,  # as x, or None
    moments,  # [3, channels] float32
    weight,  # [channels], or None
    bias,  # [channels], or None
    out,  # as x
    rows,
    pixels,
    channels,
    rows_per_run,
    eps,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    run = tl.program_id(1).to(tl.int64)
    known = channel < channels
    mean, inverse, w, b = normalising(moments, weight, bias, channel, known, channels, eps)
    gain = inverse * w
    for start in range(0, rows_per_run, BLOCK_ROWS):
        row = run * rows_per_run + start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & known[None, :]
        place = places(row, channel, pixels, channels, CHANNELS_LAST)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        value = (value - mean[None, :]) * gain[None, :] + b[None, :]
        if residual is not None:
            value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            value = tl.where(value <= 0, 0.0, value)  # NaN stays NaN
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def run_gradient_sums_kernel(
    gradient,  # of y, as x
    x,
    y,  # as x, or None
    moments,  # [3, channels] float32
    weight,  # [channels], or None
    bias,  # [channels], or None
    masked,  # as x: g, or None
    run_sums,  # [runs, 2, channels] float32: of g, and of g (x - mean)
    rows,
    pixels,
    channels,
    rows_per_run,
    eps,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    run = tl.program_id(1).to(tl.int64)
    known = channel < channels
    mean, inverse, w, b = normalising(moments, weight, bias, channel, known, channels, eps)
    gain = inverse * w
    total = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    along = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for start in range(0, rows_per_run, BLOCK_ROWS):
        row = run * rows_per_run + start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & known[None, :]
        place = places(row, channel, pixels, channels, CHANNELS_LAST)
        away = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        g = tl.load(gradient + place, mask=inside, other=0.0)
        if RELU:
            if y is not None:
                positive = tl.load(y + place, mask=inside, other=0.0) > 0
            else:
                positive = away * gain[None, :] + b[None, :] > 0
            g = tl.where(positive, g, 0.0)
        if masked is not None:
            tl.store(masked + place, g, mask=inside)
        total += g.to(tl.float32)
        along += g.to(tl.float32) * away
    sums = run_sums + run * 2 * channels + channel
    tl.store(sums, tl.sum(total, 0), mask=known)
    tl.store(sums + channels, tl.sum(along, 0), mask=known)


@triton.jit
def merge_gradient_sums_kernel(
    run_sums,  # [runs, 2, channels] float32
    moments,  # [3, channels] float32
    sums,  # [3, channels] float32: of g, of g (x - mean), and the latter by the deviation
    runs,
    channels,
    eps,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = channel < channels
    total = tl.zeros([BLOCK_CHANNELS], tl.float32)
    along = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for start in range(0, runs, BLOCK_RUNS):
        run = start + tl.arange(0, BLOCK_RUNS)
        inside = (run < runs)[:, None] & known[None, :]
        place = run_sums + run[:, None] * 2 * channels + channel[None, :]
        total += tl.sum(tl.load(place, mask=inside, other=0.0), 0)
        along += tl.sum(tl.load(place + channels, mask=inside, other=0.0), 0)
    var = tl.load(moments + channels + channel, mask=known, other=1.0)
    tl.store(sums + channel, total, mask=known)
    tl.store(sums + channels + channel, along, mask=known)
    tl.store(sums + 2 * channels + channel, along / tl.sqrt(var + eps), mask=known)


@triton.jit
def input_gradient_kernel(
    gradient,  # g; or of y if RELU, without a residual
    x,
    moments,  # [3, channels] float32
    weight,  # [channels], or None
    bias,  # [channels], or None
    sums,  # [2 or 3, channels] float32: of g, and of g (x - mean)
    x_gradient,  # as x
    rows,
    pixels,
    channels,
    rows_per_run,
    eps,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    run = tl.program_id(1).to(tl.int64)
    known = channel < channels
    mean, inverse, w, b = normalising(moments, weight, bias, channel, known, channels, eps)
    gain = inverse * w
    count = tl.load(moments + 2 * channels + channel, mask=known, other=1.0)
    share = tl.where(count > 1, 1 / count, 0.0)  # a single value was normalised by statistics that it did not change
    level = tl.load(sums + channel, mask=known, other=0.0) * share
    slope = tl.load(sums + channels + channel, mask=known, other=0.0) * share * inverse * inverse
    for start in range(0, rows_per_run, BLOCK_ROWS):
        row = run * rows_per_run + start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & known[None, :]
        place = places(row, channel, pixels, channels, CHANNELS_LAST)
        away = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(away * gain[None, :] + b[None, :] > 0, g, 0.0)
        dx = (g - level[None, :] - away * slope[None, :]) * gain[None, :]
        tl.store(x_gradient + place, dx.to(x_gradient.dtype.element_ty), mask=inside)


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """Normalise ``x`` by its own statistics, add ``residual``, and cut negative values to 0 if ``relu``.

    Args:
        x: ``[N, C]`` or ``[N, C, h, w]`` float32, float16 or bfloat16, with at least two values per channel.
        residual: as ``x``, or None.
        weight, bias: ``[C]``, or both None.
        running_mean, running_var: ``[C]``, changed in place as by torch's BatchNorm, or all three None.
        num_batches: one int64, incremented in place.

    Returns:
        As ``x``, in its layout if that has no gaps, and in the dtype that torch gives the sum.
    """
    moments = batch_moments(x.detach(), running_mean, running_var, num_batches, momentum)
    return batch_norm_fwd(x, residual, moments, weight, bias, eps, relu)


@torch.library.custom_op(f"{NAMESPACE}::batch_moments", mutates_args=("running_mean", "running_var", "num_batches"))
def batch_moments(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
    momentum: float,
) -> Tensor:
    """Mean, biased variance and number of values per channel, ``[3, C]`` float32; update running statistics if given.

    Without values all three are 0.
    """
    moments = x.new_empty(3, x.shape[1], dtype=torch.float32)
    if x.numel() == 0:
        return moments.zero_()
    x = dense(x)
    walk = walk_over(x)
    run_moments = moments.new_empty(walk.runs, *moments.shape)
    with torch.cuda.device_of(x):
        run_moments_kernel[walk.grid](x, run_moments, *walk.sizes, **walk.tile)
        merge_moments_kernel[(triton.cdiv(x.shape[1], MERGED_CHANNELS),)](
            run_moments,
            moments,
            running_mean,
            running_var,
            num_batches,
            walk.runs,
            x.shape[1],
            momentum,
            BLOCK_RUNS,
            MERGED_CHANNELS,
        )
    return moments


@batch_moments.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(3, x.shape[1], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::batch_norm_fwd", mutates_args=())
def batch_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """Normalise by ``moments [3, C]``, add, cut. The gradient takes them for the moments of ``x``, which follow it."""
    out = empty_batch_norm(x, residual, moments, weight, bias, eps, relu)
    if x.numel() == 0:
        return out
    x = dense(x)
    walk = walk_over(x)
    with torch.cuda.device_of(x):
        normalise_kernel[walk.grid](
            x, laid_out_as(x, residual), moments, weight, bias, out, *walk.sizes, eps, relu, **walk.tile
        )
    return out


@torch.library.custom_op(f"{NAMESPACE}::batch_norm_bwd", mutates_args=())
def batch_norm_bwd(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, and, given ``y``, of the residual (else empty); and the sums of `gradient_sums`."""
    gradient, masked, sums = gradient_sums(gradient, x, y, moments, weight, bias, eps, relu)
    x_gradient = input_gradient(gradient, x, moments, weight, bias, sums, eps, relu and y is None)
    return x_gradient, masked, sums


def gradient_sums(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first pass of the backward.

    Args:
        y: the result, if a residual was added before ReLU; else None.

    Returns:
        What `input_gradient` reads: given ``y``, the gradient before ReLU, else ``gradient`` itself; the gradient
        before ReLU given ``y``, else empty; and its sums ``[3, C]`` float32: by itself (gradient of the bias), times
        ``x - mean``, and the latter divided by the deviation (gradient of the weight).
    """
    _, masked, sums = empty_batch_gradients(gradient, x, y, moments, weight, bias, eps, relu)
    if x.numel() == 0:
        return gradient, masked, sums.zero_()
    x = dense(x)
    gradient, walk = laid_out_as(x, gradient), walk_over(x)
    run_sums = sums.new_empty(walk.runs, 2, x.shape[1])
    with torch.cuda.device_of(x):
        run_gradient_sums_kernel[walk.grid](
            gradient,
            x,
            laid_out_as(x, y),
            moments,
            weight,
            bias,
            None if y is None else masked,
            run_sums,
            *walk.sizes,
            eps,
            relu,
            **walk.tile,
        )
        merge_gradient_sums_kernel[(triton.cdiv(x.shape[1], MERGED_CHANNELS),)](
            run_sums, moments, sums, walk.runs, x.shape[1], eps, BLOCK_RUNS, MERGED_CHANNELS
        )
    return gradient if y is None else masked, masked, sums


def input_gradient(
    gradient: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """The second pass of the backward: the gradient of x, in its layout and dtype.

    Args:
        gradient: what `gradient_sums` returned, in the layout of ``x``.
        moments: mean and variance that normalised x, and how many values they are of (``sums`` count only if several).
        sums: ``[2 or 3, C]``, as of `gradient_sums`, over all these values.
        relu: whether ``gradient`` is the one after a ReLU before which no residual was added.
    """
    x = dense(x)
    x_gradient = torch.empty_like(x)
    if x.numel():
        walk = walk_over(x)
        with torch.cuda.device_of(x):
            input_gradient_kernel[walk.grid](
                gradient, x, moments, weight, bias, sums, x_gradient, *walk.sizes, eps, relu, **walk.tile
            )
    return x_gradient


register_batch_norm(batch_norm_fwd, batch_norm_bwd)


class Walk(NamedTuple):
    """How programs share the rows and channels of a dense map."""

    grid: tuple[int, int]
    runs: int
    sizes: tuple[int, int, int, int]  # rows, pixels, channels, rows_per_run
    tile: dict[str, Any]


def walk_over(x: Tensor) -> Walk:
    channels = x.shape[1]
    rows = x.numel() // channels
    block_channels = 64 if channels % 64 == 0 else 32
    block_rows = TILE // block_channels
    blocks = triton.cdiv(channels, block_channels)
    rows_per_run = triton.cdiv(triton.cdiv(rows * blocks, PROGRAMS), block_rows) * block_rows
    runs = triton.cdiv(rows, rows_per_run)
    tile = {
        "BLOCK_ROWS": block_rows,
        "BLOCK_CHANNELS": block_channels,
        "CHANNELS_LAST": x.dim() == 2 or x.is_contiguous(memory_format=torch.channels_last),
    }
    return Walk((blocks, runs), runs, (rows, rows // x.shape[0], channels, rows_per_run), tile)


def laid_out_as(x: Tensor, other: Tensor | None) -> Tensor | None:
    """``other`` in the layout of ``x``, which is dense."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return (
        other if other is None else other.contiguous(memory_format=[torch.contiguous_format, torch.channels_last][last])
    )
