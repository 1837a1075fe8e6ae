"""Drawing nuclei on images, and sheets of captioned pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from muse_fast.runtime.atomic import replacing
from muse_fast.runtime.drawn import save_drawn

# Bright on the pinks and purples of H&E; a dark rim makes them visible on white gaps too.
PALETTE = (
    (255, 235, 60), (0, 229, 255), (255, 70, 50), (118, 255, 3), (255, 145, 0),
    (255, 255, 255), (90, 130, 255), (255, 90, 255), (0, 200, 150), (215, 180, 120),
)  # fmt: skip
INK, PAPER = (40, 40, 40), (255, 255, 255)

GAP = 10  # pixels between the cells of a sheet
CAPTION = 22  # height of a line of text
_BORDER = 4
_FONT = ImageFont.load_default(14)


def overlay(
    image: NDArray[np.uint8], xy: NDArray[np.float32], label: NDArray[np.integer] | None = None, radius: float = 4.0
) -> Image.Image:
    """``image`` ``[H, W, 3]`` with a dot on every nucleus, coloured by class if ``label`` ``[n]`` is given.

    Nuclei of unknown class (-1) are grey. Small dots have no dark rim.
    """
    picture = Image.fromarray(image).convert("RGB")
    draw = ImageDraw.Draw(picture)
    labels = np.zeros(len(xy), dtype=int) if label is None else label
    for (x, y), kind in zip(xy.tolist(), labels.tolist(), strict=True):
        fill = PALETTE[kind % len(PALETTE)] if kind >= 0 else (150, 150, 150)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=INK if radius > 2 else None)
    return picture


def legend(class_names: Sequence[str]) -> Image.Image:
    """Draw the colour and name of each class on one line."""
    widths = [36 + int(_FONT.getlength(name)) for name in class_names]
    sheet, left = Sheet(GAP + sum(widths), CAPTION), GAP
    for label, (name, width) in enumerate(zip(class_names, widths, strict=True)):
        sheet.draw.ellipse((left, 6, left + 12, 18), fill=PALETTE[label % len(PALETTE)], outline=INK)
        sheet.text(left + 18, 3, name)
        left += width
    return sheet.canvas


class Sheet:
    """A white canvas for framed pictures and lines of text."""

    def __init__(self, width: int, height: int) -> None:
        self.canvas = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.canvas)

    def text(self, x: float, y: float, text: str) -> None:
        self.draw.text((x, y), text, INK, font=_FONT)

    def cell(
        self, x: int, y: int, picture: Image.Image, colour: tuple[int, int, int] | None = None, caption: str = ""
    ) -> None:
        self.canvas.paste(picture, (x, y))
        if colour is not None:
            self.draw.rectangle((x, y, x + picture.width - 1, y + picture.height - 1), None, colour, _BORDER)
        self.text(x + 2, y + picture.height + 2, caption)

    def save(self, path: str | Path) -> None:
        """Write a PNG atomically; compressed lightly, since tissue gains little from the time that more takes."""
        with replacing(Path(path)) as temporary:
            save_drawn(self.canvas, temporary, compress_level=1)
