"""Tissue on a slide: found by colour, or read from a mask or from outlines drawn in QuPath.

A tissue mask has square pixels with sides of ``MASK_UM``. Outlines are written in pixels from the corner of the part
that QuPath shows, see `Slide.qupath_frame`; a mask that is written as outlines is the same when read back.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images.geojson import SUFFIXES as GEOJSON_SUFFIXES
from muse_fast.images.geojson import Polygon, read_tissue_outlines, share_inside, write_outlines
from muse_fast.images.image_files import open_image
from muse_fast.images.slide import Frame, Lost

MASK_UM = 8.0  # side of a mask pixel
SUFFIXES = (*GEOJSON_SUFFIXES, ".json", ".png")
COLOUR = (0, 190, 230)  # of the outlines

_SPECK_UM = 100.0  # a piece with a smaller area than a square of this side is dirt on the glass
_LEAST_UM = 300.0  # shorter side of an image in which specks can be recognised: smaller images are cut out of tissue

_SHAPE_TOLERANCE = 0.02  # relative, of the aspect ratio of a mask and its slide
_MIN_INSIDE = 0.5  # share of the outlines on the slide below which they belong to something else


def tissue_mask(thumbnail: NDArray[np.uint8], um: float) -> NDArray[np.bool_]:
    """The tissue mask of a thumbnail: colour saturation above Otsu's threshold, gaps closed, specks removed.

    A thumbnail too small to tell a speck from a piece of tissue that its border cuts is all tissue.

    Args:
        thumbnail: ``[h, w, 3]`` uint8 RGB.
        um: um per pixel of the thumbnail.

    Returns:
        ``[h, w]`` bool.
    """
    from scipy.ndimage import binary_closing, label
    from skimage.filters import threshold_otsu

    if min(thumbnail.shape[:2]) * um < _LEAST_UM:
        return np.ones(thumbnail.shape[:2], bool)
    high = thumbnail.max(axis=2).astype(np.float32)
    saturation = (high - thumbnail.min(axis=2)) / np.maximum(high, 1)
    saturation[high < 40] = 0  # pen and holes in the scan are black
    # If a slide is all glass or all tissue, Otsu splits noise; glass stays below 0.03, most tissue above 0.1.
    mask = saturation > np.clip(threshold_otsu(saturation), 0.03, 0.1)
    reach = max(1, round(20 / um))
    mask = binary_closing(np.pad(mask, reach), iterations=reach)[reach:-reach, reach:-reach]
    parts, _ = label(mask)
    large = np.bincount(parts.ravel()) * um**2 >= _SPECK_UM**2
    large[0] = False  # part 0 is the background
    return large[parts]


class Damage:
    """How much of the searched part of a slide is unreadable, and how much of it may be.

    Both are masks with pixels of ``MASK_UM``, so what is met twice (in the overview, in overlapping tiles) counts once.

    Args:
        searched: ``[h, w]`` bool: the tissue and all that may be tissue, or the whole slide.
        step: level-0 pixels per pixel of the mask.
        limit: share of ``searched`` that may be unreadable, below 1.
    """

    def __init__(self, searched: NDArray[np.bool_], step: float, limit: float) -> None:
        self._searched, self._step, self._limit = searched, step, limit
        self._unreadable = np.zeros_like(searched)

    @property
    def unreadable_mm2(self) -> float:
        return _mm2(self._unreadable)

    @property
    def readable_mm2(self) -> float:
        """Area of what is searched and not known to be unreadable."""
        return _mm2(self._searched) - self.unreadable_mm2

    def add(self, lost: Lost) -> None:
        """Count what could not be read.

        Raises:
            UserError: more than the limit of the searched area is unreadable.
        """
        if not lost.boxes:
            return
        self._unreadable |= lost.mask(self._searched.shape, self._step) & self._searched
        unreadable, searched = self.unreadable_mm2, _mm2(self._searched)
        if unreadable > self._limit * searched:
            raise UserError(
                f"{lost.reason}; {unreadable:.3g} of {searched:.3g} mm2 to search cannot be read, more than "
                f"max_unreadable={self._limit:g}; copy the slide again"
            )


def _mm2(mask: NDArray[np.bool_]) -> float:
    return int(np.count_nonzero(mask)) * MASK_UM**2 / 1e6


def read_tissue(path: Path, shape: tuple[int, int], step: float, frame: Frame) -> NDArray[np.bool_]:
    """The tissue mask from a PNG of the whole slide at any scale, 0 outside tissue, or from outlines in GeoJSON.

    Args:
        shape: height and width of the mask.
        step: level-0 pixels per pixel of the mask.
        frame: of outlines that do not record their origin.

    Raises:
        UserError: the file cannot be read, the PNG does not have the shape of the slide, the GeoJSON has no outline of
            tissue, or the outlines lie beside the slide.
    """
    if path.suffix.lower() == ".png":
        return _read_png(path, shape, frame)
    tissue, ignored = read_tissue_outlines(path, frame.origin)
    if (share := share_inside(tissue, frame.box)) < _MIN_INSIDE:
        raise UserError(
            f"{path}: {100 * (1 - share):.0f} % of the tissue lies outside {frame.area}; expected {frame.expected}"
        )
    inside, outside = (
        fill([[ring / step for ring in polygon] for polygon in some], shape) for some in (tissue, ignored)
    )
    return inside & ~outside


def _read_png(path: Path, shape: tuple[int, int], frame: Frame) -> NDArray[np.bool_]:
    height, width = shape
    with open_image(path) as image:
        if image.mode not in ("1", "L", "P", "I;16", "I", "RGB"):
            raise UserError(f"{path}: {image.mode}, expected a grey or indexed mask, 0 where there is no tissue")
        if abs(image.width / image.height * height / width - 1) > _SHAPE_TOLERANCE + 1 / min(height, width):
            cropped = f", not only of {frame.area}" if any(frame.origin) else ""
            raise UserError(
                f"{path}: {image.width} x {image.height} px, expected the shape of the whole slide{cropped}"
            )
        given = np.asarray(image)
    tissue = (given.any(axis=2) if given.ndim == 3 else given != 0).astype(np.uint8) * 255
    return np.asarray(Image.fromarray(tissue).resize((width, height), Image.Resampling.BOX)) >= 128


def write_tissue(path: Path, mask: NDArray[np.bool_], step: float, origin: tuple[int, int] = (0, 0)) -> None:
    """Write a tissue mask as outlines that QuPath loads, one annotation for each piece of tissue.

    Args:
        step: level-0 pixels per pixel of the mask.
        origin: the level-0 pixel from which QuPath counts.
    """
    polygons = [[ring * step for ring in polygon] for polygon in trace(mask)]
    write_outlines(path, polygons, "Tissue", COLOUR, origin)


def trace(mask: NDArray[np.bool_]) -> list[Polygon]:
    """The outline and holes of every connected piece of a mask; ``fill`` turns them back into the mask.

    Pixels are connected by their sides. Positions are in pixels of the mask, the first with its centre at 0.5, 0.5.
    """
    from scipy.ndimage import find_objects, label
    from skimage.measure import find_contours

    pieces, _ = label(mask)
    polygons = []
    for number, (rows, columns) in enumerate(find_objects(pieces), start=1):
        piece = np.pad(pieces[rows, columns] == number, 1).astype(np.float32)
        rings = [_without_collinear(ring[:-1, ::-1]) for ring in find_contours(piece, 0.5, fully_connected="low")]
        rings.sort(key=lambda ring: np.ptp(ring, axis=0).prod(), reverse=True)  # the outline encloses the holes
        corner = np.array([columns.start, rows.start]) - 0.5  # -1 for the padding, +0.5 to a pixel's centre
        polygons.append([ring + corner for ring in rings])
    return polygons


def _without_collinear(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ring without the positions on a straight line between their neighbours."""
    (x0, y0), (x1, y1) = (ring - np.roll(ring, 1, axis=0)).T, (np.roll(ring, -1, axis=0) - ring).T
    return ring[x0 * y1 != x1 * y0]


def fill(polygons: list[Polygon], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """``[height, width]`` bool: pixels whose centre lies in one of the polygons and in none of its holes."""
    mask = np.zeros(shape, bool)
    for polygon in polygons:
        corners = np.concatenate(polygon)
        left, top = np.clip(np.floor(corners.min(axis=0)), 0, shape[::-1]).astype(int)
        right, bottom = np.clip(np.ceil(corners.max(axis=0)), 0, shape[::-1]).astype(int)
        # Along a row, every edge that is crossed switches between inside and outside.
        crossings = np.zeros((bottom - top, right - left + 1), np.int32)
        for ring in polygon:
            np.add.at(crossings, _edges(ring - (left, top), bottom - top, right - left), 1)
        mask[top:bottom, left:right] |= crossings.cumsum(axis=1)[:, :-1] % 2 == 1
    return mask


def _edges(ring: NDArray[np.float64], height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of the first pixel centre at or right of each edge of the ring, for all rows that it crosses."""
    (x0, y0), (x1, y1) = ring.T, np.roll(ring, -1, axis=0).T
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
    count = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64) - first
    edge = np.repeat(np.arange(len(ring)), count)
    row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    x = x0[edge] + (row + 0.5 - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    return row, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
