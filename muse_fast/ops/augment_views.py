"""Views cut from decoded ROIs: crop, resize, flip and turn, stains, colour jitter, blur, normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from muse_fast.ops import backends, reference

BOX_COLUMNS = ("image", "x", "y", "side", "flip", "turns")
JITTER = ("brightness", "contrast", "saturation", "hue")
ORDER = ("first", "second", "third", "fourth")  # of JITTER, by number: the order in which they are applied
STAINS = ("haematoxylin", "eosin", "residual")  # factors of their amounts
STAIN_SHIFTS = tuple(f"{stain}_shift" for stain in STAINS)
COLOUR_COLUMNS = (*JITTER, *ORDER, "grey", "sigma", "solarise", *STAINS, *STAIN_SHIFTS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def augment_views(
    pixels: Tensor,
    images: Tensor,
    boxes: Tensor,
    colours: Tensor,
    size: int,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Tensor:
    """Crop, resize, turn, recolour and normalise views of images, with ImageNet's mean and standard deviation.

    1. Resize the square ``side`` x ``side`` at (``x``, ``y``) to ``size`` x ``size`` like ``F.interpolate(crop,
       mode="bicubic", antialias=True)``: a cubic kernel with a = -1/2, stretched when downsampling. Pixels outside the
       square are not read.
    2. Mirror left-right if ``flip``, then rotate by ``turns`` quarter turns counter-clockwise.
    3. Multiply the amounts of the three stains by their factors (1 changes nothing) and add their shifts (0 changes
       nothing), with the stain vectors of Ruifrok and Johnston (2001): the optical densities -ln(level / 255) of a
       pixel are the sum of its amounts times these vectors. The level 0 counts as 1/4.
    4. Multiply brightness, contrast (about the mean grey of the view) and saturation by their factors (1 changes
       nothing) and shift the hue (0 changes nothing, 1 is the whole HSV colour circle), in the given order; then
       convert to greyscale if ``grey``.
    5. If ``sigma`` is above 0, apply a Gaussian blur with a radius of 3 sigma, rounded, at least 1 and at most
       ``size // 2 - 1``, mirrored at the borders.
    6. If ``solarise``, replace every level from 128 up by 255 - level; then normalise.

    Between steps, values are whole levels, rounded or truncated as torchvision does on uint8, so views equal those of
    the CPU path except for occasional differences of one level. The op is not differentiable.

    Args:
        pixels: ``[bytes]`` uint8, the images one after the other, each ``[3, height, width]`` RGB.
        images: ``[B, 3]`` int64: first byte, height and width of each image.
        boxes: ``[N, 6]`` int32, columns as in ``BOX_COLUMNS``: image number, x, y and side of the square in pixels of
            that image, flip (0 or 1), turns (0 to 3). The square must lie inside its image (not checked on CUDA).
        colours: ``[N, 17]`` float32, columns as in ``COLOUR_COLUMNS``; ``grey`` and ``solarise`` are 0 or 1.
        size: side of a view in pixels, at least 4.
        dtype: dtype of the views: float32, bfloat16 or float16.
        backend: ``reference`` or ``triton`` to force one.

    Returns:
        ``[N, 3, size, size]`` in ``dtype``.

    Raises:
        ValueError: wrong shape, dtype or device, a square outside its image, or a forced backend that cannot run.
    """
    _check(pixels, images, boxes, colours, size, dtype)
    chosen = backends.choose("augment_views", pixels.device.type, backend)
    if chosen == "triton":
        from muse_fast.kernels.fused.augment_views import augment_views as fused  # needs triton

        return fused(pixels, images, boxes, colours, size, dtype)
    return reference.augment_views(pixels, images, boxes, colours, size, dtype)


def _check(pixels: Tensor, images: Tensor, boxes: Tensor, colours: Tensor, size: int, dtype: torch.dtype) -> None:
    if pixels.dim() != 1 or pixels.dtype != torch.uint8:
        raise ValueError(f"augment_views: pixels must be uint8 [bytes], got {pixels.dtype} {tuple(pixels.shape)}")
    expected = (
        ("images", images, torch.int64, (images.shape[0], 3)),
        ("boxes", boxes, torch.int32, (boxes.shape[0], len(BOX_COLUMNS))),
        ("colours", colours, torch.float32, (boxes.shape[0], len(COLOUR_COLUMNS))),
    )
    for name, tensor, kind, shape in expected:
        if tensor.dtype != kind or tensor.shape != shape:
            raise ValueError(
                f"augment_views: {name} must be {kind} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
    if not pixels.device == images.device == boxes.device == colours.device:
        raise ValueError(
            f"augment_views: pixels are on {pixels.device}, images on {images.device}, boxes on {boxes.device}, "
            f"colours on {colours.device}"
        )
    if size < 4:
        raise ValueError(f"augment_views: size must be at least 4, got {size}")
    if dtype not in DTYPES:
        raise ValueError(f"augment_views: dtype must be float32, bfloat16 or float16, got {dtype}")
    if pixels.device.type == "cpu" and not torch.compiler.is_compiling():  # on CUDA this would synchronise
        _check_bounds(pixels, images, boxes)


def _check_bounds(pixels: Tensor, images: Tensor, boxes: Tensor) -> None:
    start, height, width = images.unbind(1)
    if ((images < 0).any(1) | (start + 3 * height * width > len(pixels))).any():
        raise ValueError(f"augment_views: images {images.tolist()} do not fit in {len(pixels)} bytes")
    image, x, y, side, _, _ = boxes.long().unbind(1)
    if ((image < 0) | (image >= len(images))).any():
        raise ValueError(f"augment_views: boxes refer to an image that is not one of the {len(images)}")
    outside = (x < 0) | (y < 0) | (side < 1) | (x + side > width[image]) | (y + side > height[image])
    if outside.any():
        row = int(outside.int().argmax())
        raise ValueError(f"augment_views: box {row} (counted from 0), {boxes[row].tolist()}, lies outside its image")
