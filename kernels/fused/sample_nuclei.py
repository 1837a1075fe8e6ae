"""Rows of the unified map at the nuclei, read directly from the levels without building the map, and their gradient.

Upsampling and sampling are linear, axis by axis. A point at position u lies between the fine pixels q = floor(u) and
q + 1, with weights 1 - s and s, where s = u - q. Upsampling puts fine pixel q at position q r of a level, with
r = (coarse - 1) / (fine - 1). So pixel j of the level has the weight

    (1 - s) hat(q r - j) + s hat((q + 1) r - j),    hat(t) = max(0, 1 - |t|)

along this axis: nonzero for at most four j (three, if the level is coarser). A pixel's weight is the product of its
weights along both axes. q r is computed in integers and u in float64: float32 would blur the weights of a wide map.

Forward: a program reads some channels of some points. Backward: a program owns some channels of some pixels of an image
and multiplies the weights of that image's points, chunk by chunk, with their gradients. Every pixel is written once, in
the dtype of the levels: no atomics, no zeroed float32 copy, every run is bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..namespace import NAMESPACE
from ..registration import empty_gradients, empty_rows, register_sample_nuclei

TAPS = tl.constexpr(4)  # the most pixels of a level that a point depends on along one axis
BLOCK_CHANNELS = 32
BLOCK_POINTS = 8  # in the forward
BLOCK_PIXELS = 64  # in the backward
CHUNK = 16  # points per step of the backward; tl.dot needs at least 16
STRIPES = 1024  # of a view, by which its points are sorted from top to bottom


@triton.jit
def position(x, view_size, fine):
    """Position of the view's pixel x in fine pixels along an axis."""
    return tl.minimum(tl.maximum(x.to(tl.float64) / view_size * (fine - 1), 0.0), fine - 1.0)


@triton.jit
def place(fine_pixel, fine, coarse):
    """Position of a fine pixel in a level: the pixel before it, and the fraction beyond that one, in 0..1."""
    span = tl.maximum(fine - 1, 1)
    steps = fine_pixel * (coarse - 1)
    return steps // span, (steps % span).to(tl.float32) / span


@triton.jit
def support(u, fine, coarse):
    """Positions in a level of the fine pixels q and q + 1 around a point at u along an axis, and s."""
    q = u.to(tl.int32)
    left, left_share = place(q, fine, coarse)
    right, right_share = place(q + 1, fine, coarse)
    return left, left_share, right, right_share, (u - q).to(tl.float32)


@triton.jit
def tap_pixel(of_point, tap):
    """Pixel of a tap in 0..TAPS - 1: all different, and including all pixels of nonzero weight."""
    left, _, right, _, _ = of_point
    return tap + tl.where(tap < 2, left, tl.maximum(right - 2, left))


@triton.jit
def weight(of_point, pixel):
    """Weight of a level's pixel along an axis."""
    left, left_share, right, right_share, s = of_point
    of_left = tl.maximum(1 - tl.abs((left - pixel).to(tl.float32) + left_share), 0.0)
    of_right = tl.maximum(1 - tl.abs((right - pixel).to(tl.float32) + right_share), 0.0)
    return of_left * (1 - s) + of_right * s


@triton.jit
def sample_kernel(
    level,  # [I, c, h, w], with any strides
    xy,  # [N, 2]
    image_index,  # [N] int64
    rows,  # [N, c], rows may be strided
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
    rows_gradient,  # [N, c], rows may be strided
    xy,  # [N, 2]
    points,  # [N] int64: the points, sorted by image and from top to bottom
    first_point,  # [I + 1] int64: image i has points[first_point[i] : first_point[i + 1]]
    gradient,  # [I, c, h, w], contiguous or channels-last
    view_size,
    fine_height,
    fine_width,
    channels,
    height,
    width,
    pixels,  # height * width: an argument, so that Triton can specialise on its divisibility
    image_stride,
    channel_stride,
    pixel_stride,
    rows_stride,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per image, block of pixels and block of channels. A non-finite gradient spoils its whole blocks."""
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
    """Compute ``bilinear(cat(upsample(levels)), xy)`` without building the map, with a gradient for the levels.

    Args:
        levels: ``[I, c_l, h_l, w_l]`` float32, float16 or bfloat16, all of one dtype, with any strides. All are resized
            to level 0 bilinearly with corners aligned.
        xy: ``[N, 2]``, pixels of the view; (x, y) is at column ``x / view_size * (W - 1)`` and row
            ``y / view_size * (H - 1)`` of level 0. Points outside are moved onto the border.
        image_index: ``[N]`` int64, the image of each point, below I (not checked). A negative value marks padding: its
            row is zero and has no gradient.
        view_size: side of the view in pixels.

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
                    # Either way products are exact: three tf32 hold all digits of a 16-bit value.
                    PRECISION="tf32x3" if gradient.itemsize == 2 else "ieee",
                )
    return gradients


register_sample_nuclei(sample_nuclei_fwd, sample_nuclei_bwd)


def group_by_image(xy: Tensor, image_index: Tensor, view_size: int, num_images: int) -> tuple[Tensor, Tensor]:
    """Sort the points by image and from top to bottom, so that few chunks overlap a block of pixels; also return the
    position of every image's first point in that order, ``[num_images + 1]``. Padding belongs to no image."""
    height = (xy[:, 1] * (STRIPES / view_size)).clamp(0, STRIPES - 1)
    ordered, points = torch.add(height.int(), image_index, alpha=STRIPES).int().sort(stable=True)  # few passes
    images = torch.arange(0, STRIPES * num_images + 1, STRIPES, dtype=torch.int32, device=ordered.device)
    return points, torch.searchsorted(ordered, images)
