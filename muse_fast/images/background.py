"""Where nothing was scanned: transparent pixels and black areas. Readers show both white, like glass.

Scanners and converters fill the places that they did not scan with black or leave them transparent. To a detector black
is the densest of all stains: it hides the nuclei beside it and yields some of its own.

A straight run of 25 um, along a row or a column, of pixels as dark as black in a JPEG is something that neither stain
nor pigment makes. On 180 fields and slides of H&E the longest such run is 7 um. The compression leaves somewhat
brighter pixels in black beside an edge, and those count too. Whether a pixel is black depends only on pixels up to
`reach` from it, so it does not depend on the piece of the image in which it is read.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BLACK = 16  # the brightest channel of black after JPEG compression
RUN_UM = 25.0
FRINGE = 32  # the brightest channel of black beside an edge, up to Q 30
FRINGE_PX = 8  # a block of a JPEG


def reach(um: float) -> int:
    """Pixels within which others decide whether a pixel is black."""
    return _run(um) + FRINGE_PX


def _run(um: float) -> int:
    return max(1, math.ceil(RUN_UM / um))


def may_be_black(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """``[h, w]`` bool: pixels of ``[h, w, 3]`` that are dark enough; without any, there is no black."""
    return _light(rgb) <= FRINGE


def black(rgb: NDArray[np.uint8], um: float) -> NDArray[np.bool_]:
    """``[h, w]`` bool: the pixels of ``[h, w, 3]`` uint8 RGB in black areas.

    Args:
        um: um per pixel. Pixels coarser than ``RUN_UM`` are a run each.
    """
    from scipy.ndimage import binary_dilation

    light = _light(rgb)
    dark = light <= BLACK
    areas = _long_runs(dark, _run(um)) | _long_runs(dark.T, _run(um)).T
    if not areas.any():
        return areas
    found: NDArray[np.bool_] = binary_dilation(areas, np.ones((3, 3)), FRINGE_PX, mask=light <= FRINGE)
    return found


def whitened(rgb: NDArray[np.uint8], um: float) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A whole image ``[h, w, 3]`` with black areas in white, and ``[h, w]`` bool, which pixels those are."""
    areas = black(rgb, um)
    return (np.where(areas[..., None], np.uint8(255), rgb) if areas.any() else rgb), areas


def on_white(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """``[h, w, 3]`` RGB of RGB or RGBA pixels before white, and ``[h, w]`` bool, which are fully transparent."""
    if pixels.shape[2] == 3:
        return pixels, np.zeros(pixels.shape[:2], bool)
    above = Image.fromarray(pixels)
    page = Image.new("RGB", above.size, (255, 255, 255))
    page.paste(above, mask=above.getchannel("A"))
    return np.asarray(page), pixels[..., 3] == 0


def _light(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The brightest channel, ``[h, w]``; ten times faster than ``max`` along the last axis."""
    return np.maximum(np.maximum(rgb[..., 0], rgb[..., 1]), rgb[..., 2])


def _long_runs(dark: NDArray[np.bool_], least: int) -> NDArray[np.bool_]:
    """The pixels in runs of at least ``least`` dark ones along a row."""
    change = np.diff(np.pad(dark, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (row, start), (_, end) = np.nonzero(change == 1), np.nonzero(change == -1)
    long = end - start >= least
    steps = np.zeros_like(change)
    steps[row[long], start[long]] = 1
    steps[row[long], end[long]] = -1
    return steps.cumsum(axis=1, dtype=np.int8)[:, :-1] == 1
