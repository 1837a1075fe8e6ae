"""Annotated and detected nuclei side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.images.drawing import CAPTION, GAP, Sheet, legend, overlay


def detection_sheet(
    path: str | Path,
    images: Sequence[NDArray[np.uint8]],
    truths: Sequence[tuple[NDArray[np.float32], NDArray[np.integer]]],
    predictions: Sequence[tuple[NDArray[np.float32], NDArray[np.integer]]],
    names: Sequence[str],
    class_names: Sequence[str],
    cell: int = 480,
) -> None:
    """Draw annotated nuclei next to detected ones, one row per image, coloured by class.

    Args:
        images: ``[H, W, 3]`` each.
        truths, predictions: per image ``xy [n, 2]`` and ``label [n]``.
    """
    row_height = cell + CAPTION + GAP
    key = legend(class_names)
    sheet = Sheet(max(3 * GAP + 2 * cell, key.width), 2 * GAP + CAPTION + len(images) * row_height)
    sheet.canvas.paste(key, (0, GAP))
    for line, (image, name) in enumerate(zip(images, names, strict=True)):
        top = 2 * GAP + CAPTION + line * row_height
        for column, (what, points) in enumerate((("annotated", truths[line]), ("detected", predictions[line]))):
            picture = overlay(image, *points, radius=max(image.shape) / 140)
            picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
            sheet.cell(GAP + column * (cell + GAP), top, picture, None, f"{len(points[0])} {what}   {name}"[:58])
    sheet.save(path)
