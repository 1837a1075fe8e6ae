"""Evaluation tiles: labelled images cut so that every nucleus is evaluated exactly once.

The published benchmark splits the annotated area into cells of 224 x 224 px at the evaluation's um/px and evaluates
each nucleus in the tile of its cell; tiles larger than a cell include context around it, and tiles without nuclei are
skipped. The published builder reads that context from the whole-slide file. Plain images have no slide, so a tile that
would cross the border of its image is shifted back inside: its nuclei are then off centre, but surrounded by real
tissue. Only an image smaller than the tile is padded, by reflection.

For encoders that describe a nucleus by the image in whose middle it lies, there is a tile per nucleus instead: a crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images.image_files import resampled
from muse_fast.sources import SourceImage

SPLITS = ("train", "val", "test")
CROP_UM = 56.0  # side of a crop
VALID = 224  # side of a grid cell in pixels, for any tile size


@dataclass(frozen=True, slots=True)
class Tile:
    """A square of one image and the nuclei evaluated in it."""

    image: NDArray[np.uint8]  # [size, size, 3]
    xy: NDArray[np.float32]  # [n, 2] pixels in the tile, n >= 1
    label: NDArray[np.int64]  # [n], class 0, 1, ...
    slide: str


def cut_tiles(source: SourceImage, *, size: int = 224, mpp: float = 0.5, truncate: bool = True) -> list[Tile]:
    """Cut tiles of ``size`` px at ``mpp`` um/px that contain every labelled nucleus of ``source`` once.

    ``truncate`` drops the fraction of the coordinates, as the published builder does. Nuclei without a class
    (label below 0) or outside the image are skipped.

    Raises:
        UserError: the image has no labels.
    """
    image, xy, label = _labelled(source, mpp)
    height, width = image.shape[:2]
    cell = min(VALID, size)
    margin = (size - cell) // 2
    padded = _reflect_to(image, size)

    tiles = []
    cells = np.floor(xy / cell).astype(np.int64)  # [n, 2] column and row of every nucleus
    for column, row in np.unique(cells, axis=0):
        inside = (cells == (column, row)).all(axis=1)
        left = min(max(int(column) * cell - margin, 0), max(width - size, 0))
        top = min(max(int(row) * cell - margin, 0), max(height - size, 0))
        tile_xy = xy[inside] - (left, top)
        tiles.append(
            Tile(
                image=np.ascontiguousarray(padded[top : top + size, left : left + size]),
                xy=(np.floor(tile_xy) if truncate else tile_xy).astype(np.float32),
                label=label[inside],
                slide=source.slide,
            )
        )
    return tiles


def cut_crops(source: SourceImage, *, size: int, mpp: float) -> list[Tile]:
    """Cut a tile of ``size`` px at ``mpp`` um/px around every labelled nucleus of ``source``, see `crops_around`.

    Raises:
        UserError: the image has no labels.
    """
    image, xy, label = _labelled(source, mpp)
    crops, places = crops_around(image, xy, size)
    return [Tile(crops[i], places[i : i + 1], label[i : i + 1], source.slide) for i in range(len(label))]


def crops_around(
    image: NDArray[np.uint8], xy: NDArray[np.float64], size: int
) -> tuple[list[NDArray[np.uint8]], NDArray[np.float32]]:
    """Squares of an image, each with one nucleus within half a pixel of its middle; outside, the image is mirrored.

    Args:
        image: ``[H, W, 3]``.
        xy: ``[n, 2]`` nuclei on it, in pixels.
        size: of a square, in pixels.

    Returns:
        n views ``[size, size, 3]`` of one array, and the places ``[n, 2]`` of the nuclei in them.
    """
    corners = np.round(xy - size / 2).astype(np.int64)
    border = size // 2 + 1
    padded = np.pad(image, ((border, border), (border, border), (0, 0)), mode="symmetric")
    crops = [padded[y : y + size, x : x + size] for x, y in (corners + border).tolist()]
    return crops, (xy - corners).astype(np.float32)


def tiles_by_split(
    source: Iterable[SourceImage],
    cut: Callable[[SourceImage], list[Tile]] = cut_tiles,
    splits: tuple[str, ...] = SPLITS,
) -> dict[str, list[Tile]]:
    """The tiles of every split in ``splits``, cut by ``cut``: :func:`cut_tiles` or :func:`cut_crops`.

    Raises:
        UserError: a split has no labelled nuclei.
    """
    tiles: dict[str, list[Tile]] = {split: [] for split in splits}
    seen: set[str] = set()
    for image in source:
        seen.add(image.split)
        if image.split in tiles:
            tiles[image.split] += cut(image)
    missing = [split for split, found in tiles.items() if not found]
    if missing:
        raise UserError(
            f"no labelled nuclei in split {', '.join(missing)}; the source has the splits "
            f"{sorted(seen)}, and evaluation needs {', '.join(splits)}"
        )
    return tiles


def _labelled(source: SourceImage, mpp: float) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.int64]]:
    """An image at ``mpp`` um/px, and positions ``[n, 2]`` and classes ``[n]`` of the nuclei on it that have one.

    Raises:
        UserError: the image has nuclei without labels.
    """
    label = np.zeros(0, np.int16) if source.label is None else source.label
    if len(label) != len(source.xy):
        raise UserError(
            f"{source.name}: the image has nuclei but no classes, so predictions cannot be scored; "
            "use a labelled source such as brcam2c:DIR"
        )
    image, xy = resample(source, mpp)
    height, width = image.shape[:2]
    keep = (label >= 0) & (xy >= 0).all(axis=1) & (xy < (width, height)).all(axis=1)
    return image, xy[keep], label[keep].astype(np.int64)


def resample(source: SourceImage, mpp: float) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Image and nuclei at ``mpp``; points scale by the ratio of the rounded sides, so they stay on their nuclei."""
    image = resampled(source.image, source.mpp / mpp, shrink=Image.Resampling.BICUBIC)
    (height, width), (new_height, new_width) = source.image.shape[:2], image.shape[:2]
    return image, source.xy.astype(np.float64) * (new_width / width, new_height / height)


def _reflect_to(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """``image`` padded on the right and bottom by reflection until both sides are at least ``size``."""
    height, width = image.shape[:2]
    grow = ((0, max(size - height, 0)), (0, max(size - width, 0)), (0, 0))
    return np.pad(image, grow, mode="symmetric")
