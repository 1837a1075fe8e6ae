"""A sheet of ROIs with their nuclei."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from muse_fast.images.drawing import CAPTION, GAP, INK, PALETTE, Sheet, overlay
from muse_fast.roiset.records import Roi
from muse_fast.sources.base import SourceImage


def roi_sheet(
    path: str | Path,
    rois: Sequence[SourceImage | Roi],
    label_names: Sequence[str],
    cell: int = 480,
    radius: float = 3.0,
) -> None:
    """ROIs with a dot on every nucleus, three a row, and the colour of each class.

    Args:
        cell: pixels of the longer side of a ROI.
        radius: of the dots, pixels of the sheet.
    """
    columns, step = min(3, len(rois)), cell + GAP
    font = ImageFont.load_default(14)
    key_width = GAP + sum(36 + int(font.getlength(name)) for name in label_names)
    height = CAPTION + -(-len(rois) // columns) * (step + CAPTION) + GAP
    sheet = Sheet(max(columns * step + GAP, key_width), height)
    left = GAP
    for label, name in enumerate(label_names):
        sheet.draw.ellipse((left, 6, left + 12, 18), fill=PALETTE[label % len(PALETTE)], outline=INK)
        sheet.text(left + 18, 3, name)
        left += 36 + int(font.getlength(name))
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
