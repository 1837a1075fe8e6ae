"""``python -m muse_fast.evaluate points --predictions DIR --truth DIR --mpp 0.5 [--protocol NAME] [--json OUT]``

Scores files of predicted points against files of true points. Each folder contains one CSV per image,
``x,y[,label][,score]`` in pixels; files of the same image have the same name. Output folders of `muse_fast.predict`
also work: ``IMAGE/cells.csv`` counts as ``IMAGE.csv``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from muse_fast.errors import UserError, require
from muse_fast.images.mpp import check_mpp
from muse_fast.images.points import Points
from muse_fast.images.points_csv import read_class_names, read_points
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.folders import iter_files
from muse_fast.runtime.options import split_list
from muse_fast.runtime.progress_bar import ProgressBar
from muse_fast.scoring.protocols import PROTOCOLS, find_protocol
from muse_fast.scoring.scores import evaluate, evaluate_all, figures_table, scores_table
from muse_fast.version import __version__

ALL = "all"
CELLS = "cells.csv"  # one per image folder, written by `muse_fast.predicting.files`


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Raises:
        UserError: files are missing on one side or unreadable, only one side has labels, or as `evaluate`.
    """
    args = _parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    predictions, truths, classes = _read(args)
    boxes = sum(len(points.xy) for points in predictions), sum(len(points.xy) for points in truths)
    console.print(f"{args.predictions}: {boxes[0]} points in {len(truths)} images, against {boxes[1]} in {args.truth}")
    if all(points.score is None for points in predictions):
        console.print("no scores: points are ranked by their order in the file")
    options = {"radius_um": args.radius, "draws": args.draws, "seed": args.seed}
    if args.protocol == ALL:
        with ProgressBar("scoring") as bar:
            scores, skipped = evaluate_all(
                predictions, truths, args.mpp, max(1, len(classes)), **options, progress=bar.show
            )
    else:
        one = evaluate(predictions, truths, args.mpp, max(1, len(classes)), args.protocol, **options)
        scores, skipped = {args.protocol: one}, {}
        console.print(figures_table(one, classes))
    console.print(scores_table(scores, classes))
    for name, reason in skipped.items():
        console.print(f"{name} skipped: {reason}")
    if args.json is not None:
        report = {
            "predictions": str(args.predictions),
            "truth": str(args.truth),
            "mpp": args.mpp,
            "classes": classes,
            "protocols": {name: asdict(one) for name, one in scores.items()},
            "left_out": skipped,
            "bootstrap": {"draws": args.draws, "seed": args.seed},
            "muse_fast": __version__,
        }
        write_json(args.json, report)
        console.print(f"numbers in {args.json}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.evaluate points", description="Score detected points against annotated ones."
    )
    parser.add_argument("--predictions", type=Path, required=True, metavar="DIR", help="x,y[,label][,score] CSVs")
    parser.add_argument("--truth", type=Path, required=True, metavar="DIR", help="CSVs with the same names")
    parser.add_argument("--mpp", required=True, help="um per pixel of the images")
    parser.add_argument("--protocol", default=ALL, help=f"{ALL} ({', '.join(PROTOCOLS)}), or one of them")
    parser.add_argument(
        "--radius", type=float, metavar="UM", help="maximal distance of a pair in um; default: the protocol's"
    )
    parser.add_argument("--classes", default="", help="names of the labels 0, 1, ..., separated by commas")
    parser.add_argument("--ignore-labels", action="store_true", help="score detection only")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap samples for the intervals (2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of those samples (0)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all numbers to this new file")
    args = parser.parse_args(argv)
    args.mpp = check_mpp(args.mpp, "--mpp")
    if args.protocol != ALL:
        find_protocol(args.protocol)
    require(args.draws >= 0, "--draws", args.draws, "0 or more")
    require(args.seed >= 0, "--seed", args.seed, "0 or more")
    if args.json is not None and args.json.exists():
        raise UserError(f"{args.json} exists already; remove it or choose another --json")
    return args


def _read(args: argparse.Namespace) -> tuple[list[Points], list[Points], list[str]]:
    """Read points per image, and the names of the classes; no names if only detection can be scored."""
    predicted, true = _matching_files(args.predictions, args.truth)
    classes = split_list(args.classes)
    tables = {path: read_points(path, math.inf, math.inf, len(classes)) for path in predicted + true}
    labelled = not args.ignore_labels and any(points.label is not None for points in tables.values())
    for path, points in tables.items():
        if labelled and len(points) and (points.label is None or points.label.min() < 0):
            raise UserError(f"{path}: points without a label, but others have one; add it, or use --ignore-labels")
    if labelled:
        highest = max(int(points.classes().max(initial=0)) for points in tables.values())
        names = _class_names(list(tables), classes)
        classes = classes or [names.get(label, str(label)) for label in range(highest + 1)]
    found, truth = (
        [tables[path] if labelled else Points(tables[path].xy, score=tables[path].score) for path in paths]
        for paths in (predicted, true)
    )
    return found, truth, classes if labelled else []


def _class_names(paths: Sequence[Path], classes: Sequence[str]) -> dict[int, str]:
    """Names of the labels from ``--classes`` and the ``class`` columns of the files; UserError if they disagree."""
    names, origin = dict(enumerate(classes)), dict.fromkeys(range(len(classes)), "--classes")
    for path in paths:
        for label, name in read_class_names(path).items():
            if names.setdefault(label, name) != name:
                raise UserError(
                    f"{path} calls label {label} {name!r}, {origin[label]} {names[label]!r}: these labels are not "
                    "comparable. Use the same numbers, or score only detection with --ignore-labels"
                )
            origin.setdefault(label, str(path))
    return names


def _matching_files(predictions: Path, truth: Path) -> tuple[list[Path], list[Path]]:
    """The files of both folders in the same order; UserError unless both contain the same images."""
    found, true = _files(predictions), _files(truth)
    if not true:
        raise UserError(f"{truth} has no .csv files; expected one per image, x,y[,label]")
    for folder, names, other in (
        (predictions, true.keys() - found.keys(), truth),
        (truth, found.keys() - true.keys(), predictions),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise UserError(
                f"{folder} lacks {shown}, which {other} has; an image without points needs a file with only the header"
            )
    return [found[name] for name in sorted(true)], [true[name] for name in sorted(true)]


def _files(folder: Path) -> dict[str, Path]:
    """CSVs of points by file name: those in ``folder``, or those written there by predict."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected one with a CSV of points per image")
    plain = {path.name: path for path in iter_files(folder, "*.csv")}
    return plain or {f"{path.parent.name}.csv": path for path in iter_files(folder, f"*/{CELLS}")}
