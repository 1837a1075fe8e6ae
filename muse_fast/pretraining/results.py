"""Results of a pretraining run: pictures of its views and nuclei, and summary.json."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from muse_fast.batch import Pairs, Views
from muse_fast.models.backbone import Backbone
from muse_fast.ops import match_nuclei
from muse_fast.pretraining import pictures
from muse_fast.pretraining.trainer import Trainer
from muse_fast.runtime import checkpoint
from muse_fast.runtime.atomic import write_json
from muse_fast.training.report import read_metrics
from muse_fast.version import __version__

CONTACT_SHEET = "contact_sheet.png"

_END_SHARE = 0.1  # of the logged rows at either end, which the summary averages


def draw_contact_sheet(path: Path, views: Views) -> None:
    pairs = Pairs(*match_nuclei(views.nuclei.index, views.nuclei.offsets, views.num_rois, views.num_globals))
    pictures.contact_sheet(path, views, pairs)


@torch.inference_mode()
def draw_results(backbone: Backbone, device: torch.device, out: Path, views: Views) -> dict[str, str]:
    """Draw the PCA of the teacher's dense map and retrieved nuclei; returns the paths of all pictures by name."""
    backbone = backbone.eval()
    images = views.global_images.to(device, next(backbone.parameters()).dtype)
    nuclei = views.groups()[1][0]
    folder = out / "pictures"
    paths = {"pca": folder / "pca.png", "retrieval": folder / "retrieval.png"}
    with torch.random.fork_rng():
        pictures.pca_picture(paths["pca"], images[:8].cpu(), backbone.dense_map(images[:8]).float().cpu())
        points = nuclei.to(device)
        features = backbone.nucleus_features(images, points.xy, points.image_index()).float().cpu()
        roi_of_image = torch.arange(len(images)) % views.num_rois
        pictures.retrieval_sheet(paths["retrieval"], images.cpu(), nuclei, features, roi_of_image)
    return {"contact_sheet": str(folder / CONTACT_SHEET), **{name: str(path) for name, path in paths.items()}}


def write_summary(trainer: Trainer, out: Path, drawn: dict[str, str], seconds: float) -> None:
    """Write summary.json, which marks a run as finished, and print its main values."""
    rows = read_metrics(out / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    retrieval = [row for row in rows if "retrieval_at_1" in row]
    share = max(1, round(_END_SHARE * len(training)))

    def mean(key: str, part: list[dict[str, Any]]) -> float | None:
        values = [row[key] for row in part if key in row]
        return statistics.fmean(values) if values else None

    first, last = training[:share], training[-share:]
    losses = {
        name: {"start": mean(f"loss_{name}", first), "end": mean(f"loss_{name}", last)} for name in trainer.loss_weights
    }
    log_k = math.log(trainer.config.head.prototypes)
    summary = {
        "version": __version__,
        "steps": trainer.step,
        "seconds_of_last_start": round(seconds, 1),
        "rois_per_second": statistics.median(row["rois_per_second"] for row in training),
        "data_wait": statistics.median(row["data_wait"] for row in training),
        "peak_memory_gib": max(row["peak_memory_gib"] for row in training),
        **({"mfu": mfu} if (mfu := mean("mfu", training)) is not None else {}),
        "pairs_per_roi": mean("pairs_per_roi", training),
        "losses_finite": all(math.isfinite(row["loss"]) for row in training),
        "ln_k": log_k,
        **{f"loss_{name}": ends for name, ends in losses.items()},
        "mean_entropy_share_of_ln_k": {
            f"{who}_{head}": mean(f"{who}_{head}_mean_entropy", last)
            for who in ("teacher", "student")
            for head in trainer.student.heads
        },
        "retrieval_at_1": {"before": retrieval[0]["retrieval_at_1"], "after": retrieval[-1]["retrieval_at_1"]},
        "retrieval_chance": retrieval[-1]["retrieval_chance"],
        "checkpoint": str(checkpoint.folder_of(out, trainer.step)),
        "pictures": drawn,
    }
    write_json(out / "summary.json", summary)
    changes = [f"{name} loss {ends['start']:.3f} -> {ends['end']:.3f}" for name, ends in losses.items()]
    print(
        f"done: {', '.join(changes)}, ln K {log_k:.3f}, "
        f"retrieval@1 {summary['retrieval_at_1']['before']:.3f} -> {summary['retrieval_at_1']['after']:.3f} "
        f"(chance {summary['retrieval_chance']:.3f}), {summary['rois_per_second']:.1f} ROI/s, "
        f"peak memory {summary['peak_memory_gib']:.1f} GiB"
    )
    print(f"summary: {out / 'summary.json'}; pictures: {out / 'pictures'}")
