"""Fine-tune a detector from a pretraining and from random weights, with few or many steps and labels; compare F1."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.finetune import runs
from bench.finetune.runs import Case
from bench.machine import environment
from bench.report import console, table, write_json
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.samples import class_names, labelled_image
from muse_fast.errors import UserError
from muse_fast.runtime.options import load_settings, split_source_options
from muse_fast.sources import open_source

CASES = (Case(100, 1.0), Case(100, 0.1), Case(300, 1.0))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="annotated source with train, val and test, e.g. brcam2c:DIR")
    parser.add_argument(
        "--pretrained",
        required=True,
        help="run of pretrain or other weights; {seed} is replaced",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; finished runs are kept")
    parser.add_argument("--config", default="finetune_brcam2c_cpu", help="YAML file or name of a shipped config")
    again = "; may be repeated"
    parser.add_argument("--seed", type=int, action="append", help=f"seed of all cases (0, 1 and 2){again}")
    cases = ", ".join(f"{case.steps}:{case.fraction:g}" for case in CASES)
    parser.add_argument(
        "--case",
        type=_case,
        action="append",
        metavar="STEPS:FRACTION",
        help=f"steps, share of the images ({cases}){again}",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings of all runs, and options of the source (source.KEY=...)",
    )


def main(options: argparse.Namespace) -> int:
    """Print a table; exit code 0."""
    try:
        _measure(options, console())
    except UserError as error:
        options.parser.error(str(error))
    return 0


def _measure(options: argparse.Namespace, out: Console) -> None:
    study = _study(options)
    cases, seeds = options.case or CASES, options.seed or [0, 1, 2]
    report: dict[str, Any] = {
        "environment": environment(options.device),
        "config": Path(options.config).name,
        "settings": options.settings,
        "images": {"train": study.train_images, "test": len(study.test)},
        "results": [],
    }
    tested: dict[Case, list[runs.Tested]] = {case: [] for case in cases}
    for seed, case, start in product(seeds, cases, runs.STARTS):
        row, found = study.run(start, case, seed)
        tested[case].append(found)
        report["results"].append(row)
        val = ", ".join(f"{100 * one['val_f1']:.1f}" for one in row["val_f1"])
        out.print(f"{start}, seed {seed}, {case}: {row['seconds']:.0f} s, mean F1 on val {val}", soft_wrap=True)
        report["cases"] = [{**case._asdict(), "mean_f1": runs.compared(some)} for case, some in tested.items()]
        if options.json:
            write_json(options.json, report)
    _show(out, report)


def _study(options: argparse.Namespace) -> runs.Study:
    source_options, settings = split_source_options(options.settings)
    config = load_settings(FinetuneConfig, options.config, settings)
    source = open_source(options.data, **source_options)
    classes, train_images, test = len(class_names(source)), 0, []
    for image in source:
        train_images += config.data.train in ("", image.split)
        if image.split == "test":
            test.append(labelled_image(image, config.data.mpp, classes, config.data.sample_size))
    if not test:
        raise UserError(f"{options.data} has no images in the split 'test', which the detectors are scored on")
    return runs.Study(
        out=options.out,
        config=options.config,
        settings=[*settings, f"train.device={options.device}"],
        data=["--data", options.data, *(f"source.{key}={value}" for key, value in source_options.items())],
        pretrained=options.pretrained,
        device=options.device,
        train_images=train_images,
        test=test,
    )


def _show(out: Console, report: dict[str, Any]) -> None:
    rows = [
        [
            str(case["steps"]),
            f"{case['fraction']:.0%}",
            rule,
            *(_cell(found[name]) for name in (*runs.STARTS, "difference")),
        ]
        for case in report["cases"]
        for rule, found in case["mean_f1"].items()
    ]
    out.print(
        f"\nMean F1 on the {report['images']['test']} test images in %, mean over the seeds, 95 % interval over images"
    )
    out.print(table(("steps", "labels", "rule", *runs.STARTS, "difference"), rows))
    near = [row["detection_f1"] for row in report["results"]]
    shown = [sum(one[what] for one in near) / len(near) for what in ("near", "near, no offsets")]
    out.print(
        f"F1 of detection within {runs.NEAR_UM} um, all runs: {shown[0]:.1f}; with offsets of zero: {shown[1]:.1f}"
    )


def _cell(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['mean']:.1f} ({low:.1f} .. {high:.1f})"


def _case(text: str) -> Case:
    steps, _, fraction = text.partition(":")
    try:
        case = Case(int(steps), float(fraction or 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected STEPS:FRACTION, such as 300:0.1") from None
    if case.steps < 1 or not 0 < case.fraction <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 step or more and a share from above 0 to 1")
    return case
