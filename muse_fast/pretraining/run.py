"""Run a pretraining from the start, or from a checkpoint, to its summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from muse_fast.batch import Views
from muse_fast.config import PretrainConfig
from muse_fast.errors import UserError, require
from muse_fast.models.archs import check_model
from muse_fast.models.backbone import Backbone
from muse_fast.models.calibration import set_batch_norm_statistics
from muse_fast.pretraining.flops import step_flops
from muse_fast.pretraining.memory import situation
from muse_fast.pretraining.results import CONTACT_SHEET, draw_contact_sheet, draw_results, write_summary
from muse_fast.pretraining.retrieval import nucleus_retrieval
from muse_fast.pretraining.start import describe, first_backbone
from muse_fast.pretraining.trainer import Trainer
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime import checkpoint, distributed
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.device import peak_flops, peak_memory, pick_device
from muse_fast.training.guard import NonFiniteError
from muse_fast.training.memory import explained_out_of_memory
from muse_fast.training.report import RunReport, StopSignal, Stopwatch, collected_between_steps, read_back
from muse_fast.training.run import (
    find_start,
    print_precision_note,
    refuse_other_settings,
    report_non_finite,
    report_stalled,
    report_stopped,
)
from muse_fast.training.schedules import in_steps
from muse_fast.version import __version__
from muse_fast.views import renderers
from muse_fast.views.loader import StepSampler, ViewDataset, as_batches, check_roiset, load_views


def pretrain(config: PretrainConfig, out: Path, *, resume: str = "auto") -> int:
    """Run or continue a pretraining; returns the exit code (0 done, 75 stopped on request, 3 not finite).

    Under torchrun every rank calls it; the ranks share the batch, and the main rank writes. A rank that waits too long
    for another ends its process with code 4.

    Raises:
        UserError: settings, data or the state of ``out`` do not allow the run.
    """
    check_model(config)
    if (out / "summary.json").exists():
        raise UserError(f"{out} contains a finished run; choose another --out")
    if not config.data.roiset:
        raise UserError("data.roiset is not set: set it to the folder that `python -m muse_fast.prepare` wrote")
    roiset = RoiSet(Path(config.data.roiset))
    roi_ids = roiset.select(config.data.split)
    check_roiset(roiset, roi_ids, config.views)
    config = in_steps(config, len(roi_ids))

    device = pick_device(config.train.device, "train.device", distributed.local_rank())
    if (reason := renderers.why_not(config.data.backend, device)) is not None:
        raise UserError(f"data.backend={config.data.backend}: {reason}")
    with StopSignal() as stop, distributed.process_group(device, config.train.timeout, partial(report_stalled, out)):
        trainer = Trainer(config, device)
        start, begun = find_start(out, resume), None
        _refuse_unequal_starts(out, start, device)
        if start is not None:
            refuse_other_settings(start, config)
            trainer.load(start)
        elif config.model.init:
            begun = trainer.start_from(config.model.init)
        else:
            expected = "0 for a run without model.init, whose encoder has yet to learn everything"
            require(config.optim.freeze_encoder == 0, "optim.freeze_encoder", config.optim.freeze_encoder, expected)
        config = trainer.config  # "auto" is decided, and a checkpoint may have decided it
        dataset = ViewDataset(roiset, config.views, config.seed)
        sampler = _sampler(trainer, roi_ids)
        if distributed.is_main():
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
            checkpoint.remove_temporary(out)
            _announce(config, out, roiset, len(roi_ids), trainer, start)
            if begun is not None:
                write_json(out / "init.json", {"init": config.model.init, **begun})
                print(f"  from   {config.model.init}", *(f"         {line}" for line in describe(begun)), sep="\n")
        distributed.wait_for_all()  # every rank has found its checkpoint
        with explained_out_of_memory(device, partial(situation, trainer)):
            return _run(trainer, out, dataset, roi_ids, sampler, stop)


def _run(
    trainer: Trainer,
    out: Path,
    dataset: ViewDataset,
    roi_ids: np.ndarray[Any, np.dtype[np.int64]],
    sampler: StepSampler,
    stop: StopSignal,
) -> int:
    config = trainer.config
    start_step, steps, train = trainer.step, config.optim.steps, config.train
    probe = _probe(dataset, roi_ids, train.eval_rois, config.optim.batch_size)
    began = time.time()
    watch = Stopwatch()
    views = load_views(
        dataset,
        sampler,
        workers=config.data.workers,
        pin_memory=trainer.device.type == "cuda",
        device=trainer.device,
        backend=config.data.backend,
        timeout=config.data.timeout,
    )
    with (
        closing(views),
        RunReport(out, start_step, steps) as report,
        collected_between_steps() as collect,
    ):
        if report.is_new:
            draw_contact_sheet(out / "pictures" / CONTACT_SHEET, probe[0])
        if distributed.any_rank(report.is_new, trainer.device):
            report.evaluation(start_step, _evaluate(trainer, probe))
        for micro_batches in watch.timed(zip(*[views] * config.optim.accumulate, strict=True)):
            step = trainer.step + 1
            distributed.at_step(step)
            log_it = step % train.log_every == 0 or step == steps
            save_it = step % train.checkpoint_every == 0 or step == steps
            values = trainer.train_step(*micro_batches, measure=log_it)
            # From here on, at some steps, the host waits for the device, and ranks wait for each other.
            asked_to_stop = False
            try:
                if log_it:
                    trainer.check()
                    report.training(step, read_back(values) | _throughput(trainer, watch, micro_batches))
                    collect()
                if step == steps or (train.eval_every and step % train.eval_every == 0):
                    report.evaluation(step, _evaluate(trainer, probe))
                if log_it or distributed.world_size() == 1:
                    asked_to_stop = distributed.any_rank(stop.received is not None, trainer.device)
                if save_it or asked_to_stop:
                    trainer.save(out)
            except NonFiniteError as error:
                return report_non_finite(out, config.seed, error)
            if asked_to_stop and step < steps:
                return report_stopped(out, stop.received or "another rank was told to stop", step)
    networks = {"after": trainer.teacher_backbone().eval()} | _before(trainer, probe)
    if distributed.is_main():
        (out / "exit.json").unlink(missing_ok=True)
        results = draw_results(networks, out, dataset.roiset, _shuffled(dataset.seed, roi_ids), config.views)
        write_summary(trainer, out, results, time.time() - began)
    distributed.wait_for_all()
    return 0


def _sampler(trainer: Trainer, roi_ids: np.ndarray[Any, np.dtype[np.int64]]) -> StepSampler:
    """Return the sampler of this rank's micro-batches for the remaining steps.

    Raises:
        UserError: the batch does not divide among ranks and micro-batches.
    """
    return StepSampler(
        roi_ids,
        seed=trainer.config.seed,
        batch_size=trainer.config.optim.batch_size,
        start_step=trainer.step,
        stop_step=trainer.config.optim.steps,
        accumulate=trainer.config.optim.accumulate,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def _throughput(trainer: Trainer, watch: Stopwatch, micro_batches: Sequence[Views]) -> dict[str, float]:
    """Return ROIs per second over all ranks, share of time spent waiting for data, memory, and MFU if it is known."""
    config, ranks = trainer.config, distributed.world_size()
    reading = watch.read(config.optim.batch_size)
    reading["peak_memory_gib"] = peak_memory(trainer.device) / 2**30
    peak = peak_flops(trainer.device)
    if peak:
        rois = config.optim.batch_size / ranks
        rows = sum(len(views.nuclei.index) for views in micro_batches) / rois
        global_rows = sum(views.num_global_nuclei for views in micro_batches) / rois
        flops = step_flops(config, (rows, global_rows), trainer.student.train_encoder) * reading["rois_per_second"]
        reading["mfu"] = flops / (peak * ranks)
    return reading


def _refuse_unequal_starts(out: Path, start: Path | None, device: torch.device) -> None:
    """Check that all ranks, which search for checkpoints independently, have found the same one."""
    step = -1 if start is None else checkpoint.read_state(start)["step"]
    steps = distributed.gather_over_ranks(torch.tensor(step, device=device)).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"{out}: ranks would start from checkpoints of different steps, {steps} (-1: none); "
            "all of them must see the same folder"
        )


def _announce(
    config: PretrainConfig, out: Path, roiset: RoiSet, num_rois: int, trainer: Trainer, start: Path | None
) -> None:
    views, optim = config.views, config.optim
    split = f"split {config.data.split}" if config.data.split else "all splits"
    print(f"muse_fast {__version__} pretrain: {config.model.arch} on {trainer.device}, {config.train.precision}")
    print(f"  data   {roiset.path} ({num_rois} ROIs, {split}), {config.data.workers} workers, by {config.data.backend}")
    print(
        f"  views  {views.num_globals} x {views.global_size} px at {views.global_mpp_min}-{views.global_mpp_max}, "
        f"{views.num_locals} x {views.local_size} px at {views.local_mpp_min}-{views.local_mpp_max} um/px"
    )
    ranks = distributed.world_size()
    spread = f" over {ranks} ranks ({config.train.parallel})" if ranks > 1 else ""
    spread += f" in {optim.accumulate} micro-batches" if optim.accumulate > 1 else ""
    print(f"  run    {optim.steps} steps of {optim.batch_size} ROIs{spread}, K {config.head.prototypes}, to {out}")
    scaled = f" ({optim.lr:g} x {optim.batch_size} / {optim.base_batch})" if optim.base_batch else ""
    clipping = f"gradients clipped at {optim.clip_grad:g} ({optim.clip})" if optim.clip_grad else "no clipping"
    print(f"  optim  {optim.name}, learning rate {optim.peak_lr:g}{scaled}, {clipping}")
    if (optim.freeze_encoder, optim.encoder_lr_scale, optim.layer_decay) != (0, 1.0, 1.0):
        print(
            f"         encoder frozen for {optim.freeze_encoder} steps; learning rate x {optim.encoder_lr_scale:g}, "
            f"x {optim.layer_decay:g} per layer"
        )
    if trainer.logits.reason:
        print(f"  loss   {trainer.logits}")
    if start is not None:
        print(f"  resume {start}, step {trainer.step}")
    print_precision_note(config.train.precision, trainer.device)


def _probe(dataset: ViewDataset, roi_ids: np.ndarray[Any, Any], count: int, batch_size: int) -> list[Views]:
    """Return the fixed views on which retrieval is measured."""
    return as_batches(dataset, _shuffled(dataset.seed, roi_ids)[:count], batch_size)


def _shuffled(seed: int, roi_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the ROIs in the order in which results use them."""
    return np.random.default_rng([seed, 2**32 - 1]).permutation(roi_ids)


def _before(trainer: Trainer, probe: list[Views]) -> dict[str, Backbone]:
    """Return the backbone before training with the BatchNorm statistics of ``probe``; all ranks must call it.

    Statistics that fit the images are no learning, and they alone change its features much.
    """
    dtype, device, backbone = trainer.centers["image"].dtype, trainer.device, None
    try:
        backbone = first_backbone(trainer.config).to(device, dtype)
    except UserError as error:
        print(f"  note   the results lack the network before training: {error}")
    missing = distributed.any_rank(backbone is None, device)
    if backbone is None or missing:
        return {}
    set_batch_norm_statistics(
        backbone, [views.global_images for views in probe], lambda x: backbone(x.to(device, dtype))
    )
    return {"before": backbone}


def _evaluate(trainer: Trainer, probe: list[Views]) -> dict[str, float]:
    """Measure retrieval; every rank must call it, because BatchNorm computes its statistics over all ranks."""
    found = nucleus_retrieval(trainer.teacher_backbone(), probe, trainer.device)
    return {"retrieval_at_1": found.top1, "retrieval_chance": found.chance, "retrieval_queries": found.queries}
