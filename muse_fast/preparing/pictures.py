"""Pictures of what a run sees and learns: contact sheet, PCA of dense maps, nucleus retrieval, overlays.

All take tensors as the training step holds them and write one PNG. Nothing here needs more than Pillow and numpy.
"""

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
from muse_fast.images.imagenet import denormalise
from muse_fast.roiset.records import Roi
from muse_fast.runtime.atomic import replacing
from muse_fast.sources.base import SourceImage

# Bright on the pinks and purples of H&E; drawn with a black rim, so that they show on white tissue gaps too.
PALETTE = (
    (255, 235, 60), (0, 229, 255), (255, 70, 50), (118, 255, 3), (255, 145, 0),
    (255, 255, 255), (90, 130, 255), (255, 90, 255), (0, 200, 150), (215, 180, 120),
)  # fmt: skip
GLOBAL_COLOUR, LOCAL_COLOUR = (0, 114, 178), (213, 94, 0)
MATCH_COLOUR, MISS_COLOUR = (0, 170, 80), (205, 205, 205)
INK, BLACK, PAPER = (40, 40, 40), (0, 0, 0), (255, 255, 255)

_GAP = 10  # pixels between the cells of a sheet
_BORDER = 4
_CAPTION = 22  # height of a line of text


def contact_sheet(path: str | Path, views: Views, pairs: Pairs, rois_shown: int = 4, cell: int = 288) -> None:
    """The views of a few ROIs, one ROI a row, with the nuclei that the loss compares.

    Every nucleus has a thin ring. Up to ten nuclei of global 0 that stand in a pair carry a number and a colour, the
    same in every view, so that a wrong crop, flip or match shows at a glance.
    """
    total = views.num_globals + views.num_locals
    rois = range(min(rois_shown, views.num_rois))
    row_height = _CAPTION + cell + _CAPTION + _GAP
    sheet = _Sheet(_GAP + total * (cell + _GAP), _GAP + len(rois) * row_height)
    pairs_of_roi = _pairs_per_roi(views, pairs)
    for roi in rois:
        top = _GAP + roi * row_height
        sheet.text(_GAP, top, f"ROI {int(views.roi_ids[roi])}   {pairs_of_roi[roi]} pairs")
        numbers = _numbered_rows(views, pairs, roi)
        for view in range(total):
            kind, index = ("global", view) if view < views.num_globals else ("local", view - views.num_globals)
            image = view * views.num_rois + roi
            picture = _draw_nuclei(views, image, numbers, cell)
            left = _GAP + view * (cell + _GAP)
            caption = f"{kind} {index}   {float(views.mpp[image]):.2f} um/px"
            colour = GLOBAL_COLOUR if kind == "global" else LOCAL_COLOUR
            sheet.cell(left, top + _CAPTION, picture, colour, caption)
    sheet.save(path)


def pca_picture(path: str | Path, images: Tensor, dense: Tensor, cell: int = 288) -> None:
    """Images beside the first three principal components of their dense maps, shown as red, green and blue.

    Args:
        images: ``[n, 3, R, R]`` float, normalised.
        dense: ``[n, D, h, w]`` float, D >= 3. The components are those of all n maps together, so colours compare.
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
    step_x, step_y = 2 * cell + 2 * _GAP, cell + _GAP
    sheet = _Sheet(_GAP + columns * step_x, _GAP + _CAPTION + -(-count // columns) * step_y)
    sheet.text(_GAP, _GAP, f"image | first three principal components of the {width}-channel dense map")
    for i, image in enumerate(_to_rgb(images)):
        left, top = _GAP + i % columns * step_x, _GAP + _CAPTION + i // columns * step_y
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
    """Query nuclei and, beside each, the nearest nuclei of all other images by cosine similarity.

    A green border marks the query's own nucleus seen in another view: same ROI, same nucleus index. Queries that have
    such a partner come first, spread evenly over the rows.

    Args:
        images: ``[I, 3, R, R]`` float, normalised.
        nuclei: over the I images.
        features: ``[N, D]``, a row per row of ``nuclei``.
        roi_of_image: ``[I]`` int.
        patch: side of the square shown around a nucleus, pixels of its image.
    """
    image_of = nuclei.image_index().cpu()
    identity = torch.stack([roi_of_image.cpu().long()[image_of], nuclei.index.cpu().long()], dim=1)
    rows = F.normalize(features.detach().float().cpu(), dim=1)
    asked = _pick_queries(identity, image_of, queries)

    similarity = rows[asked] @ rows.T
    similarity[image_of[asked][:, None] == image_of[None, :]] = -torch.inf
    values, nearest = similarity.topk(min(neighbours, len(rows)), dim=1)

    rgb = _to_rgb(images)
    step_x, step_y = cell + _GAP, cell + _CAPTION + _GAP
    width = max(_GAP + step_x * (1 + neighbours) + _GAP, 560)
    sheet = _Sheet(width, _GAP + _CAPTION + len(asked) * step_y)
    sheet.text(_GAP, _GAP, "query | nearest nuclei of other images, cosine; green: the same nucleus")
    for line, query in enumerate(asked.tolist()):
        top = _GAP + _CAPTION + line * step_y
        picture = _patch(rgb[image_of[query]], nuclei.xy[query], patch, cell)
        sheet.cell(_GAP, top, picture, INK, f"ROI {int(identity[query, 0])} nucleus {int(identity[query, 1])}")
        for place, (value, row) in enumerate(zip(values[line].tolist(), nearest[line].tolist(), strict=True)):
            if value == -torch.inf:  # fewer nuclei in other images than neighbours asked for
                break
            same = bool((identity[row] == identity[query]).all())
            picture = _patch(rgb[image_of[row]], nuclei.xy[row], patch, cell)
            left = _GAP + step_x * (1 + place) + _GAP
            sheet.cell(left, top, picture, MATCH_COLOUR if same else MISS_COLOUR, f"{value:.3f}")
    sheet.save(path)


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
    columns, step = min(3, len(rois)), cell + _GAP
    font = ImageFont.load_default(14)
    key_width = _GAP + sum(36 + int(font.getlength(name)) for name in label_names)
    height = _CAPTION + -(-len(rois) // columns) * (step + _CAPTION) + _GAP
    sheet = _Sheet(max(columns * step + _GAP, key_width), height)
    left = _GAP
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
        x, y = _GAP + i % columns * step, _CAPTION + _GAP + i // columns * (step + _CAPTION)
        sheet.cell(x, y, picture)
        text = f"{roi.slide} {roi.split}  {roi.mpp:.3g} um/px  {len(roi.xy)} nuclei"
        sheet.text(x, y + cell + 2, text)
    sheet.save(path)


def overlay(
    image: NDArray[np.uint8], xy: NDArray[np.float32], label: NDArray[np.integer] | None = None, radius: float = 4.0
) -> Image.Image:
    """``image`` ``[H, W, 3]`` with a dot on every nucleus, coloured by class where ``label`` ``[n]`` is given.

    A nucleus of unknown class (-1) is drawn grey. Dots too small for a black rim have none.
    """
    picture = Image.fromarray(image).convert("RGB")
    draw = ImageDraw.Draw(picture)
    labels = np.zeros(len(xy), dtype=int) if label is None else label
    for (x, y), kind in zip(xy.tolist(), labels.tolist(), strict=True):
        fill = PALETTE[kind % len(PALETTE)] if kind >= 0 else (150, 150, 150)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=INK if radius > 2 else None)
    return picture


def detection_sheet(
    path: str | Path,
    images: Sequence[NDArray[np.uint8]],
    truths: Sequence[tuple[NDArray[np.float32], NDArray[np.integer]]],
    predictions: Sequence[tuple[NDArray[np.float32], NDArray[np.integer]]],
    names: Sequence[str],
    class_names: Sequence[str],
    cell: int = 480,
) -> None:
    """Annotated nuclei beside detected ones, an image a row, coloured by class.

    Args:
        images: ``[H, W, 3]`` each.
        truths, predictions: per image ``xy [n, 2]`` and ``label [n]``.
    """
    row_height = cell + _CAPTION + _GAP
    sheet = _Sheet(3 * _GAP + 2 * cell, 2 * _GAP + _CAPTION + len(images) * row_height)
    place = _GAP
    for kind, name in enumerate(class_names):
        sheet.draw.ellipse((place, _GAP + 4, place + 10, _GAP + 14), fill=PALETTE[kind % len(PALETTE)], outline=INK)
        sheet.text(place + 16, _GAP, name)
        place += 40 + 8 * len(name)
    for line, (image, name) in enumerate(zip(images, names, strict=True)):
        top = 2 * _GAP + _CAPTION + line * row_height
        for column, (what, points) in enumerate((("annotated", truths[line]), ("detected", predictions[line]))):
            picture = overlay(image, *points, radius=max(image.shape) / 140)
            picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
            sheet.cell(_GAP + column * (cell + _GAP), top, picture, None, f"{len(points[0])} {what}   {name}"[:58])
    sheet.save(path)


# ------------------------------------------------------------------------------------------------------------ parts


class _Sheet:
    """A white canvas that framed pictures and lines of text are put on."""

    def __init__(self, width: int, height: int) -> None:
        self.canvas = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.canvas)

    def text(self, x: float, y: float, text: str) -> None:
        self.draw.text((x, y), text, INK, font=ImageFont.load_default(14))

    def cell(
        self, x: int, y: int, picture: Image.Image, colour: tuple[int, int, int] | None = None, caption: str = ""
    ) -> None:
        self.canvas.paste(picture, (x, y))
        if colour is not None:
            self.draw.rectangle((x, y, x + picture.width - 1, y + picture.height - 1), None, colour, _BORDER)
        self.text(x + 2, y + picture.height + 2, caption)

    def save(self, path: str | Path) -> None:
        """Write a PNG that is either whole or absent."""
        with replacing(Path(path)) as temporary:
            self.canvas.save(temporary, format="PNG")


def _to_rgb(images: Tensor) -> NDArray[np.uint8]:
    """Normalised ``[n, 3, R, R]`` to uint8 ``[n, R, R, 3]``."""
    return denormalise(images.detach()).permute(0, 2, 3, 1).cpu().numpy()


def _resized(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def _patch(image: NDArray[np.uint8], xy: Tensor, side: int, cell: int) -> Image.Image:
    """The square of ``side`` px around ``xy``, mirrored where it leaves the image, with a ring in the middle."""
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
    """One view at ``cell`` px with its nuclei; ``numbers`` gives rows of the pack their number."""
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
        _ring(draw, x, y, 8, BLACK, 5)
        _ring(draw, x, y, 7, PALETTE[number], 3)
        near_right = x > cell - 24
        anchor = ("r" if near_right else "l") + ("t" if y < 24 else "b")
        spot = (x + (-8 if near_right else 8), y)
        draw.text(spot, str(number + 1), PALETTE[number], font, anchor, stroke_width=2, stroke_fill=BLACK)
    return picture


def _numbered_rows(views: Views, pairs: Pairs, roi: int) -> dict[int, int]:
    """Rows of nuclei that global 0 of ``roi`` shares with other views, each with its number from 0.

    Nuclei that most views share come first; one too close to a numbered one is passed over, to keep numbers legible.
    """
    first, last = int(views.nuclei.offsets[roi]), int(views.nuclei.offsets[roi + 1])  # image `roi` is its global 0
    teacher, student = pairs.teacher_rows.cpu(), pairs.student_rows.cpu()
    mine = (teacher >= first) & (teacher < last)
    partners = list(zip(teacher[mine].tolist(), student[mine].tolist(), strict=True))
    apart = views.global_images.shape[-1] / 14
    xy = views.nuclei.xy.cpu()
    numbers: dict[int, int] = {}
    for row, _ in Counter(row for row, _ in partners).most_common():
        if len(numbers) == len(PALETTE):
            break
        if all((xy[row] - xy[other]).norm() > apart for other in numbers):
            numbers[row] = len(numbers)
    return numbers | {other: numbers[row] for row, other in partners if row in numbers}


def _pairs_per_roi(views: Views, pairs: Pairs) -> list[int]:
    roi_of_row = views.nuclei.image_index().cpu() % views.num_rois
    return torch.bincount(roi_of_row[pairs.teacher_rows.cpu()], minlength=views.num_rois).tolist()


def _pick_queries(identity: Tensor, image_of: Tensor, queries: int) -> Tensor:
    """Rows to ask for: nuclei that occur in more than one image first, each nucleus once, spread evenly."""
    _, nucleus, seen = torch.unique(identity, dim=0, return_inverse=True, return_counts=True)
    candidates: Sequence[int] = torch.nonzero(seen[nucleus] > 1).flatten().tolist() or range(len(image_of))
    first_rows = list({int(nucleus[row]): row for row in reversed(candidates)}.values())
    first_rows.sort()
    chosen = np.linspace(0, len(first_rows) - 1, min(queries, len(first_rows))).round().astype(int)
    return torch.tensor([first_rows[i] for i in chosen], dtype=torch.long)
