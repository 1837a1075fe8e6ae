"""Fine-tunings that differ in where they start, and the scores of their detectors on the test split.

For each seed and case, both starts train for the same number of steps on the same samples in the same order, with the
same random weights in the heads. The random start is a network of the same shape as the pretrained one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from bench import trainings
from muse_fast import finetune, load_backbone
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detector import Detector, Proposals, load_detector
from muse_fast.detection.samples import LabelledImage, known_nuclei
from muse_fast.detection.score_detector import detect_images
from muse_fast.export import BACKBONE, Trained, write_safetensors
from muse_fast.images.points import Points
from muse_fast.models.backbone import random_twin_of
from muse_fast.runtime.atomic import replacing, write_json
from muse_fast.runtime.options import load_settings
from muse_fast.scoring.protocols import PROTOCOLS
from muse_fast.training.report import read_metrics

Row: TypeAlias = dict[str, Any]
Counts: TypeAlias = NDArray[np.int64]  # [images, classes + 1, 3], see `muse_fast.scoring.protocols`

RANDOM, PRETRAINED = "random", "pretrained"
STARTS = (RANDOM, PRETRAINED)
RULES = ("ocelot", "max-matching")  # protocols whose figures are those of sums over images
EVALUATIONS = 2  # of the val split in a run
DRAWS = 2000
LAST = 5  # rows of metrics.jsonl whose mean distance of matched proposals is reported
NEAR_UM = 1.5  # half the radius of the protocols: the distance at which offsets decide


class Case(NamedTuple):
    """What the runs of both starts share."""

    steps: int
    fraction: float  # of the images to train on

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.fraction:.0%} of the labels"


class Tested(NamedTuple):
    """What a run finds on the test split."""

    start: str
    seed: int
    counts: dict[str, Counts]  # see `tested`


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What all runs share."""

    out: Path
    """Folder of the runs."""
    config: str
    settings: Sequence[str]
    data: Sequence[str]
    """``--data SOURCE`` and the options of the source."""
    pretrained: str
    """Weights; ``{seed}`` in them is that of the run, so that each seed can have its own pretraining."""
    device: str
    train_images: int
    test: Sequence[LabelledImage]

    def run(self, start: str, case: Case, seed: int) -> tuple[Row, Tested]:
        """Train and test one detector, or read what is left of it in ``out``."""
        weights = self.pretrained.replace("{seed}", str(seed))
        if start == RANDOM:
            weights = random_twin(weights, seed, self.out)
        folder = self.out / f"{start}-{case.steps}-{case.fraction:g}-{seed}"
        settings = with_budget(self.config, [*self.settings, f"seed={seed}"], case, self.train_images)
        row: Row = {"start": start, "seed": seed, **case._asdict()}
        row |= trained(folder, self.config, settings, self.data, weights)
        counts = tested(folder, self.test, self.device)
        row["detection_f1"] = {what: detection_f1(one) for what, one in counts.items()}
        return row, Tested(start, seed, counts)


def with_budget(config: str, settings: Sequence[str], case: Case, images: int) -> list[str]:
    """Add the settings of ``case`` to ``settings``, for a split of ``images`` images to train on.

    A run ends with an epoch, so its steps are those of ``case`` up to rounding, and the same for both starts.
    """
    settings = [*settings, f"data.fraction={case.fraction}"]
    used = max(1, round(case.fraction * images))
    epochs = max(1, round(case.steps * load_settings(FinetuneConfig, config, settings).optim.batch_size / used))
    return [*settings, f"optim.epochs={epochs}", f"train.eval_every={max(1, epochs // EVALUATIONS)}"]


def random_twin(pretrained: str, seed: int, folder: Path) -> str:
    """Write a network with the shape of ``pretrained`` and random weights into ``folder`` once, and return its path."""
    path = folder / f"random-{seed}.safetensors"
    if path.exists():
        return str(path)
    like = load_backbone(None, pretrained)
    torch.manual_seed(seed)
    twin = random_twin_of(like, like.image_size)
    tensors = {f"{BACKBONE}{name}": value for name, value in twin.state_dict().items()}
    record = {"source": f"random weights, seed {seed}"}
    network = Trained(like.arch, tensors, record, "exact", like.pos_embed_resize, list(like.taps))
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_safetensors(network, temporary)
    return str(path)


def trained(out: Path, config: str, settings: Sequence[str], data: Sequence[str], weights: str) -> Row:
    """Fine-tune unless ``out`` is a finished run, and return the run's figures.

    Args:
        data: ``--data SOURCE`` and the options of the source.

    Raises:
        UserError: as in `trainings.trained`.
    """
    argv = ["--config", config, *data, "--weights", weights, *settings]
    summary = trainings.trained(finetune.main, argv, out, load_settings(FinetuneConfig, config, settings))
    rows = read_metrics(out / "metrics.jsonl")
    kept = ("step", "val_f1", "val_f1_detection")
    last = [row for row in rows if "distance" in row][-LAST:]
    return {
        "steps_done": summary["steps"],
        "seconds": summary["seconds_of_last_start"],
        "val_f1": [{key: row[key] for key in kept} for row in rows if "val_f1" in row],
        **{key: sum(row[key] for row in last) / len(last) for key in ("distance", "distance_of_proposals")},
    }


def tested(run: Path, images: Sequence[LabelledImage], device: str) -> dict[str, Counts]:
    """What the best detector of ``run`` finds in ``images``, counted once and then read from ``test.json``.

    Besides the rules there are ``near`` and ``near, no offsets``: ocelot's rule within ``NEAR_UM``, and the same
    with every nucleus at its proposal.
    """
    kept = run / "test.json"
    if not kept.exists():
        detector = load_detector(run, device)
        truths = [known_nuclei(image.xy, image.label) for image in images]
        counted = partial(count, truths=truths, mpp=detector.mpp, classes=len(detector.class_names))
        found, at_proposals = detected(detector, images)
        counts = {rule: counted(found, rule=rule) for rule in RULES}
        counts["near"] = counted(found, rule=RULES[0], radius_um=NEAR_UM)
        counts["near, no offsets"] = counted(at_proposals, rule=RULES[0], radius_um=NEAR_UM)
        write_json(kept, {name: one.tolist() for name, one in counts.items()})
    return {name: np.array(one) for name, one in json.loads(kept.read_text()).items()}


def detected(detector: Detector, images: Sequence[LabelledImage]) -> tuple[list[Points], list[Points]]:
    """Detections in ``images``, and what they would be with offsets of zero. The network runs once for both."""
    seen: list[Proposals] = []
    with detector.register_forward_hook(lambda _, __, proposals: seen.append(proposals)):
        found = detect_images(detector, images)
    again = (one._replace(points=one.xy.expand_as(one.points)) for one in seen)
    with mock.patch.object(detector, "forward", side_effect=again):
        return found, detect_images(detector, images)


def count(
    found: Sequence[Points],
    truths: Sequence[Points],
    rule: str,
    mpp: float,
    classes: int,
    radius_um: float | None = None,
) -> Counts:
    """Count pairs and points without a partner, image by image."""
    radius = PROTOCOLS[rule].radius(mpp, radius_um)
    return np.stack([PROTOCOLS[rule].count(*image, radius, classes) for image in zip(found, truths, strict=True)])


def mean_f1(counts: Counts, rule: str, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean F1 over classes in percent, ``[draws]``, of images that are counted ``weights [draws, images]`` times."""
    figures = PROTOCOLS[rule].figures(np.tensordot(weights, counts, axes=1))
    return 100 * figures[:, :-1, 2].mean(axis=1)


def detection_f1(counts: Counts) -> float:
    """F1 of detection, in percent, over all images."""
    tp, fp, fn = counts[:, -1].sum(axis=0)
    return float(100 * 2 * tp / max(1, 2 * tp + fp + fn))


def compared(of_case: Sequence[Tested]) -> Row:
    """Mean F1 in percent by rule of both starts, and their difference, averaged over the seeds that have both.

    Returns:
        By rule, for each start and ``difference``: ``mean``, ``ci95`` over images, drawn together for all runs, and
        ``seeds``; empty if no seed has both.
    """
    runs = {(one.start, one.seed): one.counts for one in of_case}
    seeds = [seed for start, seed in runs if start == RANDOM and (PRETRAINED, seed) in runs]
    if not seeds:
        return {}
    images = len(of_case[0].counts[RULES[0]])
    drawn = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=DRAWS)
    weights = np.concatenate([np.ones((1, images), np.int64), drawn])
    found: Row = {}
    for rule in RULES:
        f1 = {  # [seeds, 1 + draws]
            start: np.stack([mean_f1(runs[start, seed][rule], rule, weights) for seed in seeds]) for start in STARTS
        }
        f1["difference"] = f1[PRETRAINED] - f1[RANDOM]
        found[rule] = {name: _summary(values, seeds) for name, values in f1.items()}
    return found


def _summary(values: NDArray[np.float64], seeds: Sequence[int]) -> Row:
    of_seeds = values[:, 0].tolist()
    return {
        "mean": float(values[:, 0].mean()),
        "ci95": np.quantile(values[:, 1:].mean(axis=0), (0.025, 0.975)).tolist(),
        "seeds": dict(zip(map(str, seeds), of_seeds, strict=True)),
    }
