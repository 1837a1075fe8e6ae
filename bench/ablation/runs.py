"""Short pretrainings that differ in one setting each, and how well their features classify nuclei (tables 5 and 6).

For each seed, all variants train for the same number of steps on the same ROIs in the same order, from the same
weights. The runs are too short to yield a good network; they only show the order of the variants.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import torch

from muse_fast import load_backbone, pretrain
from muse_fast.classification.features import extract_features
from muse_fast.classification.tasks import TASKS, Subject
from muse_fast.classification.tiles import Tile, tiles_by_split
from muse_fast.config import PretrainConfig, load_config
from muse_fast.errors import UserError
from muse_fast.models.backbone import Backbone
from muse_fast.pretraining.distill import backbone_of
from muse_fast.sources import open_source
from muse_fast.training.run import find_start, refuse_other_settings

Row: TypeAlias = dict[str, Any]
Tiles: TypeAlias = dict[float, dict[str, list[Tile]]]  # um/px, split

UNTRAINED = "untrained"
BOTH, IMAGE, NUCLEUS, FIXED_20X, FIXED_40X = "both losses", "image loss", "nucleus loss", "0.5 um/px", "0.25 um/px"


def _fixed(mpp: float) -> tuple[str, ...]:
    return tuple(f"views.{kind}_mpp_{end}={mpp}" for kind in ("global", "local") for end in ("min", "max"))


# The settings that each variant changes.
VARIANTS: dict[str, tuple[str, ...]] = {
    BOTH: (),
    IMAGE: ("loss.lambda_nucleus=0",),
    NUCLEUS: ("loss.lambda_image=0",),
    FIXED_20X: _fixed(0.5),
    FIXED_40X: _fixed(0.25),
}
# In the paper the first variant beats the second.
EXPECTED = ((BOTH, NUCLEUS), (NUCLEUS, IMAGE), (BOTH, FIXED_20X), (BOTH, FIXED_40X), (BOTH, UNTRAINED))


def cut(rois: Path, scales: Sequence[float]) -> tuple[Tiles, int]:
    """Cut tiles of 224 px with labelled nuclei from a ROI set; also return the number of classes.

    Raises:
        UserError: a split has no labelled nuclei.
    """
    source = open_source(f"roiset:{rois}")
    return {mpp: tiles_by_split(source, mpp=mpp) for mpp in scales}, len(source.label_names)


def in_turn(
    variants: Sequence[str], seeds: Sequence[int], seconds: float, run: Callable[[str, int], Row]
) -> Iterator[tuple[str, int, Row | None]]:
    """Run every variant with the first seed, then with the next; yield None for a run that would not finish in time.

    Every run is expected to take as long as the longest one so far.
    """
    began, longest = time.monotonic(), 0.0
    for seed, variant in product(seeds, (UNTRAINED, *variants)):
        start = time.monotonic()
        if start + longest - began > seconds:
            yield variant, seed, None
            continue
        row = run(variant, seed)
        longest = max(longest, time.monotonic() - start)
        yield variant, seed, row


def trained(out: Path, config: str, settings: Sequence[str]) -> Row:
    """Pretrain unless ``out`` is a finished run, and return the run's figures.

    Raises:
        UserError: the run cannot start or fails (``OUT.log`` has its output), or a finished run has other settings.
    """
    log = out.with_name(f"{out.name}.log")
    if (out / "summary.json").exists():
        refuse_other_settings(find_start(out, "auto") or out, load_config(config, settings))
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file, contextlib.redirect_stdout(file):
            code = pretrain.main(["--config", config, "--out", str(out), *settings])
        if code != 0:
            raise UserError(f"{out} ended with exit code {code}; see {log}")
    summary = json.loads((out / "summary.json").read_text())
    kept = ("steps", "seconds_of_last_start", "rois_per_second", "data_wait", "loss_image", "loss_nucleus")
    return {key: summary[key] for key in (*kept, "mean_entropy_share_of_ln_k", "retrieval_at_1")}


def untrained(config: PretrainConfig) -> Backbone:
    """Build the network that the variants of a seed start from."""
    torch.manual_seed(config.seed)
    return backbone_of(config).eval()


def scores(backbone: Backbone, tiles: Tiles, num_classes: int, device: str, seed: int) -> dict[str, Row]:
    """Return accuracy and balanced accuracy on the test split, by um/px, then by classifier and kind of features.

    Nothing is chosen on the test split: k and the epoch of the linear probe are the best on val.
    """
    backbone = backbone.to(device).eval()
    found: dict[str, Row] = {}
    for mpp, by_split in tiles.items():
        sets = extract_features(backbone, by_split, device=device, bf16=device == "cuda")
        subject = Subject(backbone, by_split, {split: one.to(device) for split, one in sets.items()}, num_classes)
        of_scale = found[f"{mpp:g}"] = {}
        for task in ("knn", "linear"):
            for row in TASKS[task].run(subject, TASKS[task].config(seed=seed), lambda *_: None):
                if "on test" not in row.selection:
                    figures = {"accuracy": row.test["accuracy"], "balanced": row.test["balanced_accuracy"]}
                    of_scale[f"{task} {row.features}"] = figures
    return found


def measured(
    variant: str,
    seed: int,
    *,
    rois: Path,
    out: Path,
    config: str,
    settings: Sequence[str],
    device: str,
    tiles: Tiles,
    num_classes: int,
) -> Row:
    """Train and score one variant with one seed."""
    settings = [f"seed={seed}", f"data.roiset={rois}", f"train.device={device}", *settings]
    name = f"{variant.replace(' ', '-').replace('/', '-')}-{seed}"
    row: Row = {"variant": variant, "seed": seed}
    if variant == UNTRAINED:
        backbone = untrained(load_config(config, settings))
    else:
        row |= trained(out / name, config, [*settings, *VARIANTS[variant]])
        backbone = load_backbone(None, str(out / name))
    return row | {"scores": scores(backbone, tiles, num_classes, device, seed)}


def spread(rows: Sequence[Row], mpp: str, figure: str) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return mean, minimum and maximum over the seeds in percent, by variant and classifier."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        of_seeds = [row["scores"][mpp] for row in rows if row["variant"] == variant]
        by_classifier = {name: [100 * one[name][figure] for one in of_seeds] for name in of_seeds[0]}
        found[variant] = {name: (sum(v) / len(v), min(v), max(v)) for name, v in by_classifier.items()}
    return found


def differences(rows: Sequence[Row], mpp: str, figure: str) -> list[Row]:
    """Return how many points the first variant of each expected pair is above the second, per classifier and seed."""
    of_run = {(row["variant"], row["seed"]): row["scores"][mpp] for row in rows}
    found = []
    for better, worse in EXPECTED:
        pairs = [
            (of_run[better, seed], of_run[worse, seed]) for v, seed in of_run if v == better and (worse, seed) in of_run
        ]
        for name in pairs[0][0] if pairs else ():
            points = [100 * (ours[name][figure] - theirs[name][figure]) for ours, theirs in pairs]
            found.append(
                {"better": better, "worse": worse, "mpp": mpp, "classifier": name, "figure": figure, "points": points}
            )
    return found
