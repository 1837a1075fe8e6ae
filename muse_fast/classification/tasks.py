"""The three tasks of the nucleus-classification benchmark and their settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from muse_fast.classification.features import NucleusSet, Progress
from muse_fast.classification.probes import KNN_NEIGHBOURS, LinearResult, Scores, knn, linear_probe, standardised
from muse_fast.classification.tiles import Tile
from muse_fast.classification.tuned import finetune
from muse_fast.errors import UserError, did_you_mean, require
from muse_fast.models.backbone import Backbone
from muse_fast.models.timm_backbone import TimmBackbone

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Settings of every task, given as ``key=value``."""

    seed: int = 2025
    """Fixes random weights, the head's first weights and the order of training."""
    device: str = "auto"
    """``auto`` takes a CUDA GPU where there is one."""
    precision: str = "fp32"
    """``fp32`` or ``bf16`` for the backbone."""
    extract_batch: int = 16
    """Tiles per step when features are extracted."""
    baseline: bool = False
    """Evaluate each architecture untrained too."""

    def __post_init__(self) -> None:
        require(self.precision in ("fp32", "bf16"), "precision", self.precision, "fp32 or bf16")
        for key in ("extract_batch", "epochs", "batch_size", "lr"):
            value = getattr(self, key, None)
            require(value is None or value > 0, key, value, "above 0")
        neighbours = getattr(self, "k", KNN_NEIGHBOURS)
        require(bool(neighbours) and min(neighbours) > 0, "k", neighbours, "numbers above 0, such as k=[10,20]")
        standardise = getattr(self, "standardise", "raw")
        require(standardise in ("raw", "train", "both"), "standardise", standardise, "raw, train or both")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnOptions(Options):
    k: list[int] = field(default_factory=lambda: list(KNN_NEIGHBOURS))
    """Numbers of neighbours."""
    standardise: str = "both"
    """Features as they are (``raw``), standardised by the train split (``train``), or ``both``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearOptions(Options):
    lr: float = 0.01
    epochs: int = 100
    batch_size: int = 256
    """Nuclei."""
    standardise: str = "both"
    """Features as they are (``raw``), standardised by the train split (``train``), or ``both``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneOptions(Options):
    lr: float | None = None
    """Default 1e-5, for ResNets 4e-5. Training from random weights needs more, such as 1e-3."""
    epochs: int = 10
    batch_size: int = 32
    """Tiles."""
    augment: bool = False
    """Flips and quarter turns of the train tiles; the published protocol has none."""


_O = TypeVar("_O", bound="DataclassInstance")


def parse_options(kind: type[_O], items: Sequence[str]) -> _O:
    """``key=value`` items as checked options.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type, or out of range.
    """
    known = [one.name for one in fields(kind)]
    merged = OmegaConf.structured(kind)
    OmegaConf.set_readonly(merged, False)
    for item in items:
        key, separator, _ = item.partition("=")
        if not separator:
            raise UserError(f"'{item}': settings are given as key=value, for example seed=1")
        if key not in known:
            raise UserError(f"no setting '{key}' here" + (did_you_mean(key, known) or f". Known: {', '.join(known)}"))
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([item]))
        except OmegaConfBaseException as error:
            raise UserError(f"{item}: {str(error).splitlines()[0]}") from None
    options = OmegaConf.to_object(merged)
    assert isinstance(options, kind)
    return options


# ------------------------------------------------------------------------------------------------------------ tasks


class Subject(NamedTuple):
    """One network under evaluation, on the device, and its nuclei."""

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


def run_knn(subject: Subject, options: KnnOptions, progress: Progress) -> list[Row]:
    """Two rows per kind of features: k by the published rule (best on test), and k chosen on val."""
    rows = []
    for name, sets in _feature_kinds(subject.sets, options.standardise):
        result = knn(sets, subject.num_classes, tuple(options.k))
        by_k = {
            k: {"val": result.val[k].accuracy, "test": result.test[k].accuracy, "balanced": scores.balanced_accuracy}
            for k, scores in result.test.items()
        }
        for rule, k in (("chosen on val", result.k_chosen_on_val), ("best on test", result.k_best_on_test)):
            details = {"k": k, "by_k": by_k, "k_skipped": result.skipped}
            rows.append(Row(name, f"k={k}, {rule}", result.test[k], result.val[k], details))
    return rows


def run_linear(subject: Subject, options: LinearOptions, progress: Progress) -> list[Row]:
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


def run_finetune(subject: Subject, options: FinetuneOptions, progress: Progress) -> list[Row]:
    """The linear probe that fine-tuning starts from, and the fine-tuned network."""
    probe = linear_probe(subject.sets, subject.num_classes, seed=options.seed, progress=progress)
    lr = options.lr or (4e-5 if "resnet" in subject.backbone.arch else 1e-5)
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
    unstable = f", step {result.step:.1f} x the stable" if result.step > 1 else ""
    details = {"epoch": result.epoch, "step_over_stable": result.step}
    return Row(features, f"{prefix}epoch {result.epoch + 1}{unstable}", result.test, result.val, details)


def _feature_kinds(sets: Mapping[str, NucleusSet], standardise: str) -> Iterator[tuple[str, Mapping[str, NucleusSet]]]:
    if standardise in ("raw", "both"):
        yield "raw", sets
    if standardise in ("train", "both"):
        yield "standardised", standardised(sets)


class Task(NamedTuple):
    options: type[Options]
    run: Callable[[Subject, Any, Progress], list[Row]]


TASKS = {
    "knn": Task(KnnOptions, run_knn),
    "linear": Task(LinearOptions, run_linear),
    "finetune": Task(FinetuneOptions, run_finetune),
}
