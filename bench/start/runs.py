"""Pretrainings that start from the weights of an encoder, and what their features know at each checkpoint.

A first run trains from scratch. Its encoder alone is kept, as a file of timm would be, and every variant continues from
it with a new decoder and new heads. At each checkpoint, nearest neighbours classify the nuclei of the test split, once
by what the encoder's own maps give and once by the rows of the unified map, which MUSE uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bench import trainings
from muse_fast import load_backbone, pretrain
from muse_fast.classification.features import NucleusFeatures, extract_features
from muse_fast.classification.probes import knn
from muse_fast.classification.splits import Splits
from muse_fast.classification.tiles import Tile
from muse_fast.config import load_config
from muse_fast.errors import UserError
from muse_fast.images.imagenet import IMAGENET_MEAN, IMAGENET_STD
from muse_fast.models.backbone import Backbone
from muse_fast.models.timm.backbone import TimmBackbone
from muse_fast.runtime import checkpoint

Row: TypeAlias = dict[str, Any]

SCRATCH, AT_ONCE = "from scratch", "all at once"
FREEZE, RATE, DECAY = "optim.freeze_encoder={freeze}", "optim.encoder_lr_scale=0.1", "optim.layer_decay=0.9"
# What each variant sets besides model.init.
VARIANTS: dict[str, tuple[str, ...]] = {
    AT_ONCE: (),
    "frozen first": (FREEZE,),
    "slower encoder": (RATE, DECAY),
    "frozen first, slower encoder": (FREEZE, RATE, DECAY),
}


def trained(out: Path, config: str, settings: Sequence[str]) -> Path:
    """Pretrain unless ``out`` is a finished run; return ``out``.

    Raises:
        UserError: as in `trainings.trained`.
    """
    trainings.trained(pretrain.main, ["--config", config, *settings], out, load_config(config, settings))
    return out


def keep_encoder(run: Path, file: Path) -> None:
    """Write the encoder of ``run``'s teacher to ``file`` under timm's names, without decoder and heads."""
    torch.save(load_backbone(None, str(run)).encoder.encoder.state_dict(), file)


def over_steps(run: Path, tiles: Mapping[str, Sequence[Tile]], num_classes: int, device: str) -> Iterator[Row]:
    """Score every stored checkpoint of ``run``; scores of checkpoints are kept beside the run."""
    kept = run / "knn.json"
    known: dict[str, Row] = json.loads(kept.read_text()) if kept.exists() else {}
    for step in checkpoint.steps(run):
        if str(step) not in known:
            backbone = load_backbone(None, str(checkpoint.folder_of(run, step))).to(device)
            known[str(step)] = scores(backbone, tiles, num_classes, device)
            kept.write_text(json.dumps(known))
        yield {"step": step, **known[str(step)]}


def scores(backbone: Backbone, tiles: Mapping[str, Sequence[Tile]], num_classes: int, device: str) -> Row:
    """Balanced accuracy and accuracy on the test split, k chosen on val, of both kinds of features."""
    side = next(iter(tiles.values()))[0].image.shape[0]
    statistics = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    alone = TimmBackbone(backbone.encoder.encoder, backbone.arch, side, statistics, align_corners=True).to(device)
    kinds: dict[str, NucleusFeatures] = {"encoder": alone.eval(), "unified map": backbone.eval()}
    found = {}
    for kind, network in kinds.items():
        result = knn(Splits(extract_features(network, tiles, device=device)), num_classes)
        test = result.test[result.k_chosen]
        found[kind] = {"balanced": test["balanced_accuracy"], "accuracy": test["accuracy"]}
    return found


def settings_of(variant: str, encoder: str, freeze: int) -> list[str]:
    """The settings of ``variant``; ``encoder`` is ``timm:NAME@FILE``."""
    if variant == SCRATCH:
        return []
    return [f"model.init={encoder}", *(text.format(freeze=freeze) for text in VARIANTS[variant])]


def arch_of(config: str, settings: Sequence[str]) -> str:
    """The run's architecture.

    Raises:
        UserError: it is not a network of timm, whose encoder alone can be a start.
    """
    arch = load_config(config, settings).model.arch
    if not arch.startswith("timm:"):
        raise UserError(f"model.arch={arch}: expected timm:NAME, whose encoder alone can be a start")
    return arch
