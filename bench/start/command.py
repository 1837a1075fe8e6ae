"""Continue from an encoder's weights with and without a frozen start; plot what the features know over the steps."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import environment
from bench.report import console, table, write_json
from bench.start import runs
from muse_fast.classification.tiles import cut_tiles, tiles_by_split
from muse_fast.config import load_config
from muse_fast.errors import UserError
from muse_fast.pretraining.start import first_backbone
from muse_fast.runtime import checkpoint
from muse_fast.sources import open_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rois", type=Path, required=True, help="ROI set with classes and the splits train, val, test")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; finished runs are kept")
    parser.add_argument("--config", default="brcam2c_cpu", help="YAML file or name of a shipped config (brcam2c_cpu)")
    parser.add_argument("--first", type=int, default=400, help="steps of the first run (400)")
    parser.add_argument("--steps", type=int, default=240, help="steps of the runs that continue (240)")
    parser.add_argument("--every", type=int, default=30, help="steps between checkpoints that are scored (30)")
    parser.add_argument("--freeze", type=int, default=60, help="steps with a frozen encoder, where it is frozen (60)")
    parser.add_argument("--mpp", type=float, default=0.5, help="um/px of the test (0.5)")
    parser.add_argument("--one-in", type=int, default=3, metavar="N", help="score one tile in N (3), which is quicker")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run; the others have the next (0)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the curves here; needs matplotlib")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all runs")


def main(options: argparse.Namespace) -> int:
    """Print a table of scores over the steps."""
    try:
        report = _measure(options, console())
    except UserError as error:
        options.parser.error(str(error))
    if options.json:
        write_json(options.json, report)
    if options.figure:
        draw(report, options.figure)
    return 0


def _measure(options: argparse.Namespace, out: Console) -> dict[str, Any]:
    common = [f"data.roiset={options.rois}", f"train.device={options.device}", "train.eval_every=0", *options.settings]
    arch = runs.arch_of(options.config, common)
    source = open_source(f"roiset:{options.rois}")
    num_classes = len(source.label_names)
    cut = partial(cut_tiles, mpp=options.mpp)
    tiles = {split: found[:: options.one_in] for split, found in tiles_by_split(source, cut).items()}

    first = runs.trained(
        options.out / "first",
        options.config,
        [*common, f"seed={options.seed}", f"optim.steps={options.first}", f"train.checkpoint_every={options.first}"],
    )
    encoder = options.out / "encoder.pth"
    runs.keep_encoder(first, encoder)
    report: dict[str, Any] = {
        "environment": environment(options.device),
        "config": Path(options.config).name,
        "settings": options.settings,
        "arch": arch,
        "first_config": checkpoint.read_state(checkpoint.folder_of(first, options.first))["config"],
        "first_steps": options.first,
        "freeze": options.freeze,
        "one_tile_in": options.one_in,
        "first": next(iter(runs.over_steps(first, tiles, num_classes, options.device))),
        "results": [],
    }
    every = (f"train.checkpoint_every={options.every}", f"train.keep_every={options.every}")
    for variant in (runs.SCRATCH, *runs.VARIANTS):
        changed = runs.settings_of(variant, f"{arch}@{encoder}", options.freeze)
        settings = [*common, f"seed={options.seed + 1}", f"optim.steps={options.steps}", *every, *changed]
        start = first_backbone(load_config(options.config, settings))
        at_start = runs.scores(start, tiles, num_classes, options.device)
        run = runs.trained(options.out / variant.replace(", ", "-").replace(" ", "-"), options.config, settings)
        rows = [{"step": 0, **at_start}, *runs.over_steps(run, tiles, num_classes, options.device)]
        report["results"].append({"variant": variant, "settings": changed[1:], "scores": rows})
        _show(out, report["results"][-1])
    return report


def _show(out: Console, result: dict[str, Any]) -> None:
    kinds = [kind for kind in result["scores"][0] if kind != "step"]
    rows = [[kind, *(f"{100 * row[kind]['balanced']:.1f}" for row in result["scores"])] for kind in kinds]
    out.print(f"\n{result['variant']}: balanced accuracy (KNN, test) in % after so many steps")
    out.print(table(("features", *(str(row["step"]) for row in result["scores"])), rows))


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a panel per kind of features, and a curve per variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = [kind for kind in report["first"] if kind != "step"]
    figure, panels = plt.subplots(1, len(kinds), figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, kind in zip(panels, kinds, strict=True):
        for result in report["results"]:
            steps = [row["step"] for row in result["scores"]]
            panel.plot(steps, [100 * row[kind]["balanced"] for row in result["scores"]], label=result["variant"])
        panel.axhline(100 * report["first"][kind]["balanced"], color="0.5", lw=1, ls=":", label="end of the first run")
        panel.axvline(report["freeze"], color="0.8", lw=1)
        panel.set(title=f"features: {kind}", xlabel="steps after the start from weights")
    panels[0].set_ylabel("balanced accuracy, %\n(KNN, test split)")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)
