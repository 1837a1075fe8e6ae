"""Run short pretrainings with either or both losses, at one magnification or several, and compare the features."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.ablation import runs
from bench.machine import environment
from bench.report import console, table, write_json
from muse_fast.errors import UserError

FIGURES = {"balanced": "balanced accuracy", "accuracy": "accuracy"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rois", type=Path, required=True, help="ROI set with classes and the splits train, val, test")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; finished runs are kept")
    parser.add_argument("--config", default="ablation", help="YAML file or name of a shipped config (ablation)")
    again = "; may be repeated"
    parser.add_argument("--seed", type=int, action="append", help=f"seed of all variants (0 and 1){again}")
    parser.add_argument("--variant", choices=runs.VARIANTS, action="append", help=f"variant to run (all){again}")
    parser.add_argument("--mpp", type=float, action="append", help=f"um/px of the test (0.5 and 0.25){again}")
    parser.add_argument("--seconds", type=float, default=math.inf, help="skip runs that might not end within this time")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings of all runs, such as optim.steps=300"
    )


def main(options: argparse.Namespace) -> int:
    """Print a table per figure; exit code 1 if nothing was trained."""
    try:
        report = _measure(options, console())
    except UserError as error:
        options.parser.error(str(error))
    return 0 if any(row["variant"] != runs.UNTRAINED for row in report["results"]) else 1


def _measure(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    report: dict[str, Any] = {"environment": environment(options.device), "settings": options.settings}
    report |= {"config": Path(options.config).name, "results": [], "left_out": []}
    scales = options.mpp or [0.5, 0.25]
    tiles, num_classes = runs.cut(options.rois, scales)
    run = partial(
        runs.measured,
        rois=options.rois,
        out=options.out,
        config=options.config,
        settings=options.settings,
        device=options.device,
        tiles=tiles,
        num_classes=num_classes,
    )
    variants, seeds = options.variant or list(runs.VARIANTS), options.seed or [0, 1]
    for variant, seed, row in runs.in_turn(variants, seeds, options.seconds, run):
        if row is None:
            report["left_out"].append({"variant": variant, "seed": seed})
            out.print(f"{variant}, seed {seed}: skipped, because it would not finish in time")
            continue
        report["results"].append(row)
        trained = f"{row['steps']} steps in {row['seconds_of_last_start']:.0f} s, " if "steps" in row else ""
        mpp, scores = next(iter(row["scores"].items()))
        balanced = ", ".join(f"{name} {figures['balanced']:.1%}" for name, figures in scores.items())
        out.print(f"{variant}, seed {seed}: {trained}balanced accuracy at {mpp} um/px: {balanced}", soft_wrap=True)
        if options.json:
            write_json(options.json, report)
    kinds = [(f"{mpp:g}", figure) for mpp in scales for figure in FIGURES]
    report["differences"] = [d for kind in kinds for d in runs.differences(report["results"], *kind)]
    if options.json:
        write_json(options.json, report)
    for mpp, figure in kinds:
        _show(out, report, mpp, figure)
    return report


def _show(out: Console, report: dict[str, Any], mpp: str, figure: str) -> None:
    spread = runs.spread(report["results"], mpp, figure)
    names = list(next(iter(spread.values()), ()))
    rows = [[variant, *(_cell(*found[name]) for name in names)] for variant, found in spread.items()]
    out.print(f"\n{FIGURES[figure]} at {mpp} um/px on the test split in %, mean (min .. max) over the seeds")
    out.print(table(("variant", *names), rows))
    out.print("In the paper the first variant beats the second. Difference here in points, per seed:")
    for found in report["differences"]:
        if (found["mpp"], found["figure"]) == (mpp, figure):
            points = ", ".join(f"{value:+.1f}" for value in found["points"])
            out.print(f"  {found['better']} over {found['worse']}, {found['classifier']}: {points}")


def _cell(mean: float, least: float, most: float) -> str:
    return f"{mean:.1f} ({least:.1f} .. {most:.1f})"
