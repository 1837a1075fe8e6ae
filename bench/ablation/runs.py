"""Short trainings that differ in one setting each, and how well their features classify nuclei (tables 5 and 6).

For each seed, all variants train for the same number of steps from the same weights; the pretrainings see the same ROIs
in the same order. The runs are too short to yield a good network; they only show the order of the variants.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bench import trainings
from muse_fast import load_backbone, pretrain
from muse_fast.classification.bootstrap import FIGURES
from muse_fast.classification.calibration import calibrate_batch_norm
from muse_fast.classification.features import extract_features
from muse_fast.classification.probes import new_head
from muse_fast.classification.tasks import TASKS, Subject
from muse_fast.classification.tiles import VALID, Tile, cut_tiles, tiles_by_split
from muse_fast.classification.tuned import finetune
from muse_fast.config import PretrainConfig, load_config
from muse_fast.models.backbone import Backbone
from muse_fast.pretraining.start import first_backbone
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.options import fixed_settings
from muse_fast.sources import open_source

Row: TypeAlias = dict[str, Any]
Case: TypeAlias = tuple[str, int]  # variant and seed
Tiles: TypeAlias = dict[str, list[Tile]]  # by split

UNTRAINED, SUPERVISED = "untrained", "supervised"
BOTH, IMAGE, NUCLEUS, FIXED_20X, FIXED_40X = "both losses", "image loss", "nucleus loss", "0.5 um/px", "0.25 um/px"


def _fixed(mpp: float) -> tuple[str, ...]:
    return tuple(f"views.{kind}_mpp_{end}={mpp}" for kind in ("global", "local") for end in ("min", "max"))


PRETRAINED: dict[str, tuple[str, ...]] = {
    BOTH: (),
    IMAGE: ("loss.lambda_nucleus=0",),
    NUCLEUS: ("loss.lambda_image=0",),
    FIXED_20X: _fixed(0.5),
    FIXED_40X: _fixed(0.25),
}
"""The settings that each variant changes."""
VARIANTS = (UNTRAINED, *PRETRAINED, SUPERVISED)


def in_order(chosen: Sequence[str] | None) -> list[str]:
    """Return the chosen variants (None: all) in the order in which they run, always with the untrained network."""
    return [variant for variant in VARIANTS if chosen is None or variant == UNTRAINED or variant in chosen]


@cache
def cut(rois: Path, mpp: float) -> tuple[Tiles, int]:
    """Cut tiles of 224 px with labelled nuclei from a ROI set; also return the number of classes.

    Raises:
        UserError: a split has no labelled nuclei.
    """
    source = open_source(f"roiset:{rois}")
    return tiles_by_split(source, partial(cut_tiles, mpp=mpp)), len(source.label_names)


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    rois: Path
    out: Path
    config: str
    settings: tuple[str, ...]
    device: str
    scales: tuple[float, ...]  # um/px of the test

    def config_of(self, variant: str, seed: int) -> PretrainConfig:
        return load_config(self.config, self._settings(variant, seed))

    def _settings(self, variant: str, seed: int) -> list[str]:
        shared = [f"seed={seed}", f"data.roiset={self.rois}", f"train.device={self.device}", *self.settings]
        return [*shared, *PRETRAINED.get(variant, ())]

    def measured(self, case: Case) -> Row:
        """Train and score one variant with one seed, or return what an earlier command found.

        Raises:
            UserError: the training cannot start or fails, or a finished one has other settings.
        """
        variant, seed = case
        out = self.out / f"{variant.replace(' ', '-').replace('/', '-')}-{seed}"
        config, stored = self.config_of(variant, seed), out.with_name(f"{out.name}.json")
        settings = recorded(config)
        row: Row = {"variant": variant, "seed": seed, "scores": {}}
        if stored.exists() and (found := json.loads(stored.read_text()))["settings"] == settings:
            row = found["row"]
        missing = [mpp for mpp in self.scales if f"{mpp:g}" not in row["scores"]]
        if variant in PRETRAINED:
            row |= trained(out, self.config, self._settings(variant, seed))
        if missing:
            backbone = self._backbone(variant, config, out)
            for mpp in missing:
                row["scores"][f"{mpp:g}"] = scores(backbone, *cut(self.rois, mpp), self.device)
            write_json(stored, {"settings": settings, "row": row})
        return row

    def _backbone(self, variant: str, config: PretrainConfig, out: Path) -> Backbone:
        if variant in PRETRAINED:
            return load_backbone(None, str(out))
        tiles, num_classes = cut(self.rois, self.scales[0])
        if variant == UNTRAINED:
            return untrained(config, tiles["train"], self.device)
        return supervised(config, tiles, num_classes, self.device)


def recorded(config: PretrainConfig) -> dict[str, str]:
    """Return the settings on which results depend, by dotted key."""
    return {key: str(value) for key, value in fixed_settings(config)}


def trained(out: Path, config: str, settings: Sequence[str]) -> Row:
    """Pretrain unless ``out`` is a finished run, and return the run's figures.

    Raises:
        UserError: as in `trainings.trained`.
    """
    summary = trainings.trained(pretrain.main, ["--config", config, *settings], out, load_config(config, settings))
    kept = ("steps", "seconds_of_last_start", "rois_per_second", "data_wait", "loss_image", "loss_nucleus")
    return {key: summary[key] for key in (*kept, "mean_entropy_share_of_ln_k", "retrieval_at_1")}


def untrained(config: PretrainConfig, tiles: Sequence[Tile], device: str) -> Backbone:
    """Build the network that the variants start from, with the BatchNorm statistics of ``tiles``."""
    backbone = first_backbone(config).to(device)
    calibrate_batch_norm(backbone, tiles, device=device)
    return backbone


class _Nothing:
    """Features of width 0, where only labels and patients are needed."""

    def nucleus_features(self, images: Tensor, xy: Tensor, image_index: Tensor) -> Tensor:
        return xy[:, :0]


def supervised(config: PretrainConfig, tiles: Tiles, num_classes: int, device: str) -> Backbone:
    """Train the network on the classes of train's nuclei; the epoch is the best on val.

    It sees about as many pixels per step, in as many steps, as the pretrainings, at their peak learning rate.
    """
    views = config.views
    pixels = views.num_globals * views.global_size**2 + views.num_locals * views.local_size**2
    batch_size = max(1, round(config.optim.batch_size * pixels / VALID**2))
    steps_per_epoch = max(1, len(tiles["train"]) // batch_size)
    backbone = first_backbone(config).requires_grad_().to(device)
    head = new_head(backbone.dense_dim, num_classes, torch.Generator().manual_seed(config.seed)).to(device)
    finetune(
        backbone,
        head,
        tiles,
        extract_features(_Nothing(), tiles),
        seed=config.seed,
        lr=config.optim.peak_lr,
        epochs=max(1, round(config.optim.steps / steps_per_epoch)),
        batch_size=batch_size,
        augment=True,
        bf16=config.train.precision == "bf16",
    )
    return backbone


def scores(backbone: Backbone, tiles: Tiles, num_classes: int, device: str) -> dict[str, Row]:
    """Return accuracies and confusion matrices on the test split, by classifier.

    Nothing is chosen on the test split: k and lambda are the best on val.
    """
    sets = extract_features(backbone.to(device).eval(), tiles, device=device, bf16=device == "cuda")
    subject = Subject(backbone, tiles, {split: one.to(device) for split, one in sets.items()}, num_classes)
    found = {}
    for task in ("knn", "ridge"):
        for row in TASKS[task].run(subject, TASKS[task].config(), lambda *_: None):
            if row.classifier != "k best on test":
                name = f"knn {row.features}" if task == "knn" else row.classifier
                found[name] = {key: row.test[key] for key in (*FIGURES, "confusion_by_patient")}
    return found
