"""Rows of the unified map at the nuclei, read straight from the levels that the map would be made of, and the gradient.

Upsampling and sampling are linear, axis by axis. A point at position u lies between the fine pixels q = floor(u) and
q + 1, which it weighs 1 - s and s with s = u - q. Upsampling puts fine pixel q at q r among the pixels of a level, with
r = (coarse - 1) / (fine - 1). So pixel j of the level has the weight

    (1 - s) hat(q r - j) + s hat((q + 1) r - j),    hat(t) = max(0, 1 - |t|)

along this axis: nonzero for at most four j (three, where the level is the coarser). A pixel's weight is the product of
its two axes'. q r is computed in integers, u in float64: float32 would blur the weights of a wide map.

Forward: a program reads some channels of some points. Backward: a program owns some channels of some pixels of an image
and multiplies the weights of that image's points, chunk by chunk, with their gradients. Every pixel is written once and
in the type of the levels: no atomics, no zeroed float32 copy, the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..namespace import NAMESPACE
from ..registration import empty_gradients, empty_rows, register_sample_nuclei

TAPS = tl.constexpr(4)  # pixels of a level that a point weighs along one axis, at most
BLOCK_CHANNELS = 32
BLOCK_POINTS = 8  # of the forward
BLOCK_PIXELS = 64  # of the backward
CHUNK = 16  # points that the backward takes at a time, no fewer than a matrix product takes


@triton.jit
def position(x, view_size, fine):
    """Where pixel x of the view lies among the fine pixels along an axis."""
    return tl.minimum(tl.maximum(x.to(tl.float64) / view_size * (fine - 1), 0.0), fine - 1.0)


@triton.jit
def place(fine_pixel, fine, coarse):
    """Where a fine pixel lies in a level: the pixel before it, and how far beyond that one, in 0..1."""
    span = tl.maximum(fine - 1, 1)
    steps = fine_pixel * (coarse - 1)
    return steps // span, (steps % span).to(tl.float32) / span


@triton.jit
def support(u, fine, coarse):
    """What a point at u stands on along an axis: the places of fine pixels q and q + 1, and s."""
    q = u.to(tl.int32)
    left, left_share = place(q, fine, coarse)
    right, right_share = place(q + 1, fine, coarse)
    return left, left_share, right, right_share, (u - q).to(tl.float32)


@triton.jit
def tap_pixel(of_point, tap):
    """For tap in 0..TAPS - 1 different pixels, among them all those of nonzero weight."""
    left, _, right, _, _ = of_point
    return tap + tl.where(tap < 2, left, tl.maximum(right - 2, left))


@triton.jit
def weight(of_point, pixel):
    """The weight of a level's pixel along an axis."""
    left, left_share, right, right_share, s = of_point
    of_left = tl.maximum(1 - tl.abs((left - pixel).to(tl.float32) + left_share), 0.0)
    of_right = tl.maximum(1 - tl.abs((right - pixel).to(tl.float32) + right_share), 0.0)
    return of_left * (1 - s) + of_right * s


@triton.jit
def sample_kernel(
    level,  # [I, c, h, w], of any strides
    xy,  # [N, 2]
    image_index,  # [N] int64
    rows,  # [N, c], rows may lie apart
    num_points,
    view_size,
    fine_height,
    fine_width,
    channels,
    height,
    width,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    rows_stride,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POINTS: tl.constexpr,
):
    """One program per block of points and block of channels."""
    point = tl.program_id(0).to(tl.int64) * BLOCK_POINTS + tl.arange(0, BLOCK_POINTS)
    given = point < num_points
    image = tl.load(image_index + point, mask=given, other=-1)
    u = position(tl.load(xy + point * 2, mask=given, other=0.0), view_size, fine_width)
    v = position(tl.load(xy + point * 2 + 1, mask=given, other=0.0), view_size, fine_height)
    across, down = support(u[:, None], fine_width, width), support(v[:, None], fine_height, height)

    tap = tl.arange(0, TAPS * TAPS)[None, :]
    x, y = tap_pixel(across, tap % TAPS), tap_pixel(down, tap // TAPS)
    tap_weight = tl.where(image[:, None] >= 0, weight(across, x) * weight(down, y), 0.0)
    offset = image[:, None] * image_stride + y.to(tl.int64) * row_stride + x.to(tl.int64) * column_stride

    channel = tl.program_id(1).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    values = tl.load(
        level + offset[:, :, None] + (channel * channel_stride)[None, None, :],
        mask=(tap_weight > 0)[:, :, None] & inside[None, None, :],
        other=0.0,
    )
    row = tl.sum(tap_weight[:, :, None] * values.to(tl.float32), 1)
    tl.store(
        rows + point[:, None] * rows_stride + channel[None, :],
        row.to(rows.dtype.element_ty),
        mask=given[:, None] & inside[None, :],
    )


@triton.jit
def gradient_kernel(
    rows_gradient,  # [N, c], rows may lie apart
    xy,  # [N, 2]
    points,  # [N] int64: those of one image next to each other, from its top to its bottom
    first_point,  # [I + 1] int64: points[first_point[i] : first_point[i + 1]] are those of image i
    gradient,  # [I, c, h, w], contiguous or channels-last
    view_size,
    fine_height,
    fine_width,
    channels,
    height,
    width,
    pixels,  # height * width: given, so that Triton learns what it is divisible by
    image_stride,
    channel_stride,
    pixel_stride,
    rows_stride,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per image, block of pixels and block of channels. A gradient that is not finite spoils its blocks."""
    blocks = tl.cdiv(pixels, BLOCK_PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK_PIXELS
    first_row, last_row = first // width, (first + BLOCK_PIXELS - 1) // width
    pixel = first + tl.arange(0, BLOCK_PIXELS)
    x, y = pixel % width, pixel // width
    channel = tl.program_id(1).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels

    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    start, stop = tl.load(first_point + image), tl.load(first_point + image + 1)
    while start < stop:
        number = start + tl.arange(0, CHUNK)
        taken = number < stop
        point = tl.load(points + number, mask=taken, other=0)
        v = position(tl.load(xy + point * 2 + 1, mask=taken, other=0.0), view_size, fine_height)
        down = support(v[None, :], fine_height, height)
        top, _, bottom, _, _ = down
        meets = taken[None, :] & (top <= last_row) & (bottom + 1 >= first_row)
        if tl.max(meets.to(tl.int32)) > 0:
            u = position(tl.load(xy + point * 2, mask=taken, other=0.0), view_size, fine_width)
            across = support(u[None, :], fine_width, width)
            weights = weight(across, x[:, None]) * weight(down, y[:, None])
            values = tl.load(
                rows_gradient + point[:, None] * rows_stride + channel[None, :],
                mask=taken[:, None] & inside[None, :],
                other=0.0,
            )
            total = tl.dot(weights, values.to(tl.float32), total, input_precision=PRECISION)
        start += CHUNK

    tl.store(
        gradient
        + image * image_stride
        + pixel.to(tl.int64)[:, None] * pixel_stride
        + channel[None, :] * channel_stride,
        total.to(gradient.dtype.element_ty),
        mask=(pixel < pixels)[:, None] & inside[None, :],
    )


def sample_nuclei(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    """``bilinear(cat(upsample(levels)), xy)`` without the map, with a gradient for the levels.

    Args:
        levels: ``[I, c_l, h_l, w_l]`` float32, float16 or bfloat16, all of one dtype, with any strides. All are resized
            to level 0 bilinearly with corners aligned.
        xy: ``[N, 2]``, pixels of the view; (x, y) stands at column ``x / view_size * (W - 1)`` and row
            ``y / view_size * (H - 1)`` of level 0. Points outside are moved onto the border.
        image_index: ``[N]`` int64, the image of each point, which must exist (not checked), or negative: a point of
            padding, whose row is zero and has no gradient.
        view_size: pixels along a side of the view.

    Returns:
        ``[N, sum(c_l)]`` in the dtype of the levels.
    """
    return sample_nuclei_fwd(levels, xy.detach(), image_index, view_size)


@torch.library.custom_op(f"{NAMESPACE}::sample_nuclei_fwd", mutates_args=())
def sample_nuclei_fwd(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    rows = empty_rows(levels, xy, image_index, view_size)
    xy, image_index = xy.contiguous(), image_index.contiguous()
    for level, columns in zip(levels, rows.split([level.shape[1] for level in levels], dim=1), strict=True):
        grid = (triton.cdiv(len(rows), BLOCK_POINTS), triton.cdiv(level.shape[1], BLOCK_CHANNELS))
        if 0 not in grid:
            with torch.cuda.device_of(level):
                sample_kernel[grid](
                    level,
                    xy,
                    image_index,
                    columns,
                    len(rows),
                    view_size,
                    *levels[0].shape[2:],
                    *level.shape[1:],
                    *level.stride(),
                    columns.stride(0),
                    BLOCK_CHANNELS=BLOCK_CHANNELS,
                    BLOCK_POINTS=BLOCK_POINTS,
                )
    return rows


@torch.library.custom_op(f"{NAMESPACE}::sample_nuclei_bwd", mutates_args=())
def sample_nuclei_bwd(
    gradient: Tensor,
    xy: Tensor,
    image_index: Tensor,
    view_size: int,
    num_images: int,
    shapes: Sequence[int],
    channels_last: bool,
) -> list[Tensor]:
    gradients = empty_gradients(gradient, xy, image_index, view_size, num_images, shapes, channels_last)
    gradient, xy = gradient.contiguous(), xy.contiguous()
    points, first_point = group_by_image(xy, image_index, view_size, num_images)
    for level, columns in zip(gradients, gradient.split(shapes[::3], dim=1), strict=True):
        channels, height, width = level.shape[1:]
        blocks = triton.cdiv(height * width, BLOCK_PIXELS)
        grid = (num_images * blocks, triton.cdiv(channels, BLOCK_CHANNELS))
        if 0 not in grid:
            with torch.cuda.device_of(level):
                gradient_kernel[grid](
                    columns,
                    xy,
                    points,
                    first_point,
                    level,
                    view_size,
                    *gradients[0].shape[2:],
                    channels,
                    height,
                    width,
                    height * width,
                    level.stride(0),
                    level.stride(1),
                    level.stride(3),
                    columns.stride(0),
                    BLOCK_CHANNELS=BLOCK_CHANNELS,
                    BLOCK_PIXELS=BLOCK_PIXELS,
                    CHUNK=CHUNK,
                    # Exact products either way: what has 16 bits loses none as three tf32.
                    PRECISION="tf32x3" if gradient.itemsize == 2 else "ieee",
                )
    return gradients


register_sample_nuclei(sample_nuclei_fwd, sample_nuclei_bwd)


def group_by_image(xy: Tensor, image_index: Tensor, view_size: int, num_images: int) -> tuple[Tensor, Tensor]:
    """The points by image and from top to bottom, so that a block of pixels meets few chunks of them; and the first of
    every image in that order, ``[num_images + 1]``. Padding is in no image."""
    height = (xy[:, 1].double() / view_size).clamp(0, 0.999)
    ordered, points = (image_index + height).sort(stable=True)
    images = torch.arange(num_images + 1, dtype=ordered.dtype, device=ordered.device)
    return points, torch.searchsorted(ordered, images)
