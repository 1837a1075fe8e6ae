"""Train with either or both losses, at one magnification or several, or with classes, and compare the features."""

from __future__ import annotations

import argparse
import math
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.ablation import compare, runs
from bench.ablation.pool import in_turn, processes
from bench.machine import environment
from bench.report import console, table, write_json
from muse_fast.errors import UserError

SEEDS, SCALES = [0, 1, 2], [0.5, 0.25]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rois", type=Path, required=True, help="ROI set with classes and the splits train, val, test")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; finished runs are kept")
    parser.add_argument("--config", default="ablation", help="YAML file or name of a shipped config (ablation)")
    again = "; may be repeated"
    parser.add_argument("--seed", type=int, action="append", help=f"seed of all variants (0, 1 and 2){again}")
    parser.add_argument("--variant", choices=runs.VARIANTS, action="append", help=f"variant to run (all){again}")
    parser.add_argument("--mpp", type=float, action="append", help=f"um/px of the test (0.5 and 0.25){again}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores (1)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="skip runs that might not end within this time")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings of all runs, such as optim.steps=300"
    )


def main(options: argparse.Namespace) -> int:
    """Print a table per figure; exit code 1 if nothing was trained."""
    if options.jobs < 1:
        options.parser.error(f"--jobs {options.jobs}: expected at least 1")
    try:
        report = _measure(options, console())
    except UserError as error:
        options.parser.error(str(error))
    except BrokenProcessPool:
        options.parser.error("the process of a run was killed, perhaps for lack of memory: lower --jobs")
    return 0 if any(row["variant"] != runs.UNTRAINED for row in report["results"]) else 1


def _measure(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    report: dict[str, Any] = {"environment": environment(options.device), "settings": options.settings}
    report |= {"config": Path(options.config).name, "jobs": options.jobs, "results": [], "left_out": []}
    scales = options.mpp or SCALES
    study = runs.Study(
        rois=options.rois,
        out=options.out,
        config=options.config,
        settings=tuple(options.settings),
        device=options.device,
        scales=tuple(scales),
    )
    cases = [(variant, seed) for seed in options.seed or SEEDS for variant in runs.in_order(options.variant)]
    report["recipe"] = runs.recorded(study.config_of(*cases[0]))  # with the first seed
    rows: list[runs.Row] = []
    with processes(options.jobs) as pool:
        for case, row in in_turn(pool, options.jobs, cases, options.seconds, study.measured):
            if row is None:
                report["left_out"].append(dict(zip(("variant", "seed"), case, strict=True)))
                out.print(f"{case[0]}, seed {case[1]}: skipped, because it would not finish in time")
                continue
            rows = sorted([*rows, row], key=lambda one: cases.index((one["variant"], one["seed"])))
            report["results"] = [compare.without_counts(one) for one in rows]
            _announce(out, row)
            if options.json:
                write_json(options.json, report)
    kinds = [(f"{mpp:g}", figure) for mpp in scales for figure in compare.FIGURES]
    report["differences"] = [d for kind in kinds for d in compare.differences(rows, *kind)]
    if options.json:
        write_json(options.json, report)
    for mpp, figure in kinds:
        _show(out, report, mpp, figure)
    return report


def _announce(out: Console, row: runs.Row) -> None:
    trained = f"{row['steps']} steps in {row['seconds_of_last_start']:.0f} s, " if "steps" in row else ""
    mpp, scores = next(iter(row["scores"].items()))
    balanced = ", ".join(f"{name} {figures['balanced_accuracy']:.1%}" for name, figures in scores.items())
    text = f"{row['variant']}, seed {row['seed']}: {trained}balanced accuracy at {mpp} um/px: {balanced}"
    out.print(text, soft_wrap=True)


def _show(out: Console, report: dict[str, Any], mpp: str, figure: str) -> None:
    spread = compare.spread(report["results"], mpp, figure)
    names = list(next(iter(spread.values()), ()))
    rows = [[variant, *(_cell(*found[name]) for name in names)] for variant, found in spread.items()]
    title = figure.replace("_", " ")
    out.print(f"\n{title} at {mpp} um/px on the test split in %, mean (min .. max) over the seeds")
    out.print(table(("variant", *names), rows))
    out.print("Differences in points with 95 % intervals over patients, per seed and of the mean over seeds:")
    for found in report["differences"]:
        if (found["mpp"], found["figure"]) == (mpp, figure):
            parts = [f"seed {one['seed']}: {_difference(one)}" for one in found["seeds"]]
            text = f"  {found['better']} - {found['worse']}, {found['classifier']}: {_difference(found['mean'])}"
            out.print(f"{text} ({', '.join(parts)})", soft_wrap=True)


def _cell(mean: float, least: float, most: float) -> str:
    return f"{mean:.1f} ({least:.1f} .. {most:.1f})"


def _difference(one: dict[str, Any]) -> str:
    low, high = one["ci95"]
    return f"{one['points']:+.1f} [{low:+.1f}, {high:+.1f}]"
