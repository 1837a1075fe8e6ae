"""Slides beside their nuclei, coloured by the first three principal components of their vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.exploring.components import Colours
from muse_fast.exploring.crops import open_slide_of
from muse_fast.exploring.vectors import VectorFile
from muse_fast.images.drawing import CAPTION, GAP, Sheet
from muse_fast.runtime.names import text_of

MOST_SLIDES = 24  # in a sheet
_WIDTH = 2000  # pixels of a sheet, about
_COLUMNS = 3  # slides side by side, at most
_DOT_UM = 4.0  # radius of a nucleus in the picture
_FADED = 0.5  # contrast of the grey slide behind the nuclei


class Overview(NamedTuple):
    """A sheet of slides, and why some of them are not in it, by slide."""

    sheet: Sheet
    problems: dict[str, str]


def draw_overview(files: Sequence[VectorFile], colours: Colours, folder: Path | None = None) -> Overview:
    """Draw each slide next to its nuclei; of more than `MOST_SLIDES`, these are spread evenly over the list.

    Args:
        folder: where the slides are now, see `open_slide_of`.
    """
    places = np.linspace(0, len(files) - 1, min(len(files), MOST_SLIDES)).round().astype(int)
    shown = [files[place] for place in places.tolist()]
    columns = min(_COLUMNS, math.ceil(math.sqrt(len(shown))))
    side = _WIDTH // (2 * columns) - GAP
    problems: dict[str, str] = {}
    rows: list[list[list[Image.Image]]] = []
    for number, file in enumerate(shown):
        if number % columns == 0:
            rows.append([])
        try:
            rows[-1].append(_pair(file, colours, side, folder))
        except UserError as error:
            problems[file.slide] = str(error)
            rows[-1].append([])
    heights = [max((pair[0].height for pair in row if pair), default=0) for row in rows]
    sheet = Sheet(GAP + columns * 2 * (side + GAP), GAP + sum(height + CAPTION + GAP for height in heights))
    top = GAP
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for column, pair in enumerate(row):
            file, left = shown[number * columns + column], GAP + column * 2 * (side + GAP)
            caption = f"{file.count:,} nuclei   {text_of(file.slide)}{'' if pair else '   slide not read'}"
            sheet.text(left, top, caption[: 2 * side // 8])
            for picture in pair:
                sheet.cell(left, top + CAPTION, picture)
                left += picture.width + GAP
        top += height + CAPTION + GAP
    return Overview(sheet, problems)


def _pair(file: VectorFile, colours: Colours, side: int, folder: Path | None) -> list[Image.Image]:
    """The slide, at most ``side`` pixels wide and high, and its nuclei in their colours."""
    with closing(open_slide_of(file, folder)) as slide:
        um = max(slide.width, slide.height) * slide.mpp / side
        thumbnail = slide.thumbnail(um)[:side, :side]
    return [Image.fromarray(picture) for picture in (thumbnail, colour_nuclei(thumbnail, file, colours, um))]


def colour_nuclei(
    thumbnail: NDArray[np.uint8], file: VectorFile, colours: Colours, um: float, rows: int | None = None
) -> NDArray[np.uint8]:
    """The slide in faded grey with its nuclei in their colours, the mean colour where they overlap.

    Args:
        thumbnail: ``[h, w, 3]``, ``um`` per pixel.
        rows: nuclei read at a time, see `VectorFile.blocks`.
    """
    height, width, _ = thumbnail.shape
    sums, counts = np.zeros((height * width, 3), np.int64), np.zeros(height * width, np.int64)
    radius = max(1.0, _DOT_UM / um)
    reach = np.arange(-math.floor(radius), math.floor(radius) + 1)
    disc = [(dx, dy) for dx in reach.tolist() for dy in reach.tolist() if math.hypot(dx, dy) <= radius]
    for block in file.blocks(rows):
        shades = colours(block.vectors).astype(np.int64)
        column, row = np.floor(block.xy * (file.slide_mpp / um)).astype(np.int64).T
        for dx, dy in disc:
            x, y = column + dx, row + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            pixel = (y * width + x)[inside]
            np.add.at(sums, pixel, shades[inside])  # whole numbers, so the order of the nuclei does not matter
            np.add.at(counts, pixel, 1)
    grey = np.asarray(Image.fromarray(thumbnail).convert("L"), np.float64)[..., None]
    picture = np.repeat(255 - (255 - grey) * _FADED, 3, axis=2).reshape(-1, 3)
    covered = counts > 0
    picture[covered] = sums[covered] / counts[covered, None]
    return picture.round().astype(np.uint8).reshape(height, width, 3)
