"""Pictures of what a pretraining run sees and learns: its views, dense maps, similar nuclei, a region of a slide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from muse_fast.batch import Pairs, Views
from muse_fast.images.drawing import CAPTION, GAP, PALETTE, PAPER, Sheet
from muse_fast.images.imagenet import denormalise
from muse_fast.pretraining.regions import NucleusTable, nearest_elsewhere
from muse_fast.roiset.records import Roi

GLOBAL_COLOUR, LOCAL_COLOUR = (0, 114, 178), (213, 94, 0)
_BLACK = (0, 0, 0)
_NUCLEUS_UM = 8  # typical diameter of a nucleus
_RING_UM = 7  # radius of the ring around a nucleus, which it must not cover
_FINE = 2  # pictures are drawn this much larger, then reduced, as Pillow's circles have no smooth edges


def contact_sheet(path: str | Path, views: Views, pairs: Pairs, rois_shown: int = 4, cell: int = 288) -> None:
    """Draw the views of a few ROIs, one ROI per row, with the nuclei that the loss compares.

    Every nucleus has a thin ring. Up to ten nuclei of global 0 that are in a pair have a number and a colour, the same
    in every view, so that a wrong crop, flip or match is easy to see.
    """
    total = views.num_globals + views.num_locals
    rois = range(min(rois_shown, views.num_rois))
    row_height = CAPTION + cell + CAPTION + GAP
    sheet = Sheet(GAP + total * (cell + GAP), GAP + len(rois) * row_height)
    pairs_of_roi = _pairs_per_roi(views, pairs)
    for roi in rois:
        top = GAP + roi * row_height
        sheet.text(GAP, top, f"ROI {int(views.roi_ids[roi])}   {pairs_of_roi[roi]} pairs")
        numbers = _numbered_rows(views, pairs, roi)
        for view in range(total):
            kind, index = ("global", view) if view < views.num_globals else ("local", view - views.num_globals)
            image = view * views.num_rois + roi
            picture = _draw_nuclei(views, image, numbers, cell)
            left = GAP + view * (cell + GAP)
            caption = f"{kind} {index}   {float(views.mpp[image]):.2f} um/px"
            colour = GLOBAL_COLOUR if kind == "global" else LOCAL_COLOUR
            sheet.cell(left, top + CAPTION, picture, colour, caption)
    sheet.save(path)


def principal_colours(rows: Tensor) -> NDArray[np.float64]:
    """Map rows ``[N, D]``, D >= 3, to colours ``[N, 3]`` in [0, 1]: their first three principal components.

    Channels are standardised first. Red is the first component; each runs from its 2 % to its 98 % quantile.
    """
    if not len(rows):
        return np.empty((0, 3))
    rows = rows.detach().double().cpu()
    rows = (rows - rows.mean(0)) / rows.std(0, correction=0).clamp_min(1e-6)
    # The D x D covariance is small, and its eigenvectors are deterministic, unlike a randomised decomposition.
    components = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(1)
    shades = (rows @ components).numpy()
    low, high = np.quantile(shades, (0.02, 0.98), axis=0)
    return np.clip((shades - low) / np.maximum(high - low, 1e-6), 0, 1)


def pca_picture(path: str | Path, images: Tensor, maps: Mapping[str, Tensor], cell: int = 288, rows: int = 3) -> None:
    """Draw images next to the first three principal components of their dense maps, shown as red, green and blue.

    Args:
        images: ``[n, 3, R, R]`` uint8.
        maps: ``[n, D, h, w]`` float of each network, D >= 3, by its name. Components of a network are computed over all
            n maps, so its colours are comparable.
        rows: of the picture, unless there are more than twice as many images.
    """
    cells = [[Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]]
    for dense in maps.values():
        count, width, h, w = dense.shape
        colours = principal_colours(dense.permute(0, 2, 3, 1).reshape(-1, width))
        shown = torch.from_numpy(colours).reshape(count, h, w, 3).permute(0, 3, 1, 2)
        shown = F.interpolate(shown, size=(cell, cell), mode="bicubic", align_corners=True)
        pixels = (shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        cells.append([Image.fromarray(picture) for picture in pixels])
    rows = min(len(images), max(rows, -(-len(images) // 2)))
    step_x, step_y = len(cells) * (cell + 2) + GAP, cell + GAP
    sheet = Sheet(GAP + -(-len(images) // max(rows, 1)) * step_x, GAP + CAPTION + rows * step_y)
    for i, row in enumerate(zip(*cells, strict=True)):
        left, top = GAP + i // rows * step_x, GAP + CAPTION + i % rows * step_y
        for place, (name, picture) in enumerate(zip(("view", *maps), row, strict=True)):
            if i % rows == 0:
                sheet.text(left + place * (cell + 2), GAP, name if place == 0 else f"dense map {name} training")
            sheet.cell(left + place * (cell + 2), top, _resized(picture, cell))
    sheet.save(path)


def retrieval_sheet(
    path: str | Path,
    rois: Sequence[Roi],
    tables: Mapping[str, NucleusTable],
    queries: int = 8,
    neighbours: int = 5,
    crop_um: float = 32.0,
    cell: int = 128,
) -> None:
    """Draw query nuclei, each next to its nearest nuclei of other ROIs by the cosine of their features.

    All crops are pixels of the ROI, enlarged if they are few; nuclei closer to the border than half a crop are left
    out. Queries are spread evenly over the nuclei, ROI after ROI.

    Args:
        tables: nuclei of ``rois``, in the same order, with the features of each network, by its name.
        crop_um: side of a crop.
    """
    one = next(iter(tables.values()))
    whole = torch.tensor(
        [_crop(rois[roi], xy, crop_um) is not None for roi, xy in zip(one.roi.tolist(), one.xy, strict=True)],
        dtype=torch.bool,
    )
    tables = {name: table.rows(whole) for name, table in tables.items()}
    roi_of, xy = one.roi[whole].tolist(), one.xy[whole.numpy()]
    chosen = torch.linspace(0, len(roi_of) - 1, min(queries, len(roi_of)) + 2)[1:-1].round().long()
    pixels = [Image.fromarray(roi.decode()) for roi in rois]

    def draw(left: int, line: int, row: int, caption: str) -> None:
        box = _crop(rois[roi_of[row]], xy[row], crop_um)
        picture = _resized(pixels[roi_of[row]].crop(box), cell)
        radius = _RING_UM / crop_um * cell
        _ring(ImageDraw.Draw(picture), cell / 2, cell / 2, radius, PALETTE[0], 1)
        sheet.cell(left, GAP + CAPTION + line * (cell + CAPTION + GAP), picture, caption=caption)

    step = cell + 4
    block = neighbours * step + 2 * GAP
    sheet = Sheet(2 * GAP + step + len(tables) * block, GAP + CAPTION + len(chosen) * (cell + CAPTION + GAP))
    sheet.text(GAP, GAP, "query")
    for line, row in enumerate(chosen.tolist()):
        draw(GAP, line, row, f"ROI {rois[roi_of[row]].id}")
    for place, (name, table) in enumerate(tables.items()):
        left = GAP + step + 2 * GAP + place * block
        sheet.text(left, GAP, f"nearest in other ROIs {name} training")
        for line, (values, nearest) in enumerate(zip(*nearest_elsewhere(table, chosen, neighbours), strict=True)):
            for column, (value, row) in enumerate(zip(values.tolist(), nearest.tolist(), strict=True)):
                draw(left + column * step, line, row, f"{value:.2f}  ROI {rois[roi_of[row]].id}")
    sheet.save(path)


def region_picture(path: str | Path, rois: Sequence[Roi], tables: Mapping[str, NucleusTable], side: int = 1000) -> None:
    """Draw ROIs of one slide in their places, next to their nuclei in the colours of `principal_colours`.

    Args:
        tables: nuclei of ``rois`` with the features of each network, by its name.
        side: longer side of the region in pixels.
    """
    corners = np.array([[*roi.origin, roi.origin[0] + roi.width, roi.origin[1] + roi.height] for roi in rois])
    origin, extent = corners[:, :2].min(0), corners[:, 2:].max(0) - corners[:, :2].min(0)
    scale = side / extent.max()
    width, height = np.ceil(extent * scale).astype(int).tolist()
    tissue = Image.new("RGB", (_FINE * width, _FINE * height), PAPER)
    for roi, corner in zip(rois, corners, strict=True):
        left, top, right, bottom = np.round((corner - np.tile(origin, 2)) * scale * _FINE).astype(int).tolist()
        picture = Image.fromarray(roi.decode()).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        tissue.paste(picture, (left, top))
    radius = max(_NUCLEUS_UM / 2 / rois[0].mpp * scale, 1.5) * _FINE
    panels = {
        f"{extent[0] * rois[0].mpp / 1000:.1f} x {extent[1] * rois[0].mpp / 1000:.1f} mm of {rois[0].slide}": tissue
    }
    for name, table in tables.items():
        panel = panels[f"its nuclei, coloured by their features {name} training"] = faded(tissue)
        places = (table.xy + corners[table.roi.numpy(), :2] - origin) * scale * _FINE
        for (x, y), colour in zip(places, principal_colours(table.features) * 255, strict=True):
            disc(panel, x, y, radius, fill=tuple(colour.astype(int)))
    sheet = Sheet(GAP + len(panels) * (width + GAP), GAP + CAPTION + height + GAP)
    for place, (title, panel) in enumerate(panels.items()):
        sheet.text(GAP + place * (width + GAP), GAP, title)
        sheet.cell(GAP + place * (width + GAP), GAP + CAPTION, panel.resize((width, height), Image.Resampling.LANCZOS))
    sheet.save(path)


def faded(picture: Image.Image) -> Image.Image:
    """The picture in pale grey, on which colours stand out."""
    return picture.convert("L").point(lambda grey: 110 + grey * 145 // 255).convert("RGB")


def disc(picture: Image.Image, x: float, y: float, radius: float, **style: Any) -> None:
    ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), **style)


def _crop(roi: Roi, xy: NDArray[np.float32], side_um: float) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of the square of ``side_um`` around a nucleus in pixels of the ROI; None if it sticks
    out."""
    side = round(side_um / roi.mpp)
    left, top = (int(value) - side // 2 for value in xy)
    inside = left >= 0 and top >= 0 and left + side <= roi.width and top + side <= roi.height
    return (left, top, left + side, top + side) if inside else None


def _to_rgb(images: Tensor) -> NDArray[np.uint8]:
    """Convert ``[n, 3, R, R]``, uint8 or normalised, to uint8 ``[n, R, R, 3]``."""
    pixels = images if images.dtype == torch.uint8 else denormalise(images.detach())
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def _resized(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def _ring(
    draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple[int, int, int], width: int
) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)


def _draw_nuclei(views: Views, image: int, numbers: dict[int, int], cell: int) -> Image.Image:
    """Draw one view at ``cell`` px with its nuclei; ``numbers`` maps rows of nuclei to their numbers."""
    num_global_images = views.global_images.shape[0]
    stack, place = (
        (views.global_images, image) if image < num_global_images else (views.local_images, image - num_global_images)
    )
    picture = _resized(Image.fromarray(_to_rgb(stack[place : place + 1])[0]), cell)
    draw = ImageDraw.Draw(picture)
    scale = cell / stack.shape[-1]
    first, last = int(views.nuclei.offsets[image]), int(views.nuclei.offsets[image + 1])
    marked = []
    for row in range(first, last):
        x, y = (value * scale for value in views.nuclei.xy[row].tolist())
        if row in numbers:
            marked.append((x, y, numbers[row]))
        else:
            _ring(draw, x, y, 3, (255, 255, 255), 1)
    font = ImageFont.load_default(15)
    for x, y, number in marked:  # last, so that nothing covers them
        _ring(draw, x, y, 8, _BLACK, 5)
        _ring(draw, x, y, 7, PALETTE[number], 3)
        near_right = x > cell - 24
        anchor = ("r" if near_right else "l") + ("t" if y < 24 else "b")
        spot = (x + (-8 if near_right else 8), y)
        draw.text(spot, str(number + 1), PALETTE[number], font, anchor, stroke_width=2, stroke_fill=_BLACK)
    return picture


def _numbered_rows(views: Views, pairs: Pairs, roi: int) -> dict[int, int]:
    """Number from 0 the nuclei that global 0 of ``roi`` shares with other views; returns row -> number.

    Nuclei shared by most views come first; one too close to a numbered one is skipped, to keep numbers legible.
    """
    first, last = int(views.nuclei.offsets[roi]), int(views.nuclei.offsets[roi + 1])  # image `roi` is its global 0
    teacher, student = pairs.teacher_rows.cpu(), pairs.student_rows.cpu()
    mine = (teacher >= first) & (teacher < last)
    partners = list(zip(teacher[mine].tolist(), student[mine].tolist(), strict=True))
    min_distance = views.global_images.shape[-1] / 14
    xy = views.nuclei.xy.cpu()
    numbers: dict[int, int] = {}
    for row, _ in Counter(row for row, _ in partners).most_common():
        if len(numbers) == len(PALETTE):
            break
        if all((xy[row] - xy[other]).norm() > min_distance for other in numbers):
            numbers[row] = len(numbers)
    return numbers | {other: numbers[row] for row, other in partners if row in numbers}


def _pairs_per_roi(views: Views, pairs: Pairs) -> list[int]:
    roi_of_row = views.nuclei.image_index().cpu() % views.num_rois
    return torch.bincount(roi_of_row[pairs.teacher_rows.cpu()], minlength=views.num_rois).tolist()
