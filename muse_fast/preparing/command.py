"""``prepare SOURCE OUT [key=value ...]``: slides or labelled images to a ROI set."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

from muse_fast.errors import UserError
from muse_fast.preparing.audit import open_without
from muse_fast.preparing.build import Item, build_set, counted, print_summary
from muse_fast.preparing.parts import Parts
from muse_fast.preparing.slides import parts_folder, prepare_slides
from muse_fast.roiset.roiset import RoiSetWriter
from muse_fast.runtime import shares
from muse_fast.runtime.cli import written_to
from muse_fast.runtime.options import key_values
from muse_fast.runtime.progress_bar import track
from muse_fast.sources import Source, source_kinds
from muse_fast.sources.prepared import Prepared
from muse_fast.sources.wsi import Slides, usable_cpus
from muse_fast.version import __version__


def main(argv: Sequence[str]) -> int:
    args = argument_parser().parse_intermixed_args(argv)  # options may come before or after key=value
    with written_to(args.out):
        return prepare(args)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.prepare",
        description="Convert slides or labelled images to a ROI set. `inspect DIR` describes the dataset in a folder "
        "and how to prepare it, `audit SET OTHER ...` lists the slides and patients that two sets share.",
    )
    parser.add_argument("source", help=f"KIND:PATH with KIND one of {', '.join(source_kinds())}")
    parser.add_argument("out", type=Path, help="new folder for the ROI set")
    parser.add_argument(
        "--quality", type=int, default=95, choices=range(50, 101), metavar="50..100", help="quality of the JPEGs (95)"
    )
    parser.add_argument("options", nargs="*", metavar="key=value", help="settings of the source, e.g. mpp=0.25")
    slides = parser.add_argument_group("slides (wsi:)")
    slides.add_argument("--keep-parts", action="store_true", help="keep OUT.parts, to sample from it again")
    shares.add_arguments(parser)
    return parser


def prepare(args: argparse.Namespace) -> int:
    """Write the ROI set of one source; returns the exit code.

    Raises:
        UserError: the source cannot be used or yields no ROIs, or the set exists. Nothing half-written is left.
    """
    options = key_values(args.options)
    source = open_without(args.source, options)
    shown = ", ".join(f"{key}={value}" for key, value in options.items()) or "default settings"
    print(f"prepare {args.source} -> {args.out}  ({shown})", flush=True)
    options.pop("workers", None)  # the set does not depend on their number
    provenance = {
        "program": f"muse_fast {__version__}",
        "source": args.source,
        "options": options,
        "quality": args.quality,
    }
    if not isinstance(source, Slides):
        if args.task or args.keep_parts or args.slurm_tasks:
            raise UserError(f"{args.source}: --task, --keep-parts and --slurm-tasks are for slides (wsi:PATH)")
        return _prepare_images(source, args.out, provenance, args.quality)
    if args.slurm_tasks is not None:
        return _submit(args, source)
    return prepare_slides(
        source, args.out, provenance=provenance, quality=args.quality, keep_parts=args.keep_parts, share=args.task
    )


def _submit(args: argparse.Namespace, source: Slides) -> int:
    """Share the slides out over Slurm tasks, or over processes of this machine; returns the exit code.

    Raises:
        UserError: the settings cannot be used, ``OUT`` exists, or submission or a local job failed.
    """
    if args.out.exists():
        raise UserError(f"{args.out} exists already; remove it or choose another folder")
    jobs = shares.JobArray(args)
    Parts(parts_folder(args.out), source.options, args.quality)  # refuses what the tasks would refuse
    arguments = [args.source, str(args.out), "--quality", str(args.quality), *args.options]
    arguments += ["--keep-parts"] if args.keep_parts else []
    share_cores = args.local and not any(text.startswith("workers=") for text in args.options)
    workers = [f"workers={max(1, usable_cpus() // args.slurm_tasks)}"] if share_cores else []
    jobs.submit(main, arguments, len(source.files), of_a_task=workers)
    return 0


def _prepare_images(source: Source, out: Path, provenance: dict[str, Any], quality: int) -> int:
    started = time.monotonic()
    writer = RoiSetWriter(out, provenance=provenance, label_names=source.label_names, quality=quality)
    total = len(source) if isinstance(source, Sized) else None
    items = source.rois() if isinstance(source, Prepared) else source  # existing JPEGs are not encoded again
    images = track(_some(items, source, provenance["source"]), total, "ROIs")
    summary = build_set(writer, images, lambda folder: {"dropped": dict(source.dropped)})
    print_summary(out, summary, time.monotonic() - started)
    return 0


def _some(items: Iterable[Item], source: Source, spec: str) -> Iterator[Item]:
    """Yield the items of a source.

    Raises:
        UserError: at the end, if there were none.
    """
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise UserError(f"{spec} yielded no ROIs; skipped: {counted(source.dropped)}")
