"""What a pretraining run says when memory is short."""

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
        f"A rank held {rois} ROIs at once, of each {views.num_globals} x {views.global_size} px and {views.num_locals} "
        f"x {views.local_size} px, with K = {config.head.prototypes}"
    )
    return Situation(trainer.step + 1, held, remedies(config, rois, world_size()))


def remedies(config: PretrainConfig, rois: int, ranks: int) -> list[str]:
    """Settings that lower the memory of pretraining: first what a run may change when it goes on, then of new runs.

    Args:
        rois: that a rank holds at once.
        ranks: of the job.
    """
    model, optim, views = config.model, config.optim, config.views
    going_on = []
    if "model.recompute" in find_arch(model.arch).supports and model.recompute != "full":
        going_on.append(f"model.recompute={'selective' if model.recompute == 'none' else 'full'}")
    if not config.loss.logit_free:
        going_on.append("loss.logit_free=true")
    if ranks > 1 and config.train.parallel == "ddp":
        going_on.append("train.parallel=fsdp")
    anew = []
    if rois % 2 == 0:
        anew.append(f"optim.accumulate={2 * optim.accumulate}")
    if optim.batch_size > ranks:
        anew.append(f"optim.batch_size={max(ranks, optim.batch_size // 2 // ranks * ranks)}")
    if views.num_locals:
        anew.append(f"views.num_locals={views.num_locals // 2}")
    anew += [f"head.prototypes={max(2, config.head.prototypes // 2)}", "a smaller views.global_size"]
    return [f"{setting} (the run goes on with it)" for setting in going_on] + [f"{one} (a new run)" for one in anew]
