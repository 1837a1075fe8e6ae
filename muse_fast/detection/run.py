"""A fine-tuning run, from its start or a checkpoint to its summary."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detection_sheet import detection_sheet
from muse_fast.detection.detector import Detector, DetectorSpec, load_detector
from muse_fast.detection.finetuner import Finetuner
from muse_fast.detection.memory import plan, situation
from muse_fast.detection.samples import (
    LabelledImage,
    LfovDataset,
    class_names,
    describe,
    draw_images,
    known_nuclei,
    read_labelled,
)
from muse_fast.detection.score_detector import detect_images
from muse_fast.errors import UserError
from muse_fast.images.points import Points
from muse_fast.models.weights import load_backbone
from muse_fast.runtime import checkpoint, distributed
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.device import pick_device
from muse_fast.scoring.scores import Scores, evaluate, evaluate_all, scores_table
from muse_fast.sources import open_source
from muse_fast.training.loop import sampler_of, train
from muse_fast.training.memory import explained_out_of_memory
from muse_fast.training.parallel import describe_ranks
from muse_fast.training.precision import print_precision_note
from muse_fast.training.report import RunReport, StopSignal, read_metrics
from muse_fast.training.run import find_start, open_folder, report_stalled
from muse_fast.version import __version__
from muse_fast.views.loader import StepSampler, load_batches

PICTURE = "detections.png"

_MAX_IMAGES = 6  # in the picture


def finetune(
    config: FinetuneConfig,
    out: Path,
    *,
    data: str,
    weights: str,
    options: Mapping[str, Any] | None = None,
    arch: str | None = None,
    compat: str | None = None,
    resume: str = "auto",
) -> int:
    """Start or continue a fine-tuning run; return the exit code (0 done, 75 stopped on request, 3 not finite).

    Under torchrun every rank calls it; the ranks share the batch and the evaluations, and the main rank writes. A rank
    that waits too long for another ends its process with code 4.

    Raises:
        UserError: settings, data, weights or the content of ``out`` are not suitable for the run.
    """
    if (out / "summary.json").exists():
        raise UserError(f"{out} is a finished run; choose another --out")
    device = pick_device(config.train.device, "train.device", distributed.local_rank())
    source = open_source(data, **(options or {}))
    splits = read_labelled(source, (config.data.train, config.data.val), config.data.mpp, config.data.sample_size)
    images, val = draw_images(splits[config.data.train], config.data.fraction, config.seed), splits[config.data.val]
    names = class_names(source)

    with StopSignal() as stop, distributed.process_group(device, config.train.timeout, partial(report_stalled, out)):
        start = find_start(out, resume, config, device)
        detector = new_detector(config, names, weights, arch, compat) if start is None else load_detector(start)
        memory = plan(config, detector, device)
        tuner = Finetuner(config, detector, device, len(images))
        if start is not None:
            _refuse_other_data(start, names, len(images))
            tuner.load(start)
        sampler = sampler_of(tuner, np.arange(len(images)))
        if distributed.is_main():
            open_folder(out, config)
            _announce(tuner, out, data, weights, start, images, val)
            print("  memory " + "\n         ".join(memory))
        distributed.wait_for_all()  # every rank has found its checkpoint
        with explained_out_of_memory(device, partial(situation, tuner)):
            return _run(tuner, out, images, val, sampler, stop)


def new_detector(
    config: FinetuneConfig, names: tuple[str, ...], weights: str, arch: str | None, compat: str | None
) -> Detector:
    """Build a detector from a pretrained backbone and heads with random weights, determined by the seed."""
    torch.manual_seed(config.seed)
    backbone = load_backbone(arch, weights, compat=compat)
    spec = DetectorSpec(
        arch=backbone.arch,
        class_names=names,
        mpp=config.data.mpp,
        sample_size=config.data.sample_size,
        surroundings=config.data.surroundings,
        image_size=backbone.image_size,
        pos_embed_resize=backbone.pos_embed_resize,
        decoder_dim=backbone.decoder_dim,
        taps=backbone.taps,
        **dataclasses.asdict(config.detector),
    )
    return Detector(backbone, spec)


def _refuse_other_data(start: Path, names: tuple[str, ...], num_images: int) -> None:
    state = checkpoint.read_state(start)
    then = tuple(state["detector"]["class_names"]), state["num_images"]
    if then != (names, num_images):
        raise UserError(
            f"{start} was trained on {then[1]} images with the classes {', '.join(then[0])}; --data has {num_images} "
            f"with {', '.join(names)}; use the same data, or another --out"
        )


def _run(
    tuner: Finetuner,
    out: Path,
    images: Sequence[LabelledImage],
    val: Sequence[LabelledImage],
    sampler: StepSampler,
    stop: StopSignal,
) -> int:
    config = tuner.config
    dataset = LfovDataset(
        images,
        size=config.data.sample_size,
        surroundings=config.data.surroundings,
        turns=config.data.turns,
        colours=config.data.colours(),
        seed=config.seed,
    )
    began = time.time()
    batches = load_batches(
        dataset,
        sampler,
        workers=config.data.workers,
        named=lambda numbers: f"images {', '.join(images[number].name for number in numbers)}",
        batch_bytes=dataset.batch_bytes(sampler.size),
        pin_memory=tuner.device.type == "cuda",
        device=tuner.device,
        timeout=config.data.timeout,
    )
    with closing(batches), RunReport(out, tuner.step, tuner.steps, _summary_line) as report:
        ended_early = train(
            tuner,
            out,
            batches,
            report,
            stop,
            evaluate=partial(_evaluate, tuner, out, val),
            saves_after=tuner.ends_epoch,
        )
    if ended_early is not None:
        return ended_early
    distributed.wait_for_all()  # the best detector is written
    detector = load_detector(out, tuner.device)
    found = _detect(tuner, detector, val)
    if distributed.is_main():
        (out / "exit.json").unlink(missing_ok=True)
        _write_results(tuner, detector, out, val, found, time.time() - began)
    distributed.wait_for_all()
    return 0


def _evaluate(tuner: Finetuner, out: Path, val: Sequence[LabelledImage], step: int) -> dict[str, float] | None:
    """Score the detector after ``step`` and save it if it is the best so far, if that is due; all ranks call it."""
    config, epochs = tuner.config.train, tuner.epoch_of(step)
    if not (step == tuner.steps or (tuner.ends_epoch(step) and epochs % config.eval_every == 0)):
        return None
    tuner.check()
    detector = tuner.whole_detector()
    found, truths = _detect(tuner, detector, val), _truths(val)
    names = detector.class_names
    scores = evaluate(found, truths, detector.mpp, len(names), config.protocol, config.radius_um)
    if scores.mean_f1 > tuner.best.get("f1", -1.0):
        tuner.best = {"step": step, "epoch": epochs, "f1": scores.mean_f1}
        tuner.save_best(out)  # before the run's checkpoint, which refers to it
    return _as_row(scores, names, epochs)


def _detect(tuner: Finetuner, detector: Detector, images: Sequence[LabelledImage]) -> list[Points]:
    """Detect nuclei in ``images``, which the ranks share; all of them return everything."""
    with tuner.autocast():
        mine = detect_images(detector, images[distributed.rank() :: distributed.world_size()])
    shares = distributed.gather_objects(mine)
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(images))]


def _truths(images: Sequence[LabelledImage]) -> list[Points]:
    return [known_nuclei(image.xy, image.label) for image in images]


def _as_row(scores: Scores, names: Sequence[str], epoch: int) -> dict[str, float]:
    by_class = {f"val_f1_{name}": one.f1 for name, one in zip(names, scores.classes, strict=True)}
    return {"epoch": epoch, "val_f1": scores.mean_f1, **by_class, "val_f1_detection": scores.detection.f1}


def _summary_line(values: Mapping[str, float]) -> str:
    return (
        f"loss {values['loss']:.3f} (offset {values['loss_reg']:.2f} px^2, type {values['loss_type']:.3f}, "
        f"consistency {values['loss_cons']:.3f}) {values['distance']:.1f} px to nuclei, "
        f"{values['distance_of_proposals']:.1f} without offsets, {values['images_per_second']:.2f} images/s, "
        f"data wait {100 * values['data_wait']:.0f} %"
        + (f", MFU {100 * values['mfu']:.0f} %" if "mfu" in values else "")
    )


def _announce(
    tuner: Finetuner,
    out: Path,
    data: str,
    weights: str,
    start: Path | None,
    images: Sequence[LabelledImage],
    val: Sequence[LabelledImage],
) -> None:
    config, spec = tuner.config, tuner.detector.spec
    print(f"muse_fast {__version__} finetune: {spec.arch} on {tuner.device}, {config.train.precision}")
    for name, some in ((config.data.train or "all", images), (config.data.val or "all", val)):
        counts = ", ".join(f"{value} {key}" for key, value in describe(some, spec.class_names).items())
        print(f"  data   {data}, {name}: {counts}")
        with_context = sum(not image.region.all() for image in some)
        print(f"         {with_context} of {len(some)} have tissue around the region")
    beyond = {
        "reflect": "mirrored at the border, as unlabelled tissue",
        "mask": "white and excluded from all losses, so no tissue is unlabelled",
    }
    print(
        f"  sample {spec.sample_size} px at {spec.mpp} um/px; the area beyond an image is "
        f"{beyond[spec.surroundings]} (data.surroundings={spec.surroundings})"
    )
    spread = describe_ranks(config.train.parallel, config.optim.accumulate)
    steps = f"{config.optim.epochs} epochs = {tuner.steps} steps of {config.optim.batch_size} images"
    print(f"  run    {steps}{spread}, to {out}")
    print(f"  from   {weights}" if start is None else f"  resume {start}, step {tuner.step}")
    if tuner.device.type == "cuda":
        print(f"  graphs {tuner.graphs}")
    print_precision_note(config.train.precision, tuner.device)


def _write_results(
    tuner: Finetuner,
    detector: Detector,
    out: Path,
    val: Sequence[LabelledImage],
    found: Sequence[Points],
    seconds: float,
) -> None:
    """Score what the best detector found in val, draw it, and write summary.json, which marks a finished run."""
    truths = _truths(val)
    scores, _ = evaluate_all(found, truths, detector.mpp, len(detector.class_names))
    drawn = slice(0, _MAX_IMAGES)
    picture = out / "pictures" / PICTURE
    detection_sheet(
        picture,
        [image.image.permute(1, 2, 0).numpy() for image in val[drawn]],
        [(points.xy, points.classes()) for points in truths[drawn]],
        [(points.xy, points.classes()) for points in found[drawn]],
        [image.name for image in val[drawn]],
        detector.class_names,
    )
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    summary = {
        "version": __version__,
        "steps": tuner.step,
        "epochs": tuner.config.optim.epochs,
        "seconds_of_last_start": round(seconds, 1),
        "images_per_second": statistics.median(row["images_per_second"] for row in rows),
        "data_wait": statistics.median(row["data_wait"] for row in rows),
        "peak_memory_gib": max(row["peak_memory_gib"] for row in rows),
        "losses_finite": all(math.isfinite(row["loss"]) for row in rows),
        "loss": {"start": rows[0]["loss"], "end": rows[-1]["loss"]},
        "best": tuner.best,
        "val": {name: dataclasses.asdict(one) for name, one in scores.items()},
        "classes": detector.class_names,
        "picture": str(picture),
    }
    write_json(out / "summary.json", summary)
    Console(width=150).print(scores_table(scores, detector.class_names))
    print(
        f"done: best val F1 {tuner.best['f1']:.3f} ({tuner.config.train.protocol}) after epoch {tuner.best['epoch']}, "
        f"{summary['images_per_second']:.2f} images/s, peak memory {summary['peak_memory_gib']:.1f} GiB"
    )
    print(f"summary: {out / 'summary.json'}; picture: {picture}")
