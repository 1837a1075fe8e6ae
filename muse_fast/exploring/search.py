"""``python -m muse_fast.embed search H5AD ... --like SLIDE:X,Y --out DIR``: the nuclei most similar to one."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from muse_fast.errors import UserError, did_you_mean
from muse_fast.exploring.crops import read_crops
from muse_fast.exploring.neighbours import Neighbours, Place, describe, find_neighbours, nearest_nucleus
from muse_fast.exploring.vectors import Nucleus, VectorFile, find_vectors, open_vectors
from muse_fast.images.drawing import CAPTION, GAP, INK, Sheet
from muse_fast.images.tables import parse_number
from muse_fast.runtime.atomic import new_folder
from muse_fast.runtime.cli import written_to
from muse_fast.runtime.names import key_of, text_of

SHEET, TABLE = "search.png", "search.csv"
NEAR_UM = 20.0  # a nucleus farther from the given point is not the one that was meant
MOST_DRAWN = 200  # crops in the sheet, with that of the query
_CROP_UM, _CELL, _COLUMNS = 32.0, 128, 10
_HEADER = (
    "rank", "slide", "nucleus", "similarity", "class", "score", "x", "y", "x_um", "y_um", "file",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.embed search", description="Find the nuclei most similar to one, by cosine."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="H5AD", help="files of embed, or folders with them")
    parser.add_argument("--like", required=True, metavar="SLIDE:X,Y", help="the nucleus nearest to X,Y, level-0 pixels")
    parser.add_argument("--top", type=int, default=50, help="number of nuclei (50)")
    help_ = "leave out nuclei of the same slide nearer than this to the query; inf: all of its slide (0)"
    parser.add_argument("--apart", type=float, default=0.0, metavar="UM", help=help_)
    parser.add_argument("--out", type=Path, required=True, help=f"new folder, for {TABLE} and {SHEET}")
    parser.add_argument("--slides", type=Path, metavar="DIR", help="where the slides are now, if they have moved")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise UserError(f"--top {args.top}: expected 1 or more")
    if not args.apart >= 0:
        raise UserError(f"--apart {args.apart}: expected 0 or more um")
    files = open_vectors(find_vectors(args.files))
    with written_to(args.out):
        search(files, args.like, args.top, args.out, apart_um=args.apart, folder=args.slides)
    return 0


def search(
    files: Sequence[VectorFile], like: str, top: int, out: Path, *, apart_um: float = 0.0, folder: Path | None = None
) -> None:
    """Write the ``top`` nuclei most similar to one as a table and a sheet of crops into the new folder ``out``.

    Args:
        files: from `open_vectors`.
        like: ``SLIDE:X,Y``, see `find_query`.
        apart_um: see `find_neighbours`.
        folder: where the slides are now; None: where they were.

    Raises:
        UserError: ``like`` names no nucleus, or ``out`` exists already.
    """
    query = find_query(files, like)
    with new_folder(out) as built:
        found = find_neighbours(files, [query], top, apart_um=apart_um)[0]
        found = Neighbours([query, *found.places], np.append(1.0, found.similarity))
        nuclei = describe(files, found.places)
        _write_table(built / TABLE, files, found, nuclei)
        problems = _draw(built / SHEET, files, found, nuclei, folder)
    print(f"{out}: {len(nuclei) - 1} nuclei most similar to {text_of(nuclei[0].name)}, of {len(files)} slides")
    for slide, problem in problems.items():
        print(f"no crops of {text_of(slide)}: {problem}")


def find_query(files: Sequence[VectorFile], like: str) -> Place:
    """The nucleus that ``SLIDE:X,Y`` means: the nearest to that point, in level-0 pixels.

    Raises:
        UserError: another form, no such slide, or no nucleus within `NEAR_UM`; names the slides or the distance.
    """
    slide, _, point = like.rpartition(":")
    numbers = [parse_number(part) for part in point.split(",")]
    if not slide or len(numbers) != 2 or not np.isfinite(numbers).all():
        raise UserError(f"--like {like}: expected SLIDE:X,Y with X and Y in level-0 pixels, such as a:1200,850.5")
    names = [key_of(file.slide) for file in files]
    if key_of(slide) not in names:
        some = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
        raise UserError(f"--like {like}: no slide {slide}, only {some}{did_you_mean(slide, names)}")
    number = names.index(key_of(slide))
    file = files[number]
    row, distance = nearest_nucleus(file, *numbers)
    if row < 0:
        raise UserError(f"--like {like}: {file.path} has no nuclei")
    if distance * file.slide_mpp > NEAR_UM:
        nearest = file.nuclei([row])[0]
        raise UserError(
            f"--like {like}: no nucleus within {NEAR_UM:g} um; the nearest is {distance * file.slide_mpp:.1f} um "
            f"({distance:.0f} px) away, at {nearest.x:.1f},{nearest.y:.1f}"
        )
    return Place(number, row)


def _write_table(path: Path, files: Sequence[VectorFile], found: Neighbours, nuclei: Sequence[Nucleus]) -> None:
    """One row per nucleus, the query with rank 0."""
    with open(path, "w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(_HEADER)
        for rank, (place, nucleus, value) in enumerate(zip(found.places, nuclei, found.similarity, strict=True)):
            file = files[place.file]
            x_um, y_um = nucleus.x * file.slide_mpp, nucleus.y * file.slide_mpp
            numbers = [f"{number:.2f}" for number in (nucleus.x, nucleus.y, x_um, y_um)]
            start = [rank, text_of(file.slide), text_of(nucleus.name), f"{value:.6f}", nucleus.kind]
            score = "" if math.isnan(nucleus.score) else f"{nucleus.score:.4f}"
            writer.writerow([*start, score, *numbers, text_of(file.path)])


def _draw(
    path: Path, files: Sequence[VectorFile], found: Neighbours, nuclei: Sequence[Nucleus], folder: Path | None
) -> dict[str, str]:
    """Write the sheet; returns why crops of some slides are missing."""
    places, nuclei = found.places[:MOST_DRAWN], nuclei[:MOST_DRAWN]
    xy = np.array([(nucleus.x, nucleus.y) for nucleus in nuclei])
    crops = read_crops(files, np.array([place.file for place in places]), xy, _CROP_UM, _CELL, folder)
    columns = min(_COLUMNS, len(places))
    step_x, step_y = _CELL + GAP, _CELL + 2 * CAPTION
    sheet = Sheet(max(GAP + columns * step_x, 560), GAP + CAPTION + math.ceil(len(places) / columns) * step_y)
    sheet.text(GAP, GAP, f"the query (framed) and the nuclei most similar to it, with cosine; crops of {_CROP_UM:g} um")
    shown = zip(places, nuclei, crops.pictures, found.similarity.tolist(), strict=False)
    for rank, (place, nucleus, crop, value) in enumerate(shown):
        left, top = GAP + rank % columns * step_x, GAP + CAPTION + GAP + rank // columns * step_y
        sheet.cell(left, top, crop, None if rank else INK, f"{rank}   {value:.3f}" if rank else "query")
        where = text_of(files[place.file].slide)[:16] if len(files) > 1 else f"{nucleus.x:.0f}, {nucleus.y:.0f}"
        sheet.text(left + 2, top + _CELL + CAPTION - 4, where)
    sheet.save(path)
    return crops.problems
