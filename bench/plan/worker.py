"""``python -m bench.plan.worker ACTION JOBS``: of each job, ``count`` one step or time the ``host``, and print the
results as JSON, see `standin.run`. ``trace`` counts, and finds the lines whose backward launches what."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

import torch

from bench.plan.counts import Counts
from bench.plan.standin import DEVICE, StandIn, stand_in
from bench.step.fair import FairTrainer
from bench.step.literal import LiteralTrainer
from bench.step.timing import rows_per_roi, synthetic_views
from muse_fast.config import PretrainConfig, load_config
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detector import grid
from muse_fast.detection.finetuner import Finetuner
from muse_fast.detection.run import new_detector
from muse_fast.detection.samples import ANNOTATED, UNLABELLED, LfovBatch
from muse_fast.pretraining.flops import step_flops
from muse_fast.pretraining.trainer import Trainer
from muse_fast.runtime.options import load_settings
from muse_fast.views.loader import on_device

WARM_UP_STEPS = 2  # fill caches, create the optimiser's state, record graphs
ROUNDS = 7  # of timed steps

# As after the first epoch, with a loss for every proposal.
PRETRAINING = ("train.precision=bf16", "optim.freeze_prototypes_steps=0")
FINETUNING = ("train.precision=bf16",)


class Job(NamedTuple):
    engine: str  # of ENGINES
    arch: str
    settings: tuple[str, ...]


class Run(NamedTuple):
    step: Callable[[], Any]
    images: int  # of a step: ROIs with all their views, or samples
    useful_flops: float | None = None


def main(arguments: Sequence[str]) -> None:
    jobs = [Job(engine, arch, tuple(settings)) for engine, arch, settings in json.loads(arguments[1])]
    with stand_in() as device, redirect_stdout(sys.stderr):  # runs may print something
        if arguments[0] == "host":
            results: list[Any] = host_seconds(jobs)
        else:
            with torch.autograd.set_detect_anomaly(arguments[0] == "trace", check_nan=False):
                results = [count(job, device) for job in jobs]
    json.dump(results, sys.stdout)


def host_seconds(jobs: Sequence[Job]) -> list[list[float]]:
    """CPU seconds of single steps of each job, one step of each in turn."""
    runs = [start(job) for job in jobs]
    times: list[list[float]] = [[] for _ in jobs]
    gc.collect()
    gc.disable()  # as in a run
    for _ in range(ROUNDS):
        for some, run in zip(times, runs, strict=True):
            began = time.process_time()
            run.step()
            some.append(time.process_time() - began)
    return times


def start(job: Job) -> Run:
    """Begin a run, up to the step whose like all later ones are."""
    run = ENGINES[job.engine](job)
    for _ in range(WARM_UP_STEPS):
        run.step()
    return run


def count(job: Job, device: StandIn) -> dict[str, Any]:
    """Count a step of a run."""
    counts = device.meter = Counts()
    run = start(job)
    counts.clear()
    held = counts.held
    run.step()
    device.meter = None
    rows = sorted(counts.rows.items(), key=lambda item: -item[1].seconds["H100"])
    pageable = Counter(copy.place for copy in counts.copies if not copy.pinned)
    return {
        "engine": job.engine,
        "arch": job.arch,
        "settings": job.settings,
        "images": run.images,
        "launches": sum(row.launches for _, row in rows),
        "replayed": sum(row.replayed for _, row in rows),
        "waits": sum(counts.waits.values()),
        "pageable_copies": sum(pageable.values()),
        "bytes": sum(row.bytes for _, row in rows),
        "flops": sum(row.flops for _, row in rows),
        "useful_flops": run.useful_flops,
        "copied_bytes": sum(copy.bytes for copy in counts.copies),
        "held_bytes": held,
        "peak_bytes": counts.peak,
        "seconds": {gpu: sum(row.seconds[gpu] for _, row in rows) for gpu in rows[0][1].seconds},
        "waits_at": dict(counts.waits),
        "pageable_at": dict(pageable),
        "launched_at": [(launches, *where) for where, launches in counts.launched_at.most_common()],
        "operations": {name: vars(row) for name, row in rows},
    }


def pretraining(job: Job) -> PretrainConfig:
    return load_config(None, [f"model.arch={job.arch}", *PRETRAINING, *job.settings])


def ours(job: Job) -> Run:
    """Views are uint8 in pinned memory and copied one ahead, as by the loader."""
    config = pretraining(job)
    trainer, views = Trainer(config, DEVICE), synthetic_views(config)
    flops = step_flops(config, rows_per_roi(views)) * views.num_rois
    pixels = {name: getattr(views, name).to(torch.uint8) for name in ("global_images", "local_images")}
    batches = iter(on_device(repeat(replace(views, **pixels).pin_memory()), DEVICE))
    return Run(lambda: trainer.train_step(next(batches), measure=False), views.num_rois, flops)


def baseline(kind: type[FairTrainer | LiteralTrainer]) -> Callable[[Job], Run]:
    """Views are already on the device, as in `bench step`."""

    def build(job: Job) -> Run:
        config = pretraining(job)
        trainer = kind(config, Trainer(config, DEVICE).student.state_dict(), DEVICE)
        views = synthetic_views(config)
        flops = step_flops(config, rows_per_roi(views)) * views.num_rois
        on_device = views.to(DEVICE)
        return Run(lambda: trainer.train_step(on_device), views.num_rois, flops)

    return build


def finetuning(job: Job) -> Run:
    """Half of each sample is annotated, with a nucleus at every tenth proposal."""
    config = load_settings(FinetuneConfig, None, [*FINETUNING, *job.settings])
    detector = new_detector(config, ("a", "b", "c"), f"random:{job.arch}", None, None)
    count, side = config.optim.batch_size, config.data.sample_size
    tuner = Finetuner(config, detector, DEVICE, count)
    tuner.step = tuner.steps // 2  # the weight of the consistency loss is 0 at the start
    places = torch.full((count, side, side), UNLABELLED, dtype=torch.uint8)
    places[:, :, : side // 2] = ANNOTATED
    xy = grid(side // 2, config.detector.stride)[::10]
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    batch = LfovBatch(
        plain=images.pin_memory(),
        images=images.pin_memory(),
        places=places.pin_memory(),
        xy=xy.repeat(count, 1),
        label=torch.arange(len(xy)).repeat(count) % 3,
        counts=torch.full((count,), len(xy)),
        image_ids=torch.arange(count),
        epochs=torch.zeros(count, dtype=torch.int64),
    )
    batches = iter(on_device(repeat(batch), DEVICE))
    return Run(lambda: tuner.train_step(next(batches), measure=False), count)


ENGINES: dict[str, Callable[[Job], Run]] = {
    "ours": ours,
    "fair": baseline(FairTrainer),
    "literal": baseline(LiteralTrainer),
    "finetune": finetuning,
}

if __name__ == "__main__":
    main(sys.argv[1:])
