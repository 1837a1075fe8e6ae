"""Maps resized bilinearly, corners aligned, and concatenated along channels; and their gradient, without atomics.

Resizing from h to H pixels puts fine pixel q at position q r of the map, r = (h - 1) / (H - 1), along each axis. So
pixel j of the map has the weight

    hat(q r - j),    hat(t) = max(0, 1 - |t|)

in fine pixel q. Forward: a program owns some channels of some fine pixels and writes them in their place in the
concatenation. Backward: it owns some channels of some pixels of a map and gathers from the fine pixels in which they
have a weight, |q r - j| < 1. Sums are float32, every value is written once and rounded once, every run is
bit-identical; torch's own backward adds 16-bit values by atomics. q r is computed in integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..namespace import NAMESPACE
from ..registration import empty_concatenation, empty_map_gradient, register_resize_concat
from .sample_nuclei import place

BLOCK_PIXELS = 32
BLOCK_CHANNELS = 32


@triton.jit
def fine_weight(fine_pixel, pixel, fine, coarse):
    """Weight of a map's pixel in a fine one along an axis."""
    before, share = place(fine_pixel, fine, coarse)
    weight = tl.maximum(1 - tl.abs((before - pixel).to(tl.float32) + share), 0.0)
    return tl.where(fine_pixel < fine, weight, 0.0)


@triton.jit
def first_fine(pixel, fine, coarse):
    """The first fine pixel in which a map's pixel may have a weight along an axis."""
    return tl.where(pixel > 0, (pixel - 1) * (fine - 1) // tl.maximum(coarse - 1, 1) + 1, 0)


@triton.jit
def interpolate_kernel(
    x,  # [I, channels, height, width], with any strides
    out,  # [I, channels, fine_height, fine_width], with any strides
    channels,
    height,
    width,
    fine_height,
    fine_width,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    out_image_stride,
    out_channel_stride,
    out_row_stride,
    out_column_stride,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program per image, block of fine pixels and block of channels."""
    pixels = fine_height * fine_width
    blocks = tl.cdiv(pixels, BLOCK_PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    fine_row, fine_column = pixel // fine_width, pixel % fine_width
    top, down_share = place(fine_row, fine_height, height)
    left, right_share = place(fine_column, fine_width, width)

    origin = x + image * image_stride + (channel * channel_stride)[None, :]
    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    for down in tl.static_range(2):
        weight_down = down_share if down else 1 - down_share
        for right in tl.static_range(2):
            weight = weight_down * (right_share if right else 1 - right_share)
            values = tl.load(
                origin + ((top + down) * row_stride + (left + right) * column_stride)[:, None],
                mask=inside & (weight > 0)[:, None],
                other=0.0,
            )
            total += weight[:, None] * values.to(tl.float32)
    where = fine_row * out_row_stride + fine_column * out_column_stride
    tl.store(
        out + image * out_image_stride + where[:, None] + (channel * out_channel_stride)[None, :],
        total.to(out.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def interpolate_gradient_kernel(
    fine_gradient,  # [I, channels, fine_height, fine_width], with any strides
    gradient,  # [I, channels, height, width], with any strides
    channels,
    height,
    width,
    fine_height,
    fine_width,
    taps_down,  # the most fine pixels in which a pixel has a weight
    taps_across,
    fine_image_stride,
    fine_channel_stride,
    fine_row_stride,
    fine_column_stride,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program per image, block of the map's pixels and block of channels."""
    pixels = height * width
    blocks = tl.cdiv(pixels, BLOCK_PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    row, column = pixel // width, pixel % width
    top, left = first_fine(row, fine_height, height), first_fine(column, fine_width, width)

    origin = fine_gradient + image * fine_image_stride + (channel * fine_channel_stride)[None, :]
    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    for down in range(taps_down):
        weight_down = fine_weight(top + down, row, fine_height, height)
        for right in range(taps_across):
            weight = weight_down * fine_weight(left + right, column, fine_width, width)
            values = tl.load(
                origin + ((top + down) * fine_row_stride + (left + right) * fine_column_stride)[:, None],
                mask=inside & (weight > 0)[:, None],
                other=0.0,
            )
            total += weight[:, None] * values.to(tl.float32)
    where = row * row_stride + column * column_stride
    tl.store(
        gradient + image * image_stride + where[:, None] + (channel * channel_stride)[None, :],
        total.to(gradient.dtype.element_ty),
        mask=inside,
    )


def resize_concat(maps: Sequence[Tensor], side: int) -> Tensor:
    """Resize every map to ``side`` x ``side`` pixels and concatenate them along channels.

    Args:
        maps: ``[I, c_l, h_l, w_l]`` float32, float16 or bfloat16, with any strides.

    Returns:
        ``[I, sum(c_l), side, side]`` in the dtype to which torch promotes those of the maps; channels-last if the first
        map has its channels next to each other.
    """
    return resize_concat_fwd(maps, side)


@torch.library.custom_op(f"{NAMESPACE}::resize_concat_fwd", mutates_args=())
def resize_concat_fwd(maps: Sequence[Tensor], side: int) -> Tensor:
    out = empty_concatenation(maps, side)
    for x, part in zip(maps, out.split([x.shape[1] for x in maps], dim=1), strict=True):
        images, channels = x.shape[:2]
        grid = (images * triton.cdiv(side * side, BLOCK_PIXELS), triton.cdiv(channels, BLOCK_CHANNELS))
        if 0 not in grid:
            with torch.cuda.device_of(x):
                interpolate_kernel[grid](
                    x, part, *x.shape[1:], side, side, *x.stride(), *part.stride(), BLOCK_PIXELS, BLOCK_CHANNELS
                )
    return out


@torch.library.custom_op(f"{NAMESPACE}::resize_concat_bwd", mutates_args=())
def resize_concat_bwd(gradient: Tensor, height: int, width: int) -> Tensor:
    """Return the gradient of one map ``[I, c, height, width]``, given that of its part of the concatenation."""
    out = empty_map_gradient(gradient, height, width)
    images, channels, fine_height, fine_width = gradient.shape
    grid = (images * triton.cdiv(height * width, BLOCK_PIXELS), triton.cdiv(channels, BLOCK_CHANNELS))
    if 0 not in grid:
        with torch.cuda.device_of(gradient):
            interpolate_gradient_kernel[grid](
                gradient,
                out,
                *out.shape[1:],
                fine_height,
                fine_width,
                count_taps(fine_height, height),
                count_taps(fine_width, width),
                *gradient.stride(),
                *out.stride(),
                BLOCK_PIXELS,
                BLOCK_CHANNELS,
            )
    return out


register_resize_concat(resize_concat_fwd, resize_concat_bwd)


def count_taps(fine: int, coarse: int) -> int:
    """The most fine pixels in which one pixel of a map has a weight along an axis: integers in an open interval."""
    return fine if coarse == 1 else min(fine, -(-2 * (fine - 1) // (coarse - 1)) or 1)
