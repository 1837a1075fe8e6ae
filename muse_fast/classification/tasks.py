"""The three tasks of the nucleus-classification benchmark and their settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from muse_fast.classification.features import NucleusSet
from muse_fast.classification.metrics import Scores
from muse_fast.classification.probes import KNN_NEIGHBOURS, LinearResult, knn, linear_probe, standardised
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
    """Also evaluate each architecture untrained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnConfig(TaskConfig):
    k: list[int] = field(default_factory=lambda: list(KNN_NEIGHBOURS))
    """Numbers of neighbours."""
    standardise: str = setting("both", choices=("raw", "train", "both"))
    """Features as they are (``raw``), standardised by the train split (``train``), or ``both``."""

    def check(self) -> None:
        require(min(self.k, default=0) > 0, "k", self.k, "numbers above 0, such as k=[10,20]")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig(TaskConfig):
    lr: float = setting(0.01, gt=0)
    epochs: int = setting(100, ge=1)
    batch_size: int = setting(256, ge=1)
    """Nuclei."""
    standardise: str = setting("both", choices=("raw", "train", "both"))
    """Features as they are (``raw``), standardised by the train split (``train``), or ``both``."""


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


class Subject(NamedTuple):
    """A network to evaluate, on the device, and its nuclei."""

    backbone: Backbone | TimmBackbone
    tiles: Mapping[str, Sequence[Tile]]
    sets: Mapping[str, NucleusSet]
    num_classes: int


class Row(NamedTuple):
    """One line of the table."""

    features: str  # raw, standardised or tuned
    selection: str  # how the classifier was chosen
    test: Scores
    val: Scores
    details: dict[str, Any]


def run_knn(subject: Subject, options: KnnConfig, progress: ShowProgress) -> list[Row]:
    """Two rows per kind of features: k by the published rule (best on test), and k chosen on val."""
    rows = []
    for name, sets in _feature_kinds(subject.sets, options.standardise):
        result = knn(sets, subject.num_classes, tuple(options.k))
        by_k = {
            k: {"val": result.val[k]["accuracy"], "test": test["accuracy"], "balanced": test["balanced_accuracy"]}
            for k, test in result.test.items()
        }
        for rule, k in (("chosen on val", result.k_chosen_on_val), ("best on test", result.k_best_on_test)):
            details = {"k": k, "by_k": by_k, "k_skipped": result.skipped}
            rows.append(Row(name, f"k={k}, {rule}", result.test[k], result.val[k], details))
    return rows


def run_linear(subject: Subject, options: LinearConfig, progress: ShowProgress) -> list[Row]:
    """One row per kind of features."""
    rows = []
    for name, sets in _feature_kinds(subject.sets, options.standardise):
        result = linear_probe(
            sets,
            subject.num_classes,
            seed=options.seed,
            lr=options.lr,
            epochs=options.epochs,
            batch_size=options.batch_size,
            progress=progress,
        )
        rows.append(_linear_row(name, "", result))
    return rows


def run_finetune(subject: Subject, options: TuneConfig, progress: ShowProgress) -> list[Row]:
    """One row for the linear probe that fine-tuning starts from, one for the fine-tuned network."""
    probe = linear_probe(subject.sets, subject.num_classes, seed=options.seed, progress=progress)
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
        Row("tuned", f"epoch {tuned.epoch + 1}", tuned.test, tuned.val, details),
    ]


def _linear_row(features: str, prefix: str, result: LinearResult) -> Row:
    unstable = f", lr {result.step:.1f} x the largest stable" if result.step > 1 else ""
    details = {"epoch": result.epoch, "step_over_stable": result.step}
    return Row(features, f"{prefix}epoch {result.epoch + 1}{unstable}", result.test, result.val, details)


def _feature_kinds(sets: Mapping[str, NucleusSet], standardise: str) -> Iterator[tuple[str, Mapping[str, NucleusSet]]]:
    if standardise in ("raw", "both"):
        yield "raw", sets
    if standardise in ("train", "both"):
        yield "standardised", standardised(sets)


class Task(NamedTuple):
    config: type[TaskConfig]
    run: Callable[[Subject, Any, ShowProgress], list[Row]]


TASKS = {
    "knn": Task(KnnConfig, run_knn),
    "linear": Task(LinearConfig, run_linear),
    "finetune": Task(TuneConfig, run_finetune),
}
