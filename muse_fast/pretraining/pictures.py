"""Pictures of what a pretraining run sees and learns: contact sheet, PCA of dense maps, nucleus retrieval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from muse_fast.batch import PackedNuclei, Pairs, Views
from muse_fast.images.drawing import CAPTION, GAP, INK, PALETTE, Sheet
from muse_fast.images.imagenet import denormalise

GLOBAL_COLOUR, LOCAL_COLOUR = (0, 114, 178), (213, 94, 0)
MATCH_COLOUR, MISS_COLOUR = (0, 170, 80), (205, 205, 205)
_BLACK = (0, 0, 0)


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


def pca_picture(path: str | Path, images: Tensor, dense: Tensor, cell: int = 288) -> None:
    """Draw images next to the first three principal components of their dense maps, shown as red, green and blue.

    Args:
        images: ``[n, 3, R, R]`` float, normalised.
        dense: ``[n, D, h, w]`` float, D >= 3. Components are computed over all n maps, so colours are comparable.
    """
    count, width, h, w = dense.shape
    rows = dense.detach().float().permute(0, 2, 3, 1).reshape(-1, width)
    rows = (rows - rows.mean(0)) / rows.std(0, correction=0).clamp_min(1e-6)
    # The D x D covariance is small, and its eigenvectors are deterministic, unlike a randomised decomposition.
    components = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(1)
    shades = rows @ components
    low, high = np.quantile(shades.cpu().numpy(), (0.02, 0.98), axis=0)
    scaled = (shades - torch.from_numpy(low).to(shades)) / torch.from_numpy(high - low).to(shades).clamp_min(1e-6)
    maps = scaled.clamp(0, 1).reshape(count, h, w, 3).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(cell, cell), mode="bilinear", align_corners=True)
    colours = (maps * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    columns = min(count, 4)
    step_x, step_y = 2 * cell + 2 * GAP, cell + GAP
    sheet = Sheet(GAP + columns * step_x, GAP + CAPTION + -(-count // columns) * step_y)
    sheet.text(GAP, GAP, f"image | first three principal components of the {width}-channel dense map")
    for i, image in enumerate(_to_rgb(images)):
        left, top = GAP + i % columns * step_x, GAP + CAPTION + i // columns * step_y
        sheet.cell(left, top, _resized(Image.fromarray(image), cell))
        sheet.cell(left + cell + 2, top, Image.fromarray(colours[i]))
    sheet.save(path)


def retrieval_sheet(
    path: str | Path,
    images: Tensor,
    nuclei: PackedNuclei,
    features: Tensor,
    roi_of_image: Tensor,
    queries: int = 8,
    neighbours: int = 6,
    patch: int = 48,
    cell: int = 132,
) -> None:
    """Draw query nuclei, each next to its nearest nuclei in all other images by cosine similarity.

    A green border marks the query's own nucleus in another view: same ROI, same nucleus index. Queries that have such
    a partner come first, spread evenly over the rows.

    Args:
        images: ``[I, 3, R, R]`` float, normalised.
        nuclei: over the I images.
        features: ``[N, D]``, one row per nucleus.
        roi_of_image: ``[I]`` int.
        patch: side of the square shown around a nucleus, pixels of its image.
    """
    image_of = nuclei.image_index().cpu()
    identity = torch.stack([roi_of_image.cpu().long()[image_of], nuclei.index.cpu().long()], dim=1)
    rows = F.normalize(features.detach().float().cpu(), dim=1)
    query_rows = _pick_queries(identity, image_of, queries)

    similarity = rows[query_rows] @ rows.T
    similarity[image_of[query_rows][:, None] == image_of[None, :]] = -torch.inf
    values, nearest = similarity.topk(min(neighbours, len(rows)), dim=1)

    rgb = _to_rgb(images)
    step_x, step_y = cell + GAP, cell + CAPTION + GAP
    width = max(GAP + step_x * (1 + neighbours) + GAP, 560)
    sheet = Sheet(width, GAP + CAPTION + len(query_rows) * step_y)
    sheet.text(GAP, GAP, "query | nearest nuclei of other images, cosine; green: the same nucleus")
    for line, query in enumerate(query_rows.tolist()):
        top = GAP + CAPTION + line * step_y
        picture = _patch(rgb[image_of[query]], nuclei.xy[query], patch, cell)
        sheet.cell(GAP, top, picture, INK, f"ROI {int(identity[query, 0])} nucleus {int(identity[query, 1])}")
        for place, (value, row) in enumerate(zip(values[line].tolist(), nearest[line].tolist(), strict=True)):
            if value == -torch.inf:  # other images have fewer nuclei than ``neighbours``
                break
            same = bool((identity[row] == identity[query]).all())
            picture = _patch(rgb[image_of[row]], nuclei.xy[row], patch, cell)
            left = GAP + step_x * (1 + place) + GAP
            sheet.cell(left, top, picture, MATCH_COLOUR if same else MISS_COLOUR, f"{value:.3f}")
    sheet.save(path)


def _to_rgb(images: Tensor) -> NDArray[np.uint8]:
    """Convert normalised ``[n, 3, R, R]`` to uint8 ``[n, R, R, 3]``."""
    return denormalise(images.detach()).permute(0, 2, 3, 1).cpu().numpy()


def _resized(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def _patch(image: NDArray[np.uint8], xy: Tensor, side: int, cell: int) -> Image.Image:
    """Crop ``side`` px around ``xy``, mirrored beyond the image's borders, and draw a ring in the middle."""
    left, top = (int(v) - side // 2 for v in xy.tolist())
    padded = np.pad(image, ((side, side), (side, side), (0, 0)), mode="symmetric")
    picture = _resized(Image.fromarray(padded[top + side : top + 2 * side, left + side : left + 2 * side]), cell)
    _ring(ImageDraw.Draw(picture), cell / 2, cell / 2, cell / 12, PALETTE[1], 2)
    return picture


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


def _pick_queries(identity: Tensor, image_of: Tensor, queries: int) -> Tensor:
    """Choose query rows: nuclei in more than one image if there are any, each nucleus once, spread evenly."""
    _, nucleus, seen = torch.unique(identity, dim=0, return_inverse=True, return_counts=True)
    candidates: Sequence[int] = torch.nonzero(seen[nucleus] > 1).flatten().tolist() or range(len(image_of))
    first_rows = list({int(nucleus[row]): row for row in reversed(candidates)}.values())
    first_rows.sort()
    chosen = np.linspace(0, len(first_rows) - 1, min(queries, len(first_rows))).round().astype(int)
    return torch.tensor([first_rows[i] for i in chosen], dtype=torch.long)
