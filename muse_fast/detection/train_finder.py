"""Training of a nucleus finder from annotated points.

Trains :class:`NucleusNet` on the train split of a source with annotated nuclei, chooses threshold and minimal distance
on val, and compares it with the classical detector on val and test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from muse_fast.detection.crops import Annotated, Crops, draw_crops
from muse_fast.errors import UserError
from muse_fast.finders.learned import ClassicalFinder, LearnedFinder, NucleusFinder, write_finder
from muse_fast.finders.network import MULTIPLE, NucleusNet
from muse_fast.images.image_files import resampled
from muse_fast.images.points import Points
from muse_fast.runtime import atomic
from muse_fast.runtime.options import MAX_SEED, Config, setting
from muse_fast.scoring.scores import Score, evaluate
from muse_fast.sources import open_source
from muse_fast.sources.base import SPLITS, read_splits
from muse_fast.training.report import RunReport
from muse_fast.training.schedules import warmup_cosine
from muse_fast.version import __version__

WEIGHTS = "detector.safetensors"
PROTOCOL = "max-matching"  # of muse_fast.scoring.protocols: 3 um, as many pairs as possible
DRAWS = 2000
DISTANCES_UM = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
THRESHOLDS = np.arange(0.1, 0.701, 0.02).tolist()
CLASSICAL_THRESHOLDS = np.arange(0.01, 0.081, 0.0025).tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainDetectorConfig(Config):
    """Settings, given as ``key=value``. The weights in the package were trained with the defaults."""

    seed: int = setting(0, ge=0, le=MAX_SEED)
    steps: int = setting(1500, ge=1)
    batch_size: int = setting(8, ge=1)
    """Crops per step."""
    crop: int = setting(256, ge=32, multiple_of=MULTIPLE)
    """Side of a crop in pixels."""
    mpp: float = setting(0.5, gt=0)
    """um per pixel of the crops before zooming."""
    sigma_um: float = setting(1.5, gt=0)
    """Standard deviation of the Gaussian that represents a nucleus in the heatmap."""
    lr: float = setting(1e-3, gt=0)
    """Peak learning rate of AdamW, after a warm-up of a twentieth of the steps and before a cosine to 0."""
    weight_decay: float = setting(0.05, ge=0)
    precision: str = setting("bf16", choices=("bf16", "fp32"))
    """``bf16`` autocast or ``fp32``. On a CPU without bf16 instructions (AVX512-BF16 or AMX) fp32 is faster."""
    log_every: int = setting(50, ge=1)


@dataclass(frozen=True, slots=True)
class Labelled:
    """An image of the source and its nuclei."""

    image: NDArray[np.uint8]  # [H, W, 3]
    mpp: float
    xy: NDArray[np.float32]  # [n, 2] pixels


# ------------------------------------------------------------------------------------------------------- training


def train(
    images: Sequence[Labelled], options: TrainDetectorConfig, report: Callable[[int, Mapping[str, float]], None]
) -> LearnedFinder:
    """Train a network; the same images and options produce the same weights on the same machine.

    Args:
        report: called every ``log_every`` steps with the step (from 1) and measurements since the last call.

    Raises:
        UserError: the loss is no longer finite.
    """
    torch.manual_seed(options.seed)
    network = NucleusNet().train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    annotated = [_annotated(item, options.mpp) for item in images]
    losses = []
    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = warmup_cosine(options.lr, 0.0, step, options.steps, options.steps // 20)
        crops = draw_crops(
            annotated,
            np.random.default_rng((options.seed, step)),
            batch_size=options.batch_size,
            size=options.crop,
            sigma=options.sigma_um / options.mpp,
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            logits = network(crops.density)
        loss = heatmap_loss(logits, crops)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise UserError(f"the loss is {losses[-1]} at step {step + 1}; try a smaller lr than {options.lr:g}")
        if (step + 1) % options.log_every == 0 or step + 1 == options.steps:
            report(step + 1, {"loss": float(np.mean(losses)), "lr": optimiser.param_groups[0]["lr"]})
            losses.clear()
    # From here on, use the weights as the file will store them.
    network.half().float()
    return LearnedFinder(network.eval(), options.mpp, threshold=THRESHOLDS[0], min_distance_um=DISTANCES_UM[0])


def heatmap_loss(logits: Tensor, crops: Crops) -> Tensor:
    """Quality focal loss (Li et al., 2020) with exponent 2: weighted sum over cells, divided by that of the targets.

    ``|t - p|^2 * BCE(p, t)`` has its minimum at ``p = t`` like cross-entropy, but the many easy cells between nuclei
    count next to nothing.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, crops.target, reduction="none")
    gap = (crops.target - logits.sigmoid()).detach().square()
    return (crops.weight * gap * entropy).sum() / (crops.weight * crops.target).sum().clamp(min=1)


def _annotated(item: Labelled, mpp: float) -> Annotated:
    image = resampled(item.image, item.mpp / mpp)
    ratio = np.array(image.shape[1::-1]) / item.image.shape[1::-1]
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return Annotated(pixels, torch.from_numpy((item.xy * ratio).astype(np.float32)))


# --------------------------------------------------------------------------------------------------------- scores


def scores_at(
    finder: NucleusFinder, images: Sequence[Labelled], thresholds: Sequence[float], draws: int = 0
) -> list[Score]:
    """Detection scores by ``PROTOCOL`` at each of the thresholds, which must be ascending.

    A finder's points at a threshold are those at a lower one with at least that score, so it runs once per image.

    Args:
        draws: bootstrap samples of the images for the intervals of F1; 0 computes no intervals.
    """
    found = [finder(item.image, item.mpp, threshold=thresholds[0]) for item in images]
    truths = [Points(item.xy) for item in images]
    scales = [item.mpp for item in images]
    return [
        evaluate(
            [Points(points.xy[points.confidence() >= threshold]) for points in found],
            truths,
            scales,
            1,
            PROTOCOL,
            draws=draws,
        ).detection
        for threshold in thresholds
    ]


def scored(finder: NucleusFinder, images: Sequence[Labelled], draws: int = 0) -> Score:
    """Scores at the finder's own threshold."""
    return scores_at(finder, images, [finder.threshold], draws)[0]


def choose_settings(finder: LearnedFinder, val: Sequence[Labelled]) -> None:
    """Set minimal distance and threshold of ``finder`` to those with the best F1 on ``val``."""
    chosen = []
    for distance in DISTANCES_UM:
        finder.min_distance_um = distance
        f1, threshold = best_threshold(finder, val, THRESHOLDS)
        chosen.append((f1, threshold, distance))
    _, finder.threshold, finder.min_distance_um = max(chosen)


def best_threshold(finder: NucleusFinder, val: Sequence[Labelled], thresholds: Sequence[float]) -> tuple[float, float]:
    """The best F1 on ``val`` and its threshold."""
    f1 = [score.f1 for score in scores_at(finder, val, thresholds)]
    return max(f1), thresholds[f1.index(max(f1))]


# ------------------------------------------------------------------------------------------------------------ run


def train_detector(
    data: str, out: Path, options: TrainDetectorConfig, source_options: Mapping[str, Any] | None = None
) -> int:
    """Train, choose settings on val, score on val and test; write weights, summary.json and metrics.jsonl to ``out``.

    Raises:
        UserError: the source lacks a split or nuclei, ``out`` contains a finished run, or training diverges.
    """
    if (out / "summary.json").exists():
        raise UserError(f"{out} contains a finished run; remove it or choose another --out")
    source = open_source(data, **(source_options or {}))
    images = read_splits(source, SPLITS, lambda item: Labelled(item.image, item.mpp, item.xy))
    counts = {split: (len(found), sum(len(item.xy) for item in found)) for split, found in images.items()}
    described = ", ".join(f"{split} {n} images with {nuclei} nuclei" for split, (n, nuclei) in counts.items())
    print(f"train_detector {data} -> {out}\n{described}\n{options}", flush=True)

    started, used = time.monotonic(), time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    with RunReport(out, 0, options.steps, lambda values: f"loss {values['loss']:.4f}") as report:
        finder = train(images["train"], options, report.training)
    seconds = {"wall": round(time.monotonic() - started), "cpu": round(time.process_time() - used)}
    choose_settings(finder, images["val"])
    classical = ClassicalFinder()
    tuned = ClassicalFinder(best_threshold(classical, images["val"], CLASSICAL_THRESHOLDS)[1])
    rows = [
        _row(name, one, images) for name, one in (("resnet18", finder), ("classical", classical), ("classical", tuned))
    ]
    summary = {
        "data": data,
        "source_options": dict(source_options or {}),
        "images_and_nuclei": counts,
        "options": asdict(options),
        "min_distance_um": finder.min_distance_um,
        "protocol": f"{PROTOCOL}, class-agnostic",
        "detectors": rows,
        "training_seconds": seconds,
        "torch": torch.__version__,
        "program": f"muse_fast {__version__}",
    }
    about = {key: summary[key] for key in ("options", "protocol", "torch", "program")}
    write_finder(out / WEIGHTS, finder, {"training_data": data.partition(":")[0], "test": rows[0]["test"], **about})
    atomic.write_json(out / "summary.json", summary)
    _print_rows(rows)
    print(f"trained in {seconds['wall']} s, {seconds['cpu']} s of CPU time; {out / WEIGHTS}, {out / 'summary.json'}")
    return 0


def _row(name: str, finder: NucleusFinder, images: Mapping[str, Sequence[Labelled]]) -> dict[str, Any]:
    scores = {split: asdict(scored(finder, images[split], DRAWS)) for split in ("val", "test")}
    return {"detector": name, "threshold": finder.threshold, **scores}


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"{'detector':10} {'threshold':>9}  {'val F1':>6}  {'test F1':>7} {'95 % interval':>14}  precision  recall")
    for row in rows:
        val, test = row["val"], row["test"]
        low, high = test["f1_ci95"]
        print(
            f"{row['detector']:10} {row['threshold']:9.4f}  {val['f1']:6.4f}  {test['f1']:7.4f} "
            f"{low:6.4f}..{high:6.4f}  {test['precision']:9.4f}  {test['recall']:6.4f}"
        )
