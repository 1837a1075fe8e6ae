"""Pixels and size of image files, and images at another scale.

Pixels are those that the file stores: a note in it that they should be displayed rotated is ignored, as OpenSlide and
QuPath ignore it, so that positions mean the same everywhere.
"""

from __future__ import annotations

import io
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin
from PIL.ImageFile import ImageFile

from muse_fast.errors import UserError
from muse_fast.images import jpeg
from muse_fast.images.background import on_white
from muse_fast.images.jpeg import MAX_SIDE

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
TO_SLIDE = "convert it to an 8-bit tiled pyramid, such as: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"

# Tags of TIFF
_KIND, _WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _PLANAR, _COLORMAP = 254, 256, 257, 258, 262, 274, 284, 320
_MAX_VALUE = 281, 341
_COPY = 1 | 4  # bits of _KIND: a reduced copy, a mask
_RGB, _INDEXED, _YCBCR = 2, 3, 6  # values of _PHOTOMETRIC
_TURN_BACK = {  # of what Pillow does to the pixels of a TIFF with this orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_IN_COLOUR = "tissue and nuclei are recognised by colour, so export it in colour"
_GREY = dict.fromkeys(("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"), ("grey", _IN_COLOUR))
_OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
_PLAUSIBLE_16_BIT = 2**14  # glass in 16-bit values is brighter; camera data of 10 to 14 bits is not


def read_image(path: Path, data: bytes | None = None) -> NDArray[np.uint8]:
    """The pixels of an image file, ``[H, W, 3]`` uint8 RGB, transparent ones on white.

    JPEGs are decoded strictly: damaged pixels raise an error, where Pillow would return grey.

    Args:
        data: the bytes of the image, if it is only a part of the file.

    Raises:
        UserError: not a colour image, of an unknown range of values, larger than ``MAX_SIDE`` a side, or damaged; names
            the file.
    """
    return on_white(read_stored(path, data))[0]


def read_stored(path: Path, data: bytes | None = None) -> NDArray[np.uint8]:
    """`read_image`, but ``[H, W, 4]`` uint8 RGBA if the file has transparency.

    Indexed colours become RGB, and 16-bit values 8-bit ones. If no pixel is visible at all, the fourth channel is not
    transparency, and it is dropped.
    """
    pixels = _decoded(path, data)
    hidden = pixels.shape[2] == 4 and not pixels[..., 3].any()
    return np.ascontiguousarray(pixels[..., :3]) if hidden else pixels


def _decoded(path: Path, data: bytes | None) -> NDArray[np.uint8]:
    """The pixels as RGB or RGBA."""
    with open_image(path, data) as image:
        if image.mode not in ("RGB", "RGBA", "P", "PA"):
            found, remedy = _GREY.get(image.mode, (image.mode, "convert it to RGB"))
            raise UserError(f"{path}: its pixels are {found}, expected 8- or 16-bit RGB; {remedy}")
        if image.format in ("JPEG", "MPO"):  # MPO is a JPEG with more images behind the first
            return jpeg.read(path.read_bytes() if data is None else data, image.width, image.height)
        if _is_deep(image):
            return _sixteen_bit(path, data, image)
        if _COLORMAP in _tags(image):
            return _indexed(_as_stored(image), _tags(image)[_COLORMAP])
        opaque = image.mode in ("RGB", "P") and "transparency" not in image.info
        return np.array(_as_stored(image).convert("RGB" if opaque else "RGBA"))


def _refuse_several(path: Path, image: ImageFile) -> None:
    """Refuse a file of several pictures, of which only the first would be used: a stack, scenes or an animation.

    An MPO from a camera has a preview behind the picture.
    """
    if image.format == "TIFF":
        count = count_pictures(path)
    else:
        count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if count > 1:
        raise UserError(
            f"{path}: {count} pictures in one file, expected one; save the one that is meant, "
            "such as page 0 by: vips copy 'IN[page=0]' OUT.tif"
        )


def image_size(path: Path) -> tuple[int, int]:
    """Width and height from the header of an image file.

    Raises:
        UserError: not an image; names the file.
    """
    with open_image(path) as image:
        tags = _tags(image)
        return (tags[_WIDTH], tags[_HEIGHT]) if tags else image.size


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


def tiff_peculiarity(path: Path) -> str:
    """What sets the first image of a TIFF apart from 8-bit RGB as displayed; "" if nothing does or it is unknown."""
    tags = next(_tiff_images(path), None)
    if tags is None or _WIDTH not in tags:
        return ""
    if max(tags.get(_BITS, (1,))) != 8:
        return f"{max(tags.get(_BITS, (1,)))} bits per value"
    if (colours := tags.get(_PHOTOMETRIC)) not in (_RGB, _INDEXED, _YCBCR):
        return "grey values" if colours in (0, 1) else f"colours of kind {colours}"
    turned = tags.get(_ORIENTATION, 1)
    return f"orientation {turned}" if turned in _TURN_BACK else ""


def count_pictures(path: Path) -> int:
    """How many pictures a TIFF contains: planes of a stack, scenes or channels.

    Reduced copies and masks do not count, nor does what has less than half the area of the first, such as a label.
    """
    images = [(tags.get(_WIDTH, 0) * tags.get(_HEIGHT, 0), tags.get(_KIND, 0)) for tags in _tiff_images(path)]
    return 1 + sum(2 * area >= images[0][0] for area, kind in images[1:] if not kind & _COPY)


def _tiff_images(path: Path) -> Iterator[TiffImagePlugin.ImageFileDirectory_v2]:
    """The tags of each image in a TIFF, up to the first that cannot be read; valid until the next one is read."""
    try:
        with open(path, "rb") as file:
            header = file.read(8)
            big = b"+" in header[2:4]
            # Pillow tells a BigTIFF by its third byte, which is right for only one order of bytes.
            given = b"II+\0" + header[4:] + file.read(8) if big else header
            tags, seen = TiffImagePlugin.ImageFileDirectory_v2(given, header[:2]), {0}
            while tags.next not in seen:
                seen.add(tags.next)
                file.seek(tags.next)
                tags.load(file)
                yield tags
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return


@contextmanager
def open_image(path: Path, data: bytes | None = None) -> Iterator[ImageFile]:
    """The only image in a file, or that in ``data`` from it, of at most ``MAX_SIDE`` a side.

    Errors in the block are raised as UserErrors that name the file.
    """
    try:
        with _pillow_unlimited(), Image.open(path if data is None else io.BytesIO(data)) as image:
            if data is None:
                _refuse_several(path, image)
            if max(image.size) > MAX_SIDE:
                size = f"{image.width} x {image.height} px"
                raise UserError(f"{path}: {size}, expected at most {MAX_SIDE} a side; {TO_SLIDE}")
            yield image
    except UserError:
        raise
    # Pillow raises SyntaxError for a broken PNG, ZeroDivisionError for a fraction in a TIFF.
    except (OSError, ValueError, SyntaxError, ZeroDivisionError) as error:
        problem = "" if data else tiff_peculiarity(path)
        hint = f"; a TIFF with {problem}, expected 8- or 16-bit RGB" if problem else ""
        raise UserError(f"{path}: not a readable image ({error}){hint}") from error


_unlimited_users = 0
_unlimited_lock = threading.Lock()
_limit: int | None = None


@contextmanager
def _pillow_unlimited() -> Iterator[None]:
    """Lift Pillow's limit on pixels, a variable of the process that is below ``MAX_SIDE`` squared, for a while."""
    global _unlimited_users, _limit
    with _unlimited_lock:
        if _unlimited_users == 0:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _unlimited_users += 1
    try:
        yield
    finally:
        with _unlimited_lock:
            _unlimited_users -= 1
            if _unlimited_users == 0:
                Image.MAX_IMAGE_PIXELS = _limit


def _tags(image: Image.Image) -> Any:
    """The tags of a TIFF; empty for other formats."""
    return getattr(image, "tag_v2", {})


def _as_stored(image: Image.Image) -> Image.Image:
    """The image with its pixels, without the rotation that Pillow applies to a TIFF, and only to that, on loading."""
    turned = _tags(image).get(_ORIENTATION)
    image.load()
    was_turned = turned in _TURN_BACK and _ORIENTATION not in _tags(image)
    return image.transpose(_TURN_BACK[turned]) if was_turned else image


def _indexed(image: Image.Image, colormap: tuple[int, ...]) -> NDArray[np.uint8]:
    """RGB of a TIFF with a colour map. Its values have 16 bits, but some programs write 8, which Pillow makes black."""
    colours = np.array(colormap).reshape(3, -1).T
    eight = colours if colours.max() < 256 else colours // 256
    return eight.astype(np.uint8)[np.asarray(image)]


# ------------------------------------------------------------------------------------------------ 16 bits per value


def _raw_mode(args: Any) -> str:
    """How Pillow unpacks a piece of an image, such as "RGB;16B" for 16-bit values, higher byte first."""
    return str(args if isinstance(args, str) else args[0])


def _is_deep(image: ImageFile) -> bool:
    return max(_tags(image).get(_BITS, (8,))) > 8 or any(";16" in _raw_mode(args) for *_, args in image.tile)


def _sixteen_bit(path: Path, data: bytes | None, image: ImageFile) -> NDArray[np.uint8]:
    """``[H, W, 3 or 4]`` uint8 of an image with 16 bits per value.

    The range is that of 16 bits, or of the tag of a TIFF.

    Raises:
        UserError: the range is unknown, because the values are those of a camera with fewer bits.
    """
    remedy = "convert it to 8 bits, such as 12-bit data by: vips linear IN OUT.tif 0.06227 0 --uchar"
    modes = {_raw_mode(args) for *_, args in image.tile}
    planar = _tags(image).get(_PLANAR, 1) != 1
    if planar or not all(mode.partition(";16")[0] in ("RGB", "RGBA", "RGBX") for mode in modes):
        raise UserError(f"{path}: more than 8 bits per value in a layout that is not supported; {remedy}")
    # Pillow keeps the higher byte of each value; with the bytes declared in the other order, it keeps the lower one.
    high = np.asarray(_as_stored(image))
    with open_image(path, data) as again:
        again.tile = [_in_other_order(tile) for tile in again.tile]
        values = np.asarray(_as_stored(again)) | (high.astype(np.uint16) << 8)
    brightest, stated = int(values.max()), _stated_maximum(image)
    if brightest > stated or (stated == 65535 and brightest < _PLAUSIBLE_16_BIT):
        raise UserError(
            f"{path}: 16 bits per value, but the brightest is {brightest}, and the file does not give their range; "
            f"{remedy}"
        )
    table = (np.arange(65536) * (255 / stated)).round().clip(0, 255).astype(np.uint8)
    return table[values]


def _in_other_order(tile: Any) -> Any:
    name, extents, offset, args = tile
    mode = _raw_mode(args)
    mode = mode[:-1] + _OTHER_ORDER[mode[-1]]
    changed = mode if isinstance(args, str) else (mode, *args[1:])
    return tile._make((name, extents, offset, changed)) if hasattr(tile, "_make") else (name, extents, offset, changed)


def _stated_maximum(image: Image.Image) -> int:
    """The largest possible value by the tags of a TIFF, if it is that of a number of bits, else 65535.

    The same tags are also used for the largest value that occurs.
    """
    for tag in _MAX_VALUE:
        given = _tags(image).get(tag)
        value = int(max(given) if isinstance(given, tuple) else given or 0)
        if value > 255 and value & (value + 1) == 0:
            return value
    return 65535
