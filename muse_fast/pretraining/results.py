"""Results of a pretraining run: pictures of its views and nuclei, the same of the untrained network, summary.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muse_fast.batch import Pairs, Views
from muse_fast.config import ViewsConfig
from muse_fast.images.imagenet import normalise
from muse_fast.models.backbone import Backbone
from muse_fast.ops import match_nuclei
from muse_fast.pretraining import pictures
from muse_fast.pretraining.regions import (
    middle_window,
    neighbouring_rois,
    nucleus_tables,
    share_elsewhere,
    window_size,
    windows,
)
from muse_fast.pretraining.trainer import Trainer
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime import checkpoint
from muse_fast.runtime.atomic import write_json
from muse_fast.training.report import read_metrics
from muse_fast.version import __version__

CONTACT_SHEET = "contact_sheet.png"

_END_SHARE = 0.1  # of the logged rows at either end, which the summary averages
_MOST_SPREAD = 32  # ROIs from all over the set among which similar nuclei are searched
_MOST_MAPS = 6  # of them, those with most nuclei, whose dense maps are drawn


class Results(NamedTuple):
    pictures: dict[str, str]  # path of each by its name
    elsewhere: dict[str, tuple[float, float] | None]  # `share_elsewhere` of each network


def draw_contact_sheet(path: Path, views: Views) -> None:
    pairs = Pairs(*match_nuclei(views.nuclei.index, views.nuclei.offsets, views.num_rois, views.num_globals))
    pictures.contact_sheet(path, views, pairs)


@torch.inference_mode()
def draw_results(
    networks: Mapping[str, Backbone], out: Path, roiset: RoiSet, roi_ids: NDArray[np.int64], views: ViewsConfig
) -> Results:
    """Draw dense maps, similar nuclei and a region of a slide as ``networks`` see them, and measure their features.

    Args:
        networks: the run's backbone ``after`` training and, if it is known, ``before``; in evaluation mode.
        roi_ids: the run's ROIs in random order; the first ones are shown.
    """
    folder = out / "pictures"
    paths = {name: folder / f"{name}.png" for name in ("pca", "retrieval", "region")}
    rois = [roiset[i] for i in roi_ids[:_MOST_SPREAD].tolist()]
    size, mpp = window_size(roiset, views), (views.global_mpp_min + views.global_mpp_max) / 2
    middles = [[middle_window(roi, size, mpp)] for roi in rois]
    tables = nucleus_tables(networks, rois, middles)
    pictures.retrieval_sheet(paths["retrieval"], rois, tables)

    shown = sorted(rois, key=lambda roi: -len(roi.xy))[:_MOST_MAPS]
    boxes = [middle_window(roi, size, views.global_mpp_min) for roi in shown]  # nuclei are largest at the finest scale
    pixels = [torch.from_numpy(roi.decode()).permute(2, 0, 1) for roi in shown]
    images = torch.stack([box.render(image) for box, image in zip(boxes, pixels, strict=True)])
    pictures.pca_picture(paths["pca"], images, {name: _dense_maps(one, images) for name, one in networks.items()})

    region = [roiset[i] for i in neighbouring_rois(roiset, roi_ids)]
    covering = [windows(roi, size, mpp) for roi in region]
    pictures.region_picture(paths["region"], region, nucleus_tables(networks, region, covering))

    drawn = {"contact_sheet": folder / CONTACT_SHEET, **paths}
    shares = {name: share_elsewhere(table) for name, table in tables.items()}
    return Results({name: str(path) for name, path in drawn.items()}, shares)


def _dense_maps(backbone: Backbone, images: Tensor) -> Tensor:
    """Dense maps ``[n, D, h, w]`` of uint8 images, one by one, on the CPU."""
    parameter = next(backbone.parameters())
    normalised = normalise(images).to(parameter.device, parameter.dtype)
    return torch.cat([backbone.dense_map(image[None]).float().cpu() for image in normalised])


def write_summary(trainer: Trainer, out: Path, results: Results, seconds: float) -> None:
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
        "neighbours_in_other_rois": {name: share and share[0] for name, share in results.elsewhere.items()},
        "neighbours_in_other_rois_chance": results.elsewhere["after"] and results.elsewhere["after"][1],
        "checkpoint": str(checkpoint.folder_of(out, trainer.step)),
        "pictures": results.pictures,
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
