"""Slides that OpenSlide reads, small enough for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from muse_fast.images.synthetic import synthetic_image

pytest.importorskip("openslide")
tifffile = pytest.importorskip("tifffile")

Mpp = float | tuple[float, float] | None


def page_with_tissue(seed: int = 0, height: int = 1100, width: int = 1500, side: int = 1024) -> np.ndarray:
    """Draw glass at 0.5 um/px with a square of synthetic tissue, its corner at x 300 or less, y 40."""
    page = np.full((height, width, 3), 245, np.uint8)
    left = min(300, width - side)
    page[40 : 40 + side, left : left + side] = synthetic_image(seed, side, 0.5)[0]
    return page


def write_slide(path: Path, image: np.ndarray, mpp: Mpp = 0.5, **settings: object) -> Path:
    """Write a tiled TIFF with one level. ``mpp``: a number, one for x and y each, or None for no resolution."""
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    tags = {} if x is None or y is None else {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, image, tile=(256, 256), photometric="rgb", **tags, **settings)
    return path


def write_scn(path: Path, image: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> Path:
    """Write a slide of Leica at 0.5 um/px, ``size`` (w, h), of which only ``image`` at ``corner`` was scanned.

    OpenSlide gives its place as ``openslide.bounds-*``, and QuPath shows only that part.
    """
    height, width = image.shape[:2]
    nm = 500
    places = {"sizeX": width * nm, "sizeY": height * nm, "offsetX": corner[0] * nm, "offsetY": corner[1] * nm}
    view = " ".join(f'{name}="{value}"' for name, value in places.items())
    description = f"""<?xml version="1.0"?>
<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">
<collection sizeX="{size[0] * nm}" sizeY="{size[1] * nm}"><image><device model="m" version="1"/>
<pixels sizeX="{width}" sizeY="{height}"><dimension sizeX="{width}" sizeY="{height}" r="0" ifd="0"/></pixels>
<view {view} spacingZ="0"/>
<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>
<numericalAperture>0.4</numericalAperture><illuminationSource>brightfield</illuminationSource>
</illuminationSettings></scanSettings></image></collection></scn>"""
    return write_slide(path, image, description=description, metadata=None)


def damage(path: Path, *tiles: int, level: int = 0) -> None:
    """Overwrite the beginning of some tiles of a level of a compressed slide; without ``tiles`` of all."""
    with tifffile.TiffFile(path) as file:
        stored = file.pages[level].dataoffsets
    offsets = [stored[tile] for tile in tiles] or stored
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset : offset + 40] = bytes(40)
    path.write_bytes(content)
