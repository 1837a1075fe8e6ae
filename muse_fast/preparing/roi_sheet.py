"""The contact sheet of a ROI set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from muse_fast.images.drawing import CAPTION, GAP, Sheet, legend, overlay
from muse_fast.roiset.records import Roi
from muse_fast.sources.base import SourceImage


def roi_sheet(
    path: str | Path,
    rois: Sequence[SourceImage | Roi],
    label_names: Sequence[str],
    cell: int = 480,
    radius: float = 3.0,
) -> None:
    """Draw ROIs with a dot on every nucleus, three per row, and a legend of the classes.

    Args:
        cell: longer side of a ROI, in pixels of the sheet.
        radius: of the dots, in pixels of the sheet.
    """
    columns, step = min(3, len(rois)), cell + GAP
    key = legend(label_names)
    height = CAPTION + -(-len(rois) // columns) * (step + CAPTION) + GAP
    sheet = Sheet(max(columns * step + GAP, key.width), height)
    sheet.canvas.paste(key)
    for i, roi in enumerate(rois):
        picture = Image.fromarray(roi.decode() if isinstance(roi, Roi) else roi.image)
        scale = cell / max(picture.size)
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        classes = None if roi.label is None or (roi.label < 0).all() else roi.label
        picture = overlay(np.asarray(picture), roi.xy * scale, classes, radius)
        x, y = GAP + i % columns * step, CAPTION + GAP + i // columns * (step + CAPTION)
        sheet.cell(x, y, picture)
        text = f"{roi.slide} {roi.split}  {roi.mpp:.3g} um/px  {len(roi.xy)} nuclei"
        sheet.text(x, y + cell + 2, text)
    sheet.save(path)
