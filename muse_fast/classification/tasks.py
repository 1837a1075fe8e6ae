"""The tasks of the nucleus-classification benchmark and their settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from muse_fast.classification.bootstrap import FIGURES
from muse_fast.classification.features import NucleusSet
from muse_fast.classification.metrics import Scores
from muse_fast.classification.probes import KNN_NEIGHBOURS, LinearResult, knn, linear_probe
from muse_fast.classification.ridge import LAMBDAS, LEAST_LAMBDA, ridge_probe
from muse_fast.classification.splits import Splits, folds_of_nuclei
from muse_fast.classification.tiles import Tile
from muse_fast.classification.tuned import finetune
from muse_fast.errors import require
from muse_fast.models.backbone import Backbone
from muse_fast.models.timm.backbone import TimmBackbone
from muse_fast.runtime.options import MAX_SEED, Config, setting
from muse_fast.runtime.progress_bar import ShowProgress


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig(Config):
    """Settings common to all tasks."""

    seed: int = setting(2025, ge=0, le=MAX_SEED)
    """Determines random weights, the head's initial weights and the order of training."""
    device: str = "auto"
    """``auto`` uses a CUDA GPU if there is one."""
    precision: str = setting("fp32", choices=("fp32", "bf16"))
    """Precision of the backbone, ``fp32`` or ``bf16``."""
    extract_batch: int = setting(16, ge=1)
    """Tiles per batch of feature extraction."""
    baseline: bool = False
    """Also evaluate each architecture untrained, as built and with BatchNorm calibrated on the tiles of train."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig(TaskConfig):
    """Settings of the tasks on frozen features."""

    folds: int = setting(0, ge=0)
    """Choose the settings of the classifier on this many folds of the patients of train and val, and train it on both;
    0: choose them on val."""

    def check(self) -> None:
        require(self.folds != 1, "folds", self.folds, "2 or more, or 0 to choose on val")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnConfig(ProbeConfig):
    k: list[int] = field(default_factory=lambda: list(KNN_NEIGHBOURS))
    """Numbers of neighbours."""
    standardise: str = setting("both", choices=("raw", "train", "both"))
    """Features as they are (``raw``), standardised by the train split (``train``), or ``both``."""

    def check(self) -> None:
        ProbeConfig.check(self)
        require(min(self.k, default=0) > 0, "k", self.k, "numbers above 0, such as k=[10,20]")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig(ProbeConfig):
    lr: float = setting(0.01, gt=0)
    epochs: int = setting(100, ge=1)
    batch_size: int = setting(256, ge=1)
    """Nuclei."""
    standardise: str = setting("both", choices=("raw", "train", "both"))
    """Features as they are (``raw``), standardised by the train split (``train``), or ``both``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RidgeConfig(ProbeConfig):
    penalty: list[float] = field(default_factory=lambda: list(LAMBDAS))
    """Values of lambda to choose from."""

    def check(self) -> None:
        ProbeConfig.check(self)
        usable = bool(self.penalty) and all(LEAST_LAMBDA <= value < math.inf for value in self.penalty)
        expected = f"numbers of {LEAST_LAMBDA:g} or more, such as penalty=[0.01,0.1]"
        require(usable, "penalty", self.penalty, expected)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig(TaskConfig):
    lr: float | None = setting(None, gt=0)
    """Default: 1e-5, or 4e-5 for ResNets. Training from random weights needs more, such as 1e-3."""
    epochs: int = setting(10, ge=1)
    batch_size: int = setting(32, ge=1)
    """Tiles."""
    augment: bool = False
    """Flip and turn the train tiles; the published protocol does not."""


# ------------------------------------------------------------------------------------------------------------ tasks

BEST_ON_TEST = "best on test"  # the published rule for k, which is optimistic


class Subject(NamedTuple):
    """A network to evaluate, on the device, and its nuclei."""

    backbone: Backbone | TimmBackbone
    tiles: Mapping[str, Sequence[Tile]]
    sets: Mapping[str, NucleusSet]
    num_classes: int


class Row(NamedTuple):
    """One line of the table."""

    features: str  # raw, standardised or tuned
    classifier: str  # its kind; with ``features``, the same for all networks
    selection: str  # what was chosen for this network, and how
    test: Scores
    held_out: Scores  # of the nuclei that it was chosen on: val, or with folds all of train and val
    details: dict[str, Any]


def run_knn(subject: Subject, options: KnnConfig, progress: ShowProgress) -> list[Row]:
    """Per kind of features a row with k chosen on val, and one with k by the published rule, best on test.

    With folds there is only one row, with k chosen on them.
    """
    rows = []
    for name, splits in _kinds(subject, options, options.standardise):
        result = knn(splits, subject.num_classes, tuple(options.k))
        by_k: dict[int, dict[str, float]] = {}
        for k, held_out in result.held_out.items():
            by_k[k] = {held_out_name(options): held_out["accuracy"]}
            if k in result.test:
                by_k[k] |= {"test": result.test[k]["accuracy"], "balanced": result.test[k]["balanced_accuracy"]}
        rules = {_chosen(options): result.k_chosen}
        if result.k_best_on_test is not None:
            rules[BEST_ON_TEST] = result.k_best_on_test
        for rule, k in rules.items():
            details = {"k": k, "by_k": by_k, "k_skipped": result.skipped}
            rows.append(Row(name, f"k {rule}", f"k={k}, {rule}", result.test[k], result.held_out[k], details))
    return rows


def run_linear(subject: Subject, options: LinearConfig, progress: ShowProgress) -> list[Row]:
    """One row per kind of features."""
    rows = []
    for name, splits in _kinds(subject, options, options.standardise):
        result = linear_probe(
            splits,
            subject.num_classes,
            seed=options.seed,
            lr=options.lr,
            epochs=options.epochs,
            batch_size=options.batch_size,
            progress=progress,
        )
        rows.append(_linear_row(name, "", result))
    return rows


def run_ridge(subject: Subject, options: RidgeConfig, progress: ShowProgress) -> list[Row]:
    """A row for the plain and one for the balanced probe, on standardised features."""
    rows = []
    splits = _splits(subject, options)
    for balanced, name in ((False, "ridge"), (True, "balanced ridge")):
        result = ridge_probe(splits, subject.num_classes, balanced=balanced, lambdas=options.penalty)
        details = {
            "lambda": result.chosen,
            "by_lambda": {
                value: {figure: scores[figure] for figure in FIGURES} for value, scores in result.held_out.items()
            },
        }
        selection = f"{'balanced, ' if balanced else ''}lambda={result.chosen:g}, {_chosen(options)}"
        held_out = result.held_out[result.chosen]
        rows.append(Row("standardised", name, selection, result.test, held_out, details))
    return rows


def run_finetune(subject: Subject, options: TuneConfig, progress: ShowProgress) -> list[Row]:
    """One row for the linear probe that fine-tuning starts from, one for the fine-tuned network."""
    probe = linear_probe(Splits(subject.sets), subject.num_classes, seed=options.seed, progress=progress)
    lr = options.lr or subject.backbone.finetune_lr
    tuned = finetune(
        subject.backbone,
        probe.head,
        subject.tiles,
        subject.sets,
        seed=options.seed,
        lr=lr,
        epochs=options.epochs,
        batch_size=options.batch_size,
        augment=options.augment,
        bf16=options.precision == "bf16",
        progress=progress,
    )
    details = {"epoch": tuned.epoch, "lr": lr, "history": tuned.history}
    return [
        _linear_row("raw", "linear, ", probe),
        Row("tuned", "fine-tuned", f"epoch {tuned.epoch + 1}", tuned.test, tuned.val, details),
    ]


def _linear_row(features: str, prefix: str, result: LinearResult) -> Row:
    unstable = f", lr {result.step:.1f} x the largest stable" if result.step > 1 else ""
    details = {"epoch": result.epoch, "step_over_stable": result.step}
    selection = f"{prefix}epoch {result.epoch + 1}{unstable}"
    return Row(features, "linear", selection, result.test, result.held_out, details)


def _kinds(subject: Subject, options: ProbeConfig, standardise: str) -> Iterator[tuple[str, Splits]]:
    splits = _splits(subject, options)
    if standardise in ("raw", "both"):
        yield "raw", splits
    if standardise in ("train", "both"):
        yield "standardised", replace(splits, standardise=True)


def _splits(subject: Subject, options: ProbeConfig) -> Splits:
    if not options.folds:
        return Splits(subject.sets)
    tiles = [*subject.tiles["train"], *subject.tiles["val"]]
    device = subject.sets["train"].labels.device
    return Splits(subject.sets, folds_of_nuclei(tiles, options.folds, options.seed, device))


def _chosen(options: ProbeConfig) -> str:
    return f"chosen on {options.folds} folds" if options.folds else "chosen on val"


def held_out_name(options: TaskConfig) -> str:
    """Name of the nuclei that classifiers are chosen on, ``val`` or ``folds``."""
    return "folds" if isinstance(options, ProbeConfig) and options.folds else "val"


class Task(NamedTuple):
    config: type[TaskConfig]
    run: Callable[[Subject, Any, ShowProgress], list[Row]]
    trains_network: bool = False


TASKS = {
    "knn": Task(KnnConfig, run_knn),
    "linear": Task(LinearConfig, run_linear),
    "ridge": Task(RidgeConfig, run_ridge),
    "finetune": Task(TuneConfig, run_finetune, trains_network=True),
}
