"""The nucleus-classification benchmark with the published protocol.

Labelled nuclei are classified by nearest neighbours, by a linear probe, or by fine-tuning the network. One table
compares several weights, including networks of timm as ``timm:NAME[@FILE]`` (see `muse_fast.models.timm.backbone`);
with ``baseline``, the same architecture is also evaluated untrained, as built and with calibrated BatchNorm. Below it
are the differences from the baseline and from the first weights, with intervals.

Ranks of torchrun share out the tiles of each network, or where networks are trained, the networks. The results are
those of one process, to the bit: no sum is over ranks.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from muse_fast.classification.bootstrap import FIGURES, paired_difference
from muse_fast.classification.calibration import calibrate_batch_norm
from muse_fast.classification.features import CropFeatures, extract_features
from muse_fast.classification.metrics import METRICS, majority
from muse_fast.classification.splits import nuclei_of_patients, patient_folds
from muse_fast.classification.tasks import (
    BEST_ON_TEST,
    TASKS,
    ProbeConfig,
    Row,
    Subject,
    TaskConfig,
    held_out_name,
)
from muse_fast.classification.tiles import SPLITS, VALID, Tile, cut_crops, cut_tiles, tiles_by_split
from muse_fast.errors import UserError
from muse_fast.models.backbone import Backbone, random_twin_of
from muse_fast.models.calibration import batch_norms_of
from muse_fast.models.timm.backbone import TimmBackbone, load_timm, summarise
from muse_fast.models.timm.networks import PREFIX, parse_spec
from muse_fast.models.weights import load_backbone
from muse_fast.runtime import checkpoint, distributed
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.device import pick_device
from muse_fast.runtime.progress_bar import ProgressBar, ShowProgress
from muse_fast.runtime.team import ALONE, Team, joined
from muse_fast.sources import open_source
from muse_fast.version import __version__

CROP = "crop"
PROTOCOLS = ("muse", "exact", CROP)


class Network(NamedTuple):
    """A backbone to evaluate."""

    name: str  # shown in the table
    backbone: Backbone | TimmBackbone
    about: dict[str, Any] | None = None  # description of a network of timm for the report
    calibrate: bool = False  # whether to set the BatchNorm statistics to those of the tiles of train, in place


class Benchmark(NamedTuple):
    """Task, weights, data and protocol of an evaluation."""

    task: str  # key of TASKS
    weights: Sequence[str]
    data: str  # source with classes and the splits train, val and test
    source_options: Mapping[str, str]
    size: int  # side of a tile in pixels
    mpp: float  # um per pixel of the tiles
    arch: str | None  # None: inferred from the weights
    compat: str | None  # see load_backbone
    protocol: str  # one of PROTOCOLS


def benchmark(job: Benchmark, options: TaskConfig, json: Path | None) -> None:
    """Evaluate all weights, print the table, and write the numbers to ``json``; under torchrun every rank calls it.

    Raises:
        UserError: settings, weights or data are not suitable for the evaluation, on this rank or another.
    """
    with joined() as team:
        _benchmark(job, options, json, team)


def _benchmark(job: Benchmark, options: TaskConfig, json: Path | None, team: Team) -> None:
    if job.protocol == CROP and not isinstance(options, ProbeConfig):
        raise UserError(f"--protocol {CROP} is for features that are not trained, so not for {job.task}")
    for weights in job.weights:
        if weights.startswith(PREFIX):
            parse_spec(weights)  # fail now, not after hours of work on other networks
    started = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 150)
    device = pick_device(options.device, "device", distributed.local_rank())
    source = open_source(job.data, **job.source_options)
    if not source.label_names:
        raise UserError(f"{job.data}: the source has no classes; evaluation needs labelled nuclei")
    kind = "crops" if job.protocol == CROP else "tiles"
    console.print(f"{job.task} on {job.data}: {job.size} px {kind} at {job.mpp:g} um/px, on {device}", highlight=False)
    cut = cut_crops if job.protocol == CROP else partial(cut_tiles, truncate=job.protocol == "muse")
    tiles = tiles_by_split(source, partial(cut, size=job.size, mpp=job.mpp))
    data = _describe(job, source.label_names, tiles, options)
    _print_counts(console, data)

    of_networks, of_tiles = (team, ALONE) if TASKS[job.task].trains_network else (ALONE, team)

    def networks() -> Iterator[tuple[int, Network]]:
        for number, weights in enumerate(job.weights):
            for network in _networks(weights, job, options):
                if network.about is not None and not network.calibrate:
                    console.print(f"{network.name}: {summarise(network.about)}", highlight=False)
                yield number, network

    def evaluated(item: tuple[int, Network]) -> tuple[int, list[dict[str, Any]]]:
        number, network = item
        with ProgressBar(network.name) as bar:
            classes = len(data["classes"])
            return number, _evaluate_network(job, network, device, tiles, classes, options, bar.show, of_tiles)

    found = of_networks.map(evaluated, networks())
    if not team.is_main:
        return
    # Rows of each network, for each of the weights.
    results = [[rows for of, rows in found if of == number] for number in range(len(job.weights))]
    report = {
        "task": job.task,
        "protocol": job.protocol,
        "data": data,
        "options": asdict(options),
        "majority": majority(data["nuclei"]["train"], data["nuclei"]["test"]),
        "results": [row for networks in results for rows in networks for row in rows],
        "differences": _differences(results),
        "environment": {
            "muse_fast": __version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
        },
        "seconds": time.perf_counter() - started,
    }
    _print_results(console, report)
    if json is not None:
        write_json(json, report)
        console.print(f"numbers in {json}", highlight=False)


def _describe(
    job: Benchmark, classes: Sequence[str], tiles: Mapping[str, Sequence[Tile]], options: TaskConfig
) -> dict[str, Any]:
    labels = {split: np.concatenate([tile.label for tile in found]) for split, found in tiles.items()}
    data = {
        "source": job.data,
        "options": job.source_options,
        "mpp": job.mpp,
        "size": job.size,
        "valid": None if job.protocol == CROP else min(VALID, job.size),
        "classes": list(classes),
        "tiles": {split: len(found) for split, found in tiles.items()},
        "nuclei": {split: np.bincount(one, minlength=len(classes)).tolist() for split, one in labels.items()},
    }
    if isinstance(options, ProbeConfig) and options.folds:
        nuclei = nuclei_of_patients([*tiles["train"], *tiles["val"]])
        fold_of = patient_folds(nuclei, options.folds, options.seed)
        folds = [sorted(name for name in fold_of if fold_of[name] == fold) for fold in range(options.folds)]
        data["folds"] = [{"nuclei": sum(map(nuclei.__getitem__, names)), "patients": names} for names in folds]
    return data


def _evaluate_network(
    job: Benchmark,
    network: Network,
    device: torch.device,
    tiles: Mapping[str, Sequence[Tile]],
    num_classes: int,
    options: TaskConfig,
    progress: ShowProgress,
    team: Team,
) -> list[dict[str, Any]]:
    """Evaluate one network and return its rows; ``team`` shares out its tiles, and only its rank 0 has rows."""
    backbone = network.backbone.to(device)
    how: dict[str, Any] = {"device": device, "batch_size": options.extract_batch, "bf16": options.precision == "bf16"}
    reader = CropFeatures(backbone) if job.protocol == CROP else backbone
    began = time.perf_counter()
    if network.calibrate:
        calibrate_batch_norm(reader, tiles["train"], **how, progress=progress)
    sets = extract_features(reader, tiles, **how, progress=progress, team=team)
    if not team.is_main:
        return []
    extracted = time.perf_counter()
    subject = Subject(backbone, tiles, {split: one.to(device) for split, one in sets.items()}, num_classes)
    rows = TASKS[job.task].run(subject, options, progress)
    seconds = {"features": extracted - began, "classification": time.perf_counter() - extracted}
    known = {"weights": network.name, "arch": backbone.arch} | ({"timm": network.about} if network.about else {})
    return [{**known, **_as_json(row, held_out_name(options)), "seconds": seconds} for row in rows]


def _networks(weights: str, job: Benchmark, options: TaskConfig) -> Iterator[Network]:
    """Yield the network of ``weights``, followed by its untrained counterparts if requested.

    The last of these is calibrated if it has BatchNorm. Fine-tuning replaces the statistics, so there it is left out.
    """
    torch.manual_seed(options.seed)
    build = _networks_of_timm if weights.startswith(PREFIX) else _networks_of_ours
    for network in build(weights, job, options):
        yield network
    if options.baseline and isinstance(options, ProbeConfig) and batch_norms_of(network.backbone):
        yield network._replace(name=f"{network.name}, calibrated", calibrate=True)


def _networks_of_ours(weights: str, job: Benchmark, options: TaskConfig) -> Iterator[Network]:
    backbone = load_backbone(job.arch, weights, compat=job.compat)
    yield Network(weights, backbone)
    if options.baseline and not weights.startswith("random"):
        seed, image_size = _origin(Path(weights), options.seed)
        torch.manual_seed(seed)
        yield Network(f"{weights} untrained", random_twin_of(backbone, image_size).eval())


def _networks_of_timm(weights: str, job: Benchmark, options: TaskConfig) -> Iterator[Network]:
    bare, _, file = weights.partition("@")
    for text in (weights, bare) if file and options.baseline else (weights,):
        torch.manual_seed(options.seed)
        loaded = load_timm(text, image_size=job.size, align_corners=job.protocol == "muse")
        yield Network(text if text != bare else f"{weights} untrained", *loaded)


def _origin(weights: Path, default_seed: int) -> tuple[int, int]:
    """Seed and image size of the run behind ``weights``; defaults for a bare file, which does not record them."""
    folder = checkpoint.latest(weights)[0] or weights
    if not (folder / checkpoint.STATE).exists():
        return default_seed, 224
    config = checkpoint.read_state(folder)["config"]
    return config["seed"], config["views"]["global_size"]


def _differences(results: Sequence[Sequence[Sequence[Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """Compare the first network of all weights with its last baseline and with the first network of all.

    Rows whose k is the best on test are left out: two such choices cannot be compared.

    Args:
        results: rows of each network, for each of the weights; all networks have the same kinds of rows.
    """
    pairs = [(networks[0], networks[-1]) for networks in results if len(networks) > 1]
    pairs += [(networks[0], results[0][0]) for networks in results[1:]]
    return [
        {
            **{key: ours[key] for key in ("weights", "features", "classifier")},
            "minus": theirs["weights"],
            **{figure: paired_difference(ours["test"], theirs["test"], figure) for figure in FIGURES},
        }
        for pair in pairs
        for ours, theirs in zip(*pair, strict=True)
        if BEST_ON_TEST not in ours["classifier"]
    ]


# ----------------------------------------------------------------------------------------------------------- output


def _as_json(row: Row, held_out: str) -> dict[str, Any]:
    return {
        "features": row.features,
        "classifier": row.classifier,
        "selection": row.selection,
        **row.details,
        "test": row.test,
        held_out: row.held_out,
    }


def _print_counts(console: Console, data: Mapping[str, Any]) -> None:
    for split in SPLITS:
        named = ", ".join(f"{n} {name}" for name, n in zip(data["classes"], data["nuclei"][split], strict=True))
        console.print(f"{split:>5}: {sum(data['nuclei'][split])} nuclei ({named})", highlight=False)
    if "folds" in data:
        sizes = ", ".join(f"{len(fold['patients'])} ({fold['nuclei']})" for fold in data["folds"])
        console.print(f"folds of train and val, patients (nuclei): {sizes}", highlight=False)


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
    if report["differences"]:
        patients = len(report["results"][0]["test"]["confusion_by_patient"])
        console.print(_table_of_differences(report["differences"], patients))
    majority_rates = report["majority"]
    console.print(
        f"majority class: {100 * majority_rates['test_majority_share']:.2f} % of test; always predicting the majority "
        f"class of train scores {100 * majority_rates['train_majority_accuracy']:.2f} %. "
        f"{report['seconds']:.1f} s in all.",
        highlight=False,
    )


def _table_of_differences(differences: Sequence[Mapping[str, Any]], patients: int) -> Table:
    table = Table(title=f"paired differences on the test split, points, with 95 % intervals over {patients} patients")
    for heading in ("weights", "minus", "features", "classifier"):
        table.add_column(heading)
    for figure in FIGURES:
        table.add_column(METRICS[figure].heading, justify="right")
    for one in differences:
        names = (one[key] for key in ("weights", "minus", "features", "classifier"))
        values = (100 * np.array(one[figure]) for figure in FIGURES)
        table.add_row(*names, *(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" for mean, low, high in values))
    return table
