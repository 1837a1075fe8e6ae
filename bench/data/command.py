"""Time the data path from the ROI set to batches of views, each stage and the whole: rates per second and core."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.data import timing
from bench.machine import environment
from bench.report import console, number, print_verdicts, table, write_json

FIGURES = {"speedup_all": "{}x the rate of decoding whole ROIs"}
COLUMNS = ("stage", "ms per ROI", "p20 .. p80", "ROI/s", "share of the loader's time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, metavar="DIR", help="images at 0.25 um/px to cut the ROIs from")
    parser.add_argument("--rois", type=int, default=8, help="number of ROIs, all in one batch")
    parser.add_argument("--side", type=int, default=2048, help="side of a ROI in pixels")
    parser.add_argument("--size", type=int, choices=timing.SIZES, help="side of a global view in pixels (all sizes)")
    parser.add_argument("--rounds", type=int, default=9, help="number of rounds in which every stage is timed once")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")


def main(options: argparse.Namespace) -> int:
    """Print a table per set and size; exit code 1 if pixels are wrong."""
    if options.rounds < 2 or options.rois < 1:
        options.parser.error("expected --rounds 2 or more and --rois 1 or more")
    torch.set_num_threads(1)  # rates are per core
    out, folder = console(), options.images or timing.real_images()
    report: dict[str, Any] = {"environment": environment(options.device), "results": []}
    out.print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    kind = f"crops of {folder}" if folder.is_dir() else f"procedural, because {folder} is not a folder"
    out.print(f"{options.rois} ROIs of {options.side} px: {kind}; detecting nuclei ...", markup=False)
    report["rois"] = {"side": options.side, "source": folder.name if folder.is_dir() else "synthetic"}
    images = list(timing.images(folder, options.rois, options.side))
    if not images:
        options.parser.error(f"no images in {folder}")
    with tempfile.TemporaryDirectory() as scratch:
        for number_of_set, encoding in enumerate(timing.ENCODINGS):
            roiset = timing.write_set(Path(scratch, str(number_of_set)), images, encoding)
            for size in [options.size] if options.size else sorted(timing.SIZES):
                about = {"encoding": encoding, "size": size}
                case = timing.run_case(roiset, timing.SIZES[size], options.rounds, options.device)
                add_target(case["results"], size)
                show(out, about, case)
                report["results"].append(about | case)
                if options.json:
                    write_json(options.json, report)
    return 1 if any("wrong" in row for case in report["results"] for row in case["results"]) else 0


def add_target(rows: list[timing.Row], size: int) -> None:
    for row in rows:
        if "speedup_all" in row and size in timing.TARGETS:
            reached, wanted = row["speedup_all"], timing.TARGETS[size]
            verdict = {"figure": "speedup_all", "reached": reached, "at_least": wanted, "met": reached >= wanted}
            row["targets"] = [verdict]


def show(out: Console, about: dict[str, Any], case: dict[str, Any]) -> None:
    local = timing.SIZES[about["size"]].local_size
    out.print(f"\n{about['encoding']} ({case['jpeg_bytes'] / 1e6:.2f} MB), views of {about['size']} and {local} px")
    for placement in ("anchored", "uniform"):
        seen = case[placement]
        out.print(
            f"{placement} views: {seen['rows']:.0%} of the rows decoded, {seen['window']:.0%} of the pixels seen, "
            f"{number(seen['nuclei_of_views'])} nuclei and {number(seen['pairs'])} pairs per ROI"
        )
    timed = [row for row in case["results"] if "median_ms" in row]
    whole = {row["version"]: row["median_ms"] for row in timed}.get("loader cpu")
    out.print(table(COLUMNS, [cells(row, whole) for row in timed]))
    print_verdicts(out, case["results"], FIGURES)


def cells(row: timing.Row, whole: float | None) -> list[str]:
    return [
        row["version"],
        number(row["median_ms"]),
        f"{number(row['p20_ms'])} .. {number(row['p80_ms'])}",
        number(row["roi_per_s"]),
        f"{row['median_ms'] / whole:.0%}" if whole else "",
    ]
