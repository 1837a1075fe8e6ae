"""Read the JPEGs of ROIs, whole or only the rows that are needed, strictly and within limits.

Damaged pixels raise an error instead of coming out grey: libjpeg's warnings count as errors. Size and scans are checked
before anything is allocated or decoded, so a hostile file costs neither memory nor time.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from muse_fast.images import jpeg_rows

REMEDY = "the set is damaged, copy it again or run prepare again"
MAX_SIDE = 16384  # bounds the memory to decode one ROI (0.8 GB)
MAX_SCANS = 32  # each is a pass over all pixels; progressive files have about ten
_COLOURS = ("YCbCr", "RGB", "Gray")
_MAX_PIXELS_PER_BYTE = 512  # a block of 8 x 8 pixels takes at least one bit


def read(jpeg: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """The pixels ``[height, width, 3]`` uint8 RGB of a JPEG that must have this size.

    Raises:
        ValueError: it is damaged, has another size, or exceeds the limits.
    """
    _check_header(jpeg, width, height)
    _check_scans(jpeg)
    return _decode_strictly(jpeg)


def read_rows(jpeg: bytes, width: int, height: int, top: int, bottom: int) -> tuple[NDArray[np.uint8], int]:
    """The pixels of at least the rows ``top:bottom``, without decoding the others.

    A JPEG that cannot be cut is decoded whole; ``RoiSetWriter`` never writes one.

    Args:
        top, bottom: ``0 <= top < bottom <= height``.

    Returns:
        Pixels ``[rows, width, 3]`` uint8 RGB and ``first_row``, the row of the image that they start at:
        ``pixels[top - first_row : bottom - first_row]`` equals ``read(...)[top:bottom]`` bit for bit. Other rows may
        differ from those of the image.

    Raises:
        ValueError: as in :func:`read`, for damage in these rows.
    """
    assert 0 <= top < bottom <= height
    band, first_row = cut(jpeg, width, height, top, bottom)
    return _decode_strictly(band), first_row


def cut(jpeg: bytes, width: int, height: int, top: int, bottom: int) -> tuple[bytes, int]:
    """A JPEG of at least the rows ``top:bottom``, for a GPU to decode, and the row of the image that it starts at.

    A JPEG that cannot be cut is returned whole. Header, size and scans are checked, but not the pixels.

    Raises:
        ValueError: the header is not that of a JPEG of this size, or exceeds the limits.
    """
    _check_header(jpeg, width, height)
    band = cutter.cut_rows(jpeg, top, bottom)
    if band is None:
        _check_scans(jpeg)
        return jpeg, 0
    return band


def _check_scans(jpeg: bytes) -> None:
    if (scans := cutter.count_scans(jpeg)) > MAX_SCANS:
        raise ValueError(f"{scans} scans, expected at most {MAX_SCANS}")


def _check_header(jpeg: bytes, width: int, height: int) -> None:
    if jpeg[:2] != b"\xff\xd8":
        raise ValueError(f"not a JPEG: it begins with {jpeg[:8]!r}")
    try:
        found_height, found_width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
    except KeyError:  # simplejpeg raises it for values that it has no name for
        raise ValueError("unknown colours or chroma subsampling") from None
    if colours not in _COLOURS:
        raise ValueError(f"the colours are {colours}, expected {', '.join(_COLOURS)}")
    if (found_width, found_height) != (width, height):
        raise ValueError(f"the header says {found_width} x {found_height}, the index {width} x {height}")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} px, expected at most {MAX_SIDE} a side")
    if width * height > _MAX_PIXELS_PER_BYTE * len(jpeg):
        raise ValueError(f"{len(jpeg)} bytes are too few for {width} x {height} px")


def _decode_strictly(jpeg: bytes) -> NDArray[np.uint8]:
    return simplejpeg.decode_jpeg(jpeg, colorspace="RGB", strict=True)


def _load_cutter() -> ModuleType:
    """``muse_fast._jpeg`` from the folder of the C++ library (``MUSE_FAST_LIBRARY``), or its equivalent in Python."""
    library = os.environ.get("MUSE_FAST_LIBRARY", "")
    folder = Path(library).parent if library else Path(__file__).parents[1]
    spec = importlib.machinery.PathFinder.find_spec("muse_fast._jpeg", [str(folder)])
    if spec is None or spec.loader is None:
        return jpeg_rows
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:  # built for another Python
        return jpeg_rows
    return module


cutter = _load_cutter()
