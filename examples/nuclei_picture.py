"""Draw the README's picture from a finished run: a region, its views with matched nuclei, and the nuclei's features.

    python examples/nuclei_picture.py runs/demo docs/img/nuclei.jpg

The region is the ROI with the most nuclei. Its views are those that the run draws, without colour augmentation. The
colours of the nuclei are the first three principal components (red, green, blue) of the teacher's features.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from muse_fast import load_backbone
from muse_fast.config import load_config
from muse_fast.pretraining.pictures import disc, faded, principal_colours
from muse_fast.pretraining.regions import nucleus_tables, window_size, windows
from muse_fast.roiset.records import Roi
from muse_fast.roiset.roiset import RoiSet
from muse_fast.views.boxes import ViewBox
from muse_fast.views.plan import draw_plan

VIEW_COLOURS = ("#00b4f0", "#ff9a00", "#00c853", "#e040fb")  # of each view's frame, and of its outline in the region
NUMBERED = 6  # most nuclei with a number; more would cover the tissue
FINE = 2  # the picture is drawn this much larger, then reduced, as Pillow's circles and lines have no smooth edges
CELL = 420 * FINE  # side of the two regions
GAP = 14 * FINE
TITLE = 34 * FINE
FONT = 20 * FINE


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a region, its views, and its nuclei coloured by features.")
    parser.add_argument("run", type=Path, help="finished run, such as runs/demo")
    parser.add_argument("out", type=Path, help="picture to write (.jpg or .png)")
    parser.add_argument("--epoch", type=int, default=0, help="epoch whose views are drawn (default: 0)")
    options = parser.parse_args(argv)

    config = load_config(options.run / "config.yaml")
    roiset, views = RoiSet(config.data.roiset), config.views
    roi = max(roiset, key=lambda roi: len(roi.xy))
    boxes = draw_plan(roi, options.epoch, config.seed, views).boxes[: len(VIEW_COLOURS)]
    covering = windows(roi, window_size(roiset, views), (views.global_mpp_min + views.global_mpp_max) / 2)
    table = nucleus_tables({"trained": load_backbone(None, options.run)}, [roi], [covering])["trained"]
    draw(options.out, roi, boxes, table.xy, principal_colours(table.features))


def draw(out: Path, roi: Roi, boxes: Sequence[ViewBox], xy: NDArray[np.float32], colours: NDArray[np.float64]) -> None:
    """Draw, side by side: the region with the outlines of its views, these, and its nuclei ``xy`` in ``colours``."""
    side, columns = (CELL - GAP) // 2, -(-len(boxes) // 2)
    middle = columns * (side + GAP) - GAP
    sheet = Image.new("RGB", (2 * CELL + middle + 2 * GAP, TITLE + CELL), "white")
    right = CELL + middle + 2 * GAP
    titles = {"one region of a slide": CELL / 2, "matched views": CELL + GAP + middle / 2}
    font = ImageFont.load_default(FONT)
    for title, center in (titles | {"its nuclei, coloured by their features": right + CELL / 2}).items():
        ImageDraw.Draw(sheet).text((center, TITLE / 2), title, "black", font, anchor="mm")

    pixels, scale = roi.decode(), CELL / roi.width
    region = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BICUBIC)
    painted = faded(region)
    for box, colour in zip(boxes, VIEW_COLOURS, strict=False):
        corners = [value * scale for value in (box.x, box.y, box.x + box.side, box.y + box.side)]
        ImageDraw.Draw(region).rectangle(corners, outline=colour, width=3 * FINE)
    for (x, y), colour in zip(xy * scale, (colours * 255).astype(int).tolist(), strict=True):
        disc(painted, x, y, 7 * FINE, fill=tuple(colour), outline="black", width=FINE)
    sheet.paste(region, (0, TITLE))
    sheet.paste(painted, (right, TITLE))

    numbers = numbered(roi, boxes)
    for place, (box, colour) in enumerate(zip(boxes, VIEW_COLOURS, strict=False)):
        left, top = CELL + GAP + place // 2 * (side + GAP), TITLE + place % 2 * (side + GAP)
        sheet.paste(view(box, roi, pixels, numbers, colour, side), (left, top))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width // FINE, sheet.height // FINE), Image.Resampling.LANCZOS).save(out, quality=88)


def view(
    box: ViewBox, roi: Roi, pixels: NDArray[np.uint8], numbers: Sequence[int], colour: str, side: int
) -> Image.Image:
    """Draw one view, ``side`` px, with the numbers of the nuclei in ``numbers``."""
    picture = Image.fromarray(box.render(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0).numpy())
    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16 * FINE)
    xy, seen = box.nuclei(roi.xy)
    for (x, y), nucleus in zip(xy * (side / box.size), seen.tolist(), strict=True):
        if nucleus in numbers:
            disc(picture, x, y, 10 * FINE, outline="white", width=2 * FINE)
            number, corner = str(numbers.index(nucleus) + 1), (x + 10 * FINE, y - 10 * FINE)
            draw.text(corner, number, "white", font, "lb", stroke_width=2 * FINE, stroke_fill="black")
    corner, scale = (8 * FINE, side - 8 * FINE), f"{box.mpp(roi.mpp):.2f} um/px"
    draw.text(corner, scale, "white", font, "lb", stroke_width=2 * FINE, stroke_fill="black")
    draw.rectangle((0, 0, side - 1, side - 1), outline=colour, width=4 * FINE)
    return picture


def numbered(roi: Roi, boxes: Sequence[ViewBox]) -> list[int]:
    """Choose nuclei of the first view that most other views show too, and that are not close to each other."""
    seen = [set(box.nuclei(roi.xy)[1].tolist()) for box in boxes]
    chosen: list[int] = []
    for nucleus in sorted(seen[0], key=lambda nucleus: -sum(nucleus in other for other in seen)):
        apart = all(np.hypot(*(roi.xy[nucleus] - roi.xy[other])) > boxes[0].side / 7 for other in chosen)
        if apart and len(chosen) < NUMBERED and any(nucleus in other for other in seen[1:]):
            chosen.append(nucleus)
    return chosen


if __name__ == "__main__":
    main()
