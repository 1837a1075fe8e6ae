"""Pixels and size of image files, and images at another scale."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images import jpeg
from muse_fast.images.jpeg import MAX_SIDE

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def read_image(path: Path, data: bytes | None = None) -> NDArray[np.uint8]:
    """The pixels of an image file, ``[H, W, 3]`` uint8 RGB.

    JPEGs are decoded strictly: damaged pixels raise an error, where Pillow would return grey.

    Args:
        data: the bytes of the image, if it is only a part of the file.

    Raises:
        UserError: not an RGB image, larger than ``MAX_SIDE`` a side, or damaged; names the file.
    """
    with open_image(path, data) as image:
        if image.mode not in ("RGB", "RGBA") or max(image.size) > MAX_SIDE:
            found = f"{image.mode}, {image.width} x {image.height} px"
            raise UserError(f"{path}: {found}; expected 8-bit RGB, at most {MAX_SIDE} a side")
        if image.format == "JPEG":
            return jpeg.read(path.read_bytes() if data is None else data, image.width, image.height)
        return np.array(image.convert("RGB"))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height from the header of an image file.

    Raises:
        UserError: not an image; names the file.
    """
    with open_image(path) as image:
        return image.size


def resampled(
    image: NDArray[np.uint8], scale: float, *, shrink: Image.Resampling = Image.Resampling.BOX
) -> NDArray[np.uint8]:
    """``image`` ``[H, W, 3]`` with sides ``scale`` times as long, at least 1; bicubic if enlarged, else by ``shrink``.

    Both filters widen as an image shrinks, to prevent aliasing.
    """
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    if size == image.shape[1::-1]:
        return image
    how = shrink if scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(size, how))


@contextmanager
def open_image(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """The image in a file, or in ``data`` from it; errors in the block are raised as UserErrors that name the file."""
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            yield image
    except UserError:
        raise
    # Pillow raises SyntaxError for a broken PNG, ZeroDivisionError for a fraction in a TIFF.
    except (OSError, ValueError, SyntaxError, ZeroDivisionError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from error
