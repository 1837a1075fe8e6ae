"""A map of the vectors: crops of nuclei on a grid, so that similar nuclei are near each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError
from muse_fast.exploring.components import Colours, Sample
from muse_fast.exploring.crops import read_crops
from muse_fast.exploring.vectors import VectorFile
from muse_fast.images.drawing import GAP, Sheet

CROP_UM = 24.0
METHODS = ("pca", "umap")
_CELL = 44  # pixels of a crop
_MOST_CELLS = 40  # along a side of the grid
_EDGES = (0.005, 0.995)  # quantiles; nuclei beyond these are placed at the edge
_FRAME = 2  # pixels of the frame in the colour of the overview
_NEIGHBOURS = 15  # of UMAP, its default


class Atlas(NamedTuple):
    """A sheet of crops, how they are placed, and why some could not be read, by slide."""

    sheet: Sheet
    method: str  # "UMAP" or "PCA"
    shown: int  # crops
    problems: dict[str, str]


def draw_atlas(
    files: Sequence[VectorFile], sample: Sample, colours: Colours, method: str, folder: Path | None = None
) -> Atlas:
    """Draw the crops of some of the nuclei of ``sample``, each framed in its colour.

    Args:
        method: one of `METHODS`.
        folder: where the slides are now, see `open_slide_of`.
    """
    cells = min(_MOST_CELLS, math.ceil(math.sqrt(len(sample.row))))
    positions, method = place(sample, colours, method)
    column, row, chosen = fill_grid(positions, cells)
    crops = read_crops(files, sample.file[chosen], sample.xy[chosen], CROP_UM, _CELL - 2 * _FRAME, folder)
    frames = colours(sample.vectors[chosen]).tolist()
    sheet = Sheet(2 * GAP + cells * _CELL, 2 * GAP + cells * _CELL)
    for x, y, frame, crop in zip(column.tolist(), row.tolist(), frames, crops.pictures, strict=True):
        left, top = GAP + x * _CELL, GAP + y * _CELL
        sheet.draw.rectangle((left, top, left + _CELL - 1, top + _CELL - 1), tuple(frame))
        sheet.cell(left + _FRAME, top + _FRAME, crop)
    return Atlas(sheet, method, len(chosen), crops.problems)


def place(sample: Sample, colours: Colours, method: str) -> tuple[NDArray[np.float64], str]:
    """Positions ``[n, 2]`` of the nuclei, and the method: the first two components, or UMAP if there are enough nuclei.

    UMAP compares vectors by cosine and starts from a fixed seed.
    """
    if method == "pca" or len(sample.row) <= 2 * _NEIGHBOURS:
        return colours.components.project(sample.vectors)[:, :2], "PCA"
    from umap import UMAP

    placed = UMAP(n_neighbors=_NEIGHBOURS, metric="cosine", random_state=0, n_jobs=1).fit_transform(sample.vectors)
    return placed.astype(np.float64), "UMAP"


def check_method(method: str) -> None:
    """Check now, not after hours, that what ``method`` needs is there; UMAP itself takes long to load.

    Raises:
        UserError: it is UMAP, which is not installed.
    """
    if method == "umap" and find_spec("umap") is None:
        raise UserError("atlas=umap needs umap-learn: pip install umap-learn, or use atlas=pca")


def fill_grid(
    positions: NDArray[np.float64], cells: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For each cell of a square grid the position nearest to its centre, if there is any in the cell.

    Both axes are scaled to the grid; the outermost half percent on each side counts as on the edge. The second
    coordinate grows upwards. Of equally near positions the first is taken.

    Args:
        positions: ``[n, 2]``, n at least 1.
        cells: along a side.

    Returns:
        Column, row and index of a position, ``[m]`` each, by cell.
    """
    low, high = np.quantile(positions, _EDGES, axis=0)
    span = high - low
    unit = np.where(span > 0, (positions - low) / np.where(span > 0, span, 1), 0.5).clip(0, 1)
    unit[:, 1] = 1 - unit[:, 1]
    cell = np.minimum((unit * cells).astype(np.int64), cells - 1)
    offset = np.hypot(*(unit * cells - cell - 0.5).T)
    number = cell[:, 1] * cells + cell[:, 0]
    order = np.lexsort((np.arange(len(number)), offset, number))
    chosen = order[np.unique(number[order], return_index=True)[1]]
    return cell[chosen, 0], cell[chosen, 1], chosen
