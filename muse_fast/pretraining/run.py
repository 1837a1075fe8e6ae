"""Run a pretraining from the start, or from a checkpoint, to its summary."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from muse_fast.batch import Views
from muse_fast.config import PretrainConfig
from muse_fast.errors import UserError, require
from muse_fast.images.imagenet import normalised
from muse_fast.models.archs import check_model
from muse_fast.models.backbone import Backbone
from muse_fast.models.calibration import set_batch_norm_statistics
from muse_fast.pretraining.memory import situation
from muse_fast.pretraining.results import CONTACT_SHEET, draw_contact_sheet, draw_results, write_summary
from muse_fast.pretraining.retrieval import nucleus_retrieval
from muse_fast.pretraining.start import describe, first_backbone
from muse_fast.pretraining.trainer import Trainer
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime import distributed
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.device import pick_device
from muse_fast.training.loop import sampler_of, train
from muse_fast.training.memory import explained_out_of_memory
from muse_fast.training.parallel import describe_ranks
from muse_fast.training.precision import print_precision_note
from muse_fast.training.report import RunReport, StopSignal
from muse_fast.training.run import find_start, open_folder, report_stalled
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
        start, begun = find_start(out, resume, config, device), None
        trainer = Trainer(config, device)
        if start is not None:
            trainer.load(start)
        elif config.model.init:
            begun = trainer.start_from(config.model.init)
        else:
            expected = "0 for a run without model.init, whose encoder has yet to learn everything"
            require(config.optim.freeze_encoder == 0, "optim.freeze_encoder", config.optim.freeze_encoder, expected)
        config = trainer.config  # "auto" is decided, and a checkpoint may have decided it
        dataset = ViewDataset(roiset, config.views, config.seed)
        sampler = sampler_of(trainer, roi_ids)
        if distributed.is_main():
            open_folder(out, config)
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
    config, settings = trainer.config, trainer.config.train
    probe = _probe(dataset, roi_ids, settings.eval_rois, config.optim.batch_size)
    began = time.time()
    views = load_views(
        dataset,
        sampler,
        workers=config.data.workers,
        pin_memory=trainer.device.type == "cuda",
        device=trainer.device,
        backend=config.data.backend,
        timeout=config.data.timeout,
    )

    def evaluate(step: int) -> dict[str, float] | None:
        is_due = step == trainer.steps or (settings.eval_every > 0 and step % settings.eval_every == 0)
        return _evaluate(trainer, probe) if is_due else None

    with closing(views), RunReport(out, trainer.step, trainer.steps) as report:
        if report.is_new:
            draw_contact_sheet(out / "pictures" / CONTACT_SHEET, probe[0])
        if distributed.any_rank(report.is_new, trainer.device):
            report.evaluation(trainer.step, _evaluate(trainer, probe))
        ended_early = train(
            trainer,
            out,
            views,
            report,
            stop,
            evaluate=evaluate,
            saves_after=lambda step: step % settings.checkpoint_every == 0,
        )
    if ended_early is not None:
        return ended_early
    networks = {"after": trainer.teacher_backbone().eval()} | _before(trainer, probe)
    if distributed.is_main():
        (out / "exit.json").unlink(missing_ok=True)
        results = draw_results(networks, out, dataset.roiset, _shuffled(dataset.seed, roi_ids), config.views)
        write_summary(trainer, out, results, time.time() - began)
    distributed.wait_for_all()
    return 0


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
    spread = describe_ranks(config.train.parallel, optim.accumulate)
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
    if trainer.device.type == "cuda":
        print(f"  graphs {trainer.graphs}")
    print_precision_note(config.train.precision, trainer.device)


def _probe(dataset: ViewDataset, roi_ids: np.ndarray[Any, Any], count: int, batch_size: int) -> list[Views]:
    """Return the fixed views on which retrieval is measured."""
    return as_batches(dataset, _shuffled(dataset.seed, roi_ids)[:count], batch_size)


def _shuffled(seed: int, roi_ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the ROIs in the order in which results use them."""
    return np.random.default_rng([seed, 2**32 - 1]).permutation(roi_ids)


def _before(trainer: Trainer, probe: list[Views]) -> dict[str, Backbone]:
    """Return the backbone before training with the BatchNorm statistics of ``probe``; all ranks must call it.

    Statistics that fit the images are not learning, but they alone change its features much.
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
        backbone, [views.global_images for views in probe], lambda x: backbone(normalised(x.to(device)).to(dtype))
    )
    return {"before": backbone}


def _evaluate(trainer: Trainer, probe: list[Views]) -> dict[str, float]:
    """Measure retrieval; every rank must call it, because BatchNorm computes its statistics over all ranks."""
    found = nucleus_retrieval(trainer.teacher_backbone(), probe, trainer.device)
    return {"retrieval_at_1": found.top1, "retrieval_chance": found.chance, "retrieval_queries": found.queries}
