"""Find slides and patients that two sets share: test slides must not be trained on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from muse_fast.errors import UserError
from muse_fast.images.tables import csv_rows
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime import exit_codes
from muse_fast.runtime.options import expanded, split_list
from muse_fast.sources import Source, open_source
from muse_fast.sources.names import Names
from muse_fast.sources.wsi import Slides

_SLIDE_COLUMNS = ("slide", "slide_name", "image", "wsi", "wsi_name", "name")


def read_names(side: str) -> Names:
    """Read the names of the slides of a ROI set, a source or a list; ``@SPLIT`` at the end selects one split.

    A list is a CSV with a column ``slide``, or a text file with one name per line.

    Raises:
        UserError: ``side`` is not one of these, has no such split or contains no slides.
    """
    target, split = _without_split(expanded(side))
    if (Path(target) / "roiset.json").is_file():
        slides = RoiSet(target).slides_of(split)
    elif Path(target).is_file():
        slides = _listed(Path(target))
    elif ":" in target:
        slides = _of_source(target, split)
    else:
        raise UserError(f"{side}: expected the folder of a ROI set, a source such as brcam2c:DIR, or a file of names")
    if not slides:
        raise UserError(f"{side} contains no slides")
    return Names.of(slides)


def open_without(spec: str, values: Mapping[str, str]) -> Source:
    """Open a source. The option ``exclude=SET[,SET ...]`` of ``wsi:`` excludes slides that share a slide or a patient
    with one of the sets.

    Raises:
        UserError: raised by `open_source` or `read_names`, or ``exclude`` was set for another source.
    """
    source = open_source(spec, **{key: value for key, value in values.items() if key != "exclude"})
    if "exclude" in values:
        if not isinstance(source, Slides):
            raise UserError(f"{spec}: exclude={values['exclude']} is only for slides (wsi:PATH)")
        source.exclude({side: read_names(side) for side in split_list(values["exclude"])})
    return source


def _of_source(spec: str, split: str) -> list[str]:
    pairs = set(open_source(spec).slides())
    splits = {name for _, name in pairs}
    if split and split not in splits:
        raise UserError(f"{spec}: no split {split!r}, it has {', '.join(sorted(filter(None, splits))) or 'none'}")
    return [slide for slide, name in pairs if split in ("", name)]


def _without_split(side: str) -> tuple[str, str]:
    target, at, split = side.rpartition("@")
    path = Path(side.partition(":")[2] or side)
    return (target, split) if at and "/" not in split and not path.exists() else (side, "")


def _listed(path: Path) -> list[str]:
    rows = [(number, values) for number, values in csv_rows(path) if any(values)]
    header = [name.lower() for name in rows[0][1]] if rows else []
    column = next((header.index(name) for name in _SLIDE_COLUMNS if name in header), None)
    names = []
    for number, values in rows if column is None else rows[1:]:
        name = values[column or 0] if len(values) > (column or 0) else ""
        if not name or (column is None and (any(values[1:]) or {";", "\t"} & set(name))):
            expected = f"one name per line, or a CSV with a column {', '.join(_SLIDE_COLUMNS)}"
            raise UserError(f"{path}, row {number}: {','.join(values)!r}, expected {expected}")
        names.append(name)
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 1 if the first set shares a slide or a patient with one of the others."""
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.prepare audit",
        description="Print slides and TCGA patients that two sets share. Exit code 1 if there are any, else 0.",
    )
    parser.add_argument("first", metavar="SET", help="ROI set, SOURCE or file of names; add @SPLIT to select one split")
    parser.add_argument("others", metavar="OTHER", nargs="+", help="sets to compare it with")
    options = parser.parse_args(argv)
    return audit(options.first, options.others)


def audit(first: str, others: Sequence[str]) -> int:
    """Print the slides and patients that ``first`` shares with each of the others; return the exit code."""
    mine = read_names(first)
    any_shared = False
    print(f"{first}: {len(mine.slides)} slides, {len(mine.patients)} TCGA patients")
    for other in others:
        theirs = read_names(other)
        shared = mine & theirs
        any_shared |= bool(shared.slides or shared.patients)
        print(f"{other}: {len(theirs.slides)} slides, {len(theirs.patients)} TCGA patients")
        print(f"  shared slides   {', '.join(sorted(shared.slides)) or 'none'}")
        print(f"  shared patients {', '.join(sorted(shared.patients)) or 'none'}")
    return exit_codes.FOUND if any_shared else 0
