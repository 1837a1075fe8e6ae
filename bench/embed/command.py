"""Time the protocols of `embed` with one encoder on the nuclei of a slide: windows that nuclei share, and a crop for
each; in nuclei per second and core, with peak memory."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.embed import timing
from bench.machine import environment
from bench.measure import quantiles
from bench.report import console, number, print_verdicts, table, write_json

WEIGHTS = "random:vit_small"
SQUARE_UM = 200.0
FIGURES = {"speedup": "{}x the nuclei per second of a crop for each"}
COLUMNS = ("version", "nuclei", "forwards", "s", "p20 .. p80", "nuclei/s", "x crop", "peak MB", "of which loaded")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slide", type=Path, help=f"slide or image ({timing.SLIDE} of $MUSE_FAST_DATA)")
    parser.add_argument("--weights", default=WEIGHTS, help="as for embed (%(default)s)")
    parser.add_argument("--window", type=int, nargs="+", default=[224], help="sides of windows in pixels (%(default)s)")
    parser.add_argument(
        "--square", type=float, default=SQUARE_UM, metavar="UM", help="crops only of a square (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds in which every version is timed once")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")


def main(options: argparse.Namespace) -> int:
    """Print a table; exit code 0."""
    if options.rounds < 2:
        options.parser.error("expected --rounds 2 or more")
    torch.set_num_threads(1)  # rates are per core
    out = console()
    with tempfile.TemporaryDirectory() as scratch:
        slide = timing.find_slide(options.slide, Path(scratch))
        xy = timing.find_nuclei(slide)
        inside = timing.in_square(slide, xy, options.square)
        if not inside.any():
            options.parser.error(f"no nuclei in a square of {options.square:g} um in the middle of {slide.path}")
        case = timing.Case(slide, xy, inside, options.weights, options.device)
        report: dict[str, Any] = {
            "environment": environment(options.device),
            "slide": slide.path.name,
            "weights": options.weights,
            "square_um": options.square,
        }
        out.print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
        out.print(f"{slide.path.name}: {len(xy):,} nuclei, {inside.sum():,} of them as crops; {options.weights}")
        versions = [timing.Version("crop"), *(timing.Version("map", side) for side in options.window)]
        report["results"] = rows = measure(case, versions, options.rounds)
    add_speedups(rows)
    if options.json:
        write_json(options.json, report)
    out.print(table(COLUMNS, [cells(one) for one in rows]))
    print_verdicts(out, rows, FIGURES)
    return 0


def measure(case: timing.Case, versions: Sequence[timing.Version], rounds: int) -> list[dict[str, Any]]:
    """A row per version; the versions are timed in turns."""
    jobs = {version: case.job(version) for version in versions}
    times: dict[timing.Version, list[float]] = {version: [] for version in versions}
    for _ in range(rounds):
        for version, job in jobs.items():
            times[version].append(case.milliseconds(job))
    return [row(case, version, times[version]) for version in versions]


def row(case: timing.Case, version: timing.Version, times: Sequence[float]) -> dict[str, Any]:
    memory, figures, nuclei = timing.memory(case, version), quantiles(times), len(case.nuclei(version))
    return {
        "version": str(version),
        "nuclei": nuclei,
        "forwards": nuclei if version.protocol == "crop" else memory.windows,
        **figures,
        "nuclei_per_s": nuclei / figures["median_ms"] * 1e3,
        "peak_mb": memory.peak / 1e6,
        "loaded_mb": memory.loaded / 1e6,
    }


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Compare with the first row, that of the crops."""
    for one in rows[1:]:
        one["speedup"] = reached = one["nuclei_per_s"] / rows[0]["nuclei_per_s"]
        target = {"figure": "speedup", "reached": reached, "at_least": timing.TARGET, "met": reached >= timing.TARGET}
        one["targets"] = [target]


def cells(one: dict[str, Any]) -> list[str]:
    return [
        one["version"],
        f"{one['nuclei']:,}",
        f"{one['forwards']:,}",
        number(one["median_ms"] / 1e3),
        f"{number(one['p20_ms'] / 1e3)} .. {number(one['p80_ms'] / 1e3)}",
        number(one["nuclei_per_s"]),
        number(one["speedup"]) if "speedup" in one else "",
        number(one["peak_mb"]),
        number(one["loaded_mb"]),
    ]
