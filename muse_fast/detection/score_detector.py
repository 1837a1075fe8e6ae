"""``python -m muse_fast.evaluate detect --weights RUN_OR_CHECKPOINT --data SOURCE [--split test] [--json OUT]``

Detects nuclei in a split with a fine-tuned detector and scores them by every protocol.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from muse_fast.detection.detector import Detector, load_detector
from muse_fast.detection.samples import LabelledImage, class_names, known_nuclei, labelled_image, labels
from muse_fast.errors import UserError, require
from muse_fast.images.image_files import IMAGE_SUFFIXES
from muse_fast.images.points import Points
from muse_fast.images.points_csv import write_points
from muse_fast.runtime import distributed
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.device import pick_device
from muse_fast.runtime.options import split_source_options
from muse_fast.runtime.progress_bar import ProgressBar
from muse_fast.runtime.team import Team, joined
from muse_fast.scoring.scores import evaluate_all, scores_table
from muse_fast.sources import SourceImage, open_source
from muse_fast.version import __version__


def main(argv: Sequence[str]) -> int:
    """Run the command; ranks of torchrun share the images, and rank 0 scores what all have found.

    Raises:
        UserError: not a detector, a source with other classes, an empty split, or an output that already exists.
    """
    args = _parse(argv)
    with joined() as team:
        return _score(args, team)


def _score(args: argparse.Namespace, team: Team) -> int:
    began = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    device = pick_device(args.device, "--device", distributed.local_rank())
    detector = load_detector(args.weights, device)
    images = _read(args, detector.class_names)

    classes = len(detector.class_names)

    def detect(image: SourceImage) -> tuple[Any, ...]:
        at_scale = labelled_image(image, detector.mpp, classes, detector.tile_size)
        points = in_source_pixels(detect_image(detector, at_scale), at_scale)
        return points.xy, points.label, points.score

    with ProgressBar("detection") as bar, torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        columns = team.map(detect, images, lambda done: bar.show(done, len(images), "images"))
    if not team.is_main:
        return 0
    found = [Points(*of_image) for of_image in columns]
    truths = [known_nuclei(image.xy, labels(image, classes)) for image in images]
    detected, annotated = (sum(len(points.xy) for points in some) for some in (found, truths))
    console.print(
        f"{args.data}, {args.split or 'all'}: {detected} nuclei in {len(images)} images, {annotated} annotated"
    )
    with ProgressBar("scoring") as bar:
        scores, skipped = evaluate_all(
            found,
            truths,
            [image.mpp for image in images],
            classes,
            args.radius,
            draws=args.draws,
            seed=args.seed,
            progress=bar.show,
        )
    console.print(scores_table(scores, detector.class_names))
    for name, reason in skipped.items():
        console.print(f"{name} skipped: {reason}")
    if args.csv is not None:
        for image, points in zip(images, found, strict=True):
            write_points(args.csv / _csv_of(image), points.xy, points.classes(), points.confidence())
        console.print(f"points in {args.csv}")
    if args.json is not None:
        report = {
            "weights": args.weights,
            "data": args.data,
            "split": args.split,
            "detector": dataclasses.asdict(detector.spec),
            "images": len(images),
            "detected": detected,
            "annotated": annotated,
            "protocols": {name: dataclasses.asdict(one) for name, one in scores.items()},
            "left_out": skipped,
            "bootstrap": {"draws": args.draws, "seed": args.seed},
            "muse_fast": __version__,
            "seconds": time.perf_counter() - began,
        }
        write_json(args.json, report)
        console.print(f"numbers in {args.json}")
    return 0


def detect_images(detector: Detector, images: Sequence[LabelledImage]) -> list[Points]:
    """`detect_image` of each of ``images``."""
    return [detect_image(detector, image) for image in images]


def detect_image(detector: Detector, image: LabelledImage) -> Points:
    """Detect nuclei in the annotated region of an image at the detector's um per pixel, in pixels of this image.

    The detector also sees tissue around the region, enough on either side to fill a tile.
    """
    x, y, width, height = image.box()
    across, down = (max(0, detector.tile_size - side) // 2 for side in (width, height))
    left, top = max(0, x - across), max(0, y - down)
    field = image.image[:, top : y + height + down, left : x + width + across]
    (points,) = detector.detect(field[None].to(next(detector.parameters()).device))
    xy = points.xy + np.array([left, top], np.float32)
    column, row = np.minimum(xy.astype(np.int64), (image.image.shape[2] - 1, image.image.shape[1] - 1)).T
    inside = image.region.numpy()[row, column]
    return Points(xy, points.label, points.confidence()).take(inside)


def in_source_pixels(points: Points, image: LabelledImage) -> Points:
    """Convert points of ``image`` to pixels of the source's image."""
    xy = (points.xy - np.array(image.corner)) / np.array(image.scale)
    return Points(xy.astype(np.float32), points.label, points.score)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.evaluate detect", description="Score a fine-tuned detector."
    )
    parser.add_argument("--weights", required=True, help="run of muse_fast.finetune (best detector), or a checkpoint")
    parser.add_argument("--data", required=True, help="annotated source, e.g. brcam2c:DIR")
    parser.add_argument("--split", default="test", help="split of the source (test); '' uses all images")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16")
    parser.add_argument(
        "--radius", type=float, metavar="UM", help="maximal distance of a pair in um; default: the protocol's"
    )
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap samples for the intervals (2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of those samples (0)")
    parser.add_argument("--csv", type=Path, metavar="DIR", help="write the detected points to this new folder")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all numbers to this new file")
    parser.add_argument("options", nargs="*", metavar="source.key=value", help="options of the source")
    args = parser.parse_intermixed_args(argv)
    args.source_options, others = split_source_options(args.options)
    if others:
        raise UserError(f"'{others[0]}': only options of the source are allowed here, as source.key=value")
    require(args.draws >= 0, "--draws", args.draws, "0 or more")
    require(args.seed >= 0, "--seed", args.seed, "0 or more")
    for key in ("csv", "json"):
        place = getattr(args, key)
        if place is not None and place.exists():
            raise UserError(f"{place} exists already; remove it or choose another --{key}")
    return args


def _read(args: argparse.Namespace, names: tuple[str, ...]) -> list[SourceImage]:
    source = open_source(args.data, **args.source_options)
    classes = class_names(source)
    if classes != names:
        raise UserError(
            f"{args.data} has the classes {', '.join(classes)}, but {args.weights} was trained on "
            f"{', '.join(names)}: their labels are not comparable"
        )
    images = [image for image in source if args.split in ("", image.split)]
    if not images:
        raise UserError(f"{args.data} has no images in the split {args.split!r}; --split '' uses all")
    if args.csv is not None:
        name, count = Counter(map(_csv_of, images)).most_common(1)[0]
        if count > 1:
            raise UserError(f"{args.data} has {count} images whose points would be in {name}; leave out --csv")
    return images


def _csv_of(image: SourceImage) -> str:
    """Name of the table of an image: that of its file, or of its ROI, in which a dot begins no suffix."""
    path = Path(image.name)
    return f"{path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name}.csv"
