"""What a run says when memory is short: where it was, how large its batch is, and what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from muse_fast.config import PretrainConfig
from muse_fast.device import peak_memory
from muse_fast.distributed import world_size
from muse_fast.errors import UserError
from muse_fast.train.trainer import Trainer

_SAID = "can't allocate memory"  # by torch's allocator on the CPU, whose error has no class of its own


@contextmanager
def explained_out_of_memory(trainer: Trainer) -> Iterator[None]:
    """Turn an error of an allocator into words.

    Raises:
        UserError: step, shapes of the batch, peak memory and three settings to lower.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or _SAID in str(error)):
            raise
        reason = next(iter(str(error).splitlines()), "") or "no memory left"
        raise UserError(_explanation(trainer, reason)) from error


def _explanation(trainer: Trainer, reason: str) -> str:
    config, views = trainer.config, trainer.config.views
    rois = config.optim.batch_size // (world_size() * config.optim.accumulate)
    return (
        f"out of memory at step {trainer.step + 1} on {trainer.device} ({reason}). A rank held {rois} ROIs at once, of "
        f"each {views.num_globals} x {views.global_size} px and {views.num_locals} x {views.local_size} px, with K = "
        f"{config.head.prototypes}; its peak was {peak_memory(trainer.device) / 2**20:.0f} MiB. "
        f"Set one of: {', '.join(remedies(config, rois, world_size())[:3])}; the newest checkpoint is untouched"
    )


def remedies(config: PretrainConfig, rois: int, ranks: int) -> list[str]:
    """Settings that lower the memory of a step: first what a run may change when it goes on, then of new runs.

    Args:
        rois: that a rank holds at once.
        ranks: of the job.
    """
    model, optim, views = config.model, config.optim, config.views
    going_on = []
    if model.arch != "resnet50" and model.recompute != "full":
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
