"""``python -m muse_fast.evaluate {knn|linear|finetune} --weights W ... --data SOURCE --json OUT [key=value ...]``

Nucleus classification with the published protocol: features of labelled nuclei, classified by their nearest
neighbours, by a linear probe, or by the network fine-tuned. Several weights are compared in one table, those of others
by ``timm:NAME[@FILE]``, see `muse_fast.models.timm_backbone`; and ``--baseline-random`` sets the same architecture
untrained beside each. ``evaluate points`` scores files of detected points, see `muse_fast.detection.score_files`, and
``evaluate detect`` a fine-tuned detector, see `muse_fast.detection.score_detector`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from muse_fast.classification.features import Progress, extract_features
from muse_fast.classification.metrics import METRICS, majority
from muse_fast.classification.tasks import TASKS, Row, Subject, TaskConfig
from muse_fast.classification.tiles import VALID, Tile, tiles_by_split
from muse_fast.detection import score_detector, score_files
from muse_fast.errors import UserError
from muse_fast.models import ARCHS, timm_backbone
from muse_fast.models.backbone import Backbone, build_backbone
from muse_fast.models.timm_backbone import TimmBackbone
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.device import pick_device
from muse_fast.runtime.options import known_keys, load_settings, split_settings, split_source_options
from muse_fast.sources import open_source
from muse_fast.version import __version__

SPLITS = ("train", "val", "test")
PROTOCOLS = ("muse", "exact")
PROTOCOL_HELP = (
    "muse: the published rules, nuclei on whole pixels; exact: the same with fractions of pixels kept, and maps of "
    "timm read so that the middle of a token reads just that token"
)
WEIGHTS_HELP = "run, checkpoint, export, .pth, random:ARCH, or any backbone of timm as timm:NAME[:key=value ...][@FILE]"
EPILOG = "`muse-fast evaluate detect --help`: scores of a fine-tuned detector; `points --help`: of files of points"


class Network(NamedTuple):
    """A backbone to evaluate."""

    name: str  # in the table
    backbone: Backbone | TimmBackbone
    about: dict[str, Any] | None = None  # of timm: what a report says of it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Raises:
        UserError: settings, weights or data do not allow the evaluation.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["points"]:
        return score_files.main(argv[1:], _progress)
    if argv[:1] == ["detect"]:
        return score_detector.main(argv[1:], _progress)
    args = _parse(argv)
    _evaluate(args, load_settings(TASKS[args.task].config, None, args.options))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "muse-fast evaluate", description="Nucleus classification benchmark.", epilog=EPILOG
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--weights", nargs="+", required=True, help=WEIGHTS_HELP)
    parser.add_argument("--data", required=True, help="labelled source with train, val and test, e.g. brcam2c:DIR")
    parser.add_argument("--mpp", type=float, default=0.5, help="um/px of the tiles (0.5)")
    parser.add_argument("--size", type=int, default=224, help="side of the tiles in pixels (224)")
    parser.add_argument("--arch", choices=ARCHS, help="needed only if the weights do not say")
    parser.add_argument("--compat", choices=("exact", "muse_official"), help="position embedding, see load_backbone")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="muse", help=PROTOCOL_HELP)
    parser.add_argument("--baseline-random", action="store_true", help="also evaluate the same network untrained")
    parser.add_argument("--json", type=Path, help="write all numbers here; must not exist")
    parser.add_argument("options", nargs="*", metavar="key=value", help=f"{_known_options()}")
    args = parser.parse_intermixed_args(argv)
    # `--weights A B lr=1` swallows the settings that follow it.
    settings, args.weights = split_settings(args.weights)
    args.source_options, args.options = split_source_options([*settings, *args.options])
    if args.baseline_random:
        args.options.append("baseline=true")
    if not args.weights:
        raise UserError("--weights: expected a run, a checkpoint, a file, random:ARCH or timm:NAME[@FILE]")
    for weights in args.weights:
        if weights.startswith(timm_backbone.PREFIX):
            timm_backbone.parse_spec(weights)  # a mistake shows before other networks have had their hours
    if args.mpp <= 0:
        raise UserError(f"--mpp {args.mpp}: expected um per pixel above 0, such as 0.5")
    if args.json is not None and args.json.exists():
        raise UserError(f"{args.json} exists already; remove it or choose another --json")
    return args


def _evaluate(args: argparse.Namespace, options: TaskConfig) -> None:
    started = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 150)
    device = pick_device(options.device, "device")
    source = open_source(args.data, **args.source_options)
    if not source.label_names:
        raise UserError(f"{args.data}: the source has no classes; evaluation needs labelled nuclei")
    console.print(f"{args.task} on {args.data}: {args.size} px tiles at {args.mpp} um/px, on {device}", highlight=False)
    tiles = tiles_by_split(source, SPLITS, size=args.size, mpp=args.mpp, truncate=args.protocol == "muse")
    data = _describe(args, source.label_names, tiles)
    _print_counts(console, data)

    results = []
    for network in _networks(args, options):
        if network.about is not None:
            console.print(f"{network.name}: {timm_backbone.in_words(network.about)}", highlight=False)
        with _progress(console, network.name) as progress:
            results += _evaluate_network(args.task, network, device, tiles, len(data["classes"]), options, progress)
    report = {
        "task": args.task,
        "protocol": args.protocol,
        "data": data,
        "options": asdict(options),
        "majority": majority(data["nuclei"]["train"], data["nuclei"]["test"]),
        "results": results,
        "environment": {
            "muse_fast": __version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
        },
        "seconds": time.perf_counter() - started,
    }
    _print_results(console, report)
    if args.json is not None:
        write_json(args.json, report)
        console.print(f"numbers in {args.json}", highlight=False)


def _describe(args: argparse.Namespace, classes: Sequence[str], tiles: Mapping[str, Sequence[Tile]]) -> dict[str, Any]:
    labels = {split: np.concatenate([tile.label for tile in found]) for split, found in tiles.items()}
    return {
        "source": args.data,
        "options": args.source_options,
        "mpp": args.mpp,
        "size": args.size,
        "valid": min(VALID, args.size),
        "classes": list(classes),
        "tiles": {split: len(found) for split, found in tiles.items()},
        "nuclei": {split: np.bincount(one, minlength=len(classes)).tolist() for split, one in labels.items()},
    }


def _evaluate_network(
    task: str,
    network: Network,
    device: torch.device,
    tiles: Mapping[str, Sequence[Tile]],
    num_classes: int,
    options: TaskConfig,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The rows of one network."""
    backbone = network.backbone.to(device)
    bf16 = options.precision == "bf16"
    began = time.perf_counter()
    sets = extract_features(
        backbone, tiles, device=device, batch_size=options.extract_batch, bf16=bf16, progress=progress
    )
    extracted = time.perf_counter()
    subject = Subject(backbone, tiles, {split: one.to(device) for split, one in sets.items()}, num_classes)
    rows = TASKS[task].run(subject, options, progress)
    seconds = {"features": extracted - began, "classification": time.perf_counter() - extracted}
    known = {"weights": network.name, "arch": backbone.arch} | ({"timm": network.about} if network.about else {})
    return [{**known, **_as_json(row), "seconds": seconds} for row in rows]


def _networks(args: argparse.Namespace, options: TaskConfig) -> Iterator[Network]:
    """Every network to evaluate, each followed by its untrained twin if requested."""
    for weights in args.weights:
        torch.manual_seed(options.seed)
        if weights.startswith(timm_backbone.PREFIX):
            yield from _networks_of_timm(weights, args, options)
            continue
        backbone = muse_fast.load_backbone(args.arch, weights, compat=args.compat)
        yield Network(weights, backbone)
        if options.baseline and not weights.startswith("random"):
            seed, image_size = _origin(Path(weights), options.seed)
            torch.manual_seed(seed)
            yield Network(f"{weights} untrained", build_backbone(backbone.arch, image_size=image_size).eval())


def _networks_of_timm(weights: str, args: argparse.Namespace, options: TaskConfig) -> Iterator[Network]:
    bare, _, file = weights.partition("@")
    for text in (weights, bare) if file and options.baseline else (weights,):
        torch.manual_seed(options.seed)
        loaded = timm_backbone.load_timm(text, image_size=args.size, align_corners=args.protocol == "muse")
        yield Network(text if text != bare else f"{weights} untrained", *loaded)


def _origin(weights: Path, default_seed: int) -> tuple[int, int]:
    """Seed and image size that a run or checkpoint started from; a bare file does not say."""
    from muse_fast.runtime import checkpoint

    folder = checkpoint.latest(weights)[0] or weights
    if not (folder / checkpoint.STATE).exists():
        return default_seed, 224
    config = checkpoint.read_state(folder)["config"]
    return config["seed"], config["views"]["global_size"]


def _known_options() -> str:
    return "; ".join(f"{name}: {', '.join(known_keys(task.config))}" for name, task in TASKS.items())


# ----------------------------------------------------------------------------------------------------------- output


def _as_json(row: Row) -> dict[str, Any]:
    return {
        "features": row.features,
        "selection": row.selection,
        **row.details,
        "test": row.test,
        "val": row.val,
    }


def _print_counts(console: Console, data: Mapping[str, Any]) -> None:
    for split in SPLITS:
        named = ", ".join(f"{n} {name}" for name, n in zip(data["classes"], data["nuclei"][split], strict=True))
        console.print(f"{split:>5}: {sum(data['nuclei'][split])} nuclei ({named})", highlight=False)


def _print_results(console: Console, report: Mapping[str, Any]) -> None:
    table = Table(title=f"{report['task']}, test split, %")
    for heading in ("weights", "features", "classifier"):
        table.add_column(heading)
    shown = {name: metric for name, metric in METRICS.items() if metric.heading}
    for metric in shown.values():
        table.add_column(metric.column(report["data"]["classes"]), justify="right")
    for row in report["results"]:
        values = (metric.show(row["test"][name]) for name, metric in shown.items())
        table.add_row(row["weights"], row["features"], row["selection"], *values)
    console.print(table)
    majority_rates = report["majority"]
    console.print(
        f"majority class: {100 * majority_rates['test_majority_share']:.2f} % of test; always answering train's "
        f"majority scores {100 * majority_rates['train_majority_accuracy']:.2f} %. "
        f"{report['seconds']:.1f} s in all.",
        highlight=False,
    )


@contextmanager
def _progress(console: Console, name: str) -> Iterator[Progress]:
    """A bar with rate and ETA on a terminal; a line every ten seconds elsewhere."""
    if not console.is_terminal:
        printed = time.monotonic()

        def line(done: int, total: int, unit: str) -> None:
            nonlocal printed
            if time.monotonic() - printed > 10:
                printed = time.monotonic()
                console.print(f"{name}: {done}/{total} {unit}", highlight=False)

        yield line
        return

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console) as bar:
        tasks: dict[str, Any] = {}

        def update(done: int, total: int, unit: str) -> None:
            if unit not in tasks:
                tasks[unit] = bar.add_task(f"{name} {unit}", total=total)
            bar.update(tasks[unit], completed=done)

        yield update


if __name__ == "__main__":
    from muse_fast.runtime.cli import run

    raise SystemExit(run(main))
