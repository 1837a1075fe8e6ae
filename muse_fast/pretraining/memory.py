"""Describe a pretraining run that ran out of memory, and what to change."""

from __future__ import annotations

from muse_fast.config import PretrainConfig
from muse_fast.models.archs import find_arch
from muse_fast.pretraining.trainer import Trainer
from muse_fast.runtime.distributed import world_size
from muse_fast.training.memory import Situation


def situation(trainer: Trainer) -> Situation:
    config, views = trainer.config, trainer.config.views
    rois = config.optim.batch_size // (world_size() * config.optim.accumulate)
    held = (
        f"A rank held {rois} ROIs at once, each as {views.num_globals} x {views.global_size} px and {views.num_locals} "
        f"x {views.local_size} px, with K = {config.head.prototypes}"
    )
    return Situation(trainer.step + 1, held, remedies(config, rois, world_size()))


def remedies(config: PretrainConfig, rois: int, ranks: int) -> list[str]:
    """List settings that lower the memory of pretraining: first those a run may change when it resumes, then the rest.

    Args:
        rois: number that a rank holds at once.
        ranks: number of ranks of the job.
    """
    model, optim, views = config.model, config.optim, config.views
    resumed = []
    if "model.recompute" in find_arch(model.arch, taps=model.taps).supports and model.recompute != "full":
        resumed.append(f"model.recompute={'selective' if model.recompute == 'none' else 'full'}")
    # With few prototypes, what is kept instead of logits is larger: bench/results/2026-11-29-cpu-loss-*.json.
    if not config.loss.logit_free and config.head.prototypes > 4 * config.head.bottleneck_dim:
        resumed.append("loss.logit_free=true")
    if ranks > 1 and config.train.parallel == "ddp":
        resumed.append("train.parallel=fsdp")
    new = []
    if rois % 2 == 0:
        new.append(f"optim.accumulate={2 * optim.accumulate}")
    if optim.batch_size > ranks:
        new.append(f"optim.batch_size={max(ranks, optim.batch_size // 2 // ranks * ranks)}")
    if views.num_locals:
        new.append(f"views.num_locals={views.num_locals // 2}")
    new += [f"head.prototypes={max(2, config.head.prototypes // 2)}", "a smaller views.global_size"]
    return [f"{one} (the run resumes with it)" for one in resumed] + [f"{one} (a new run)" for one in new]
