"""What a run says when memory is short: where it was, how large its batch is, and what to lower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from muse_fast.config import PretrainConfig
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.finetuner import Finetuner
from muse_fast.errors import UserError
from muse_fast.pretraining.trainer import Trainer
from muse_fast.runtime.device import peak_memory
from muse_fast.runtime.distributed import world_size

_SAID = "can't allocate memory"  # by torch's allocator on the CPU, whose error has no class of its own


class Situation(NamedTuple):
    """Where a run is."""

    step: int  # the one at hand, counted from 1
    held: str  # what its batch consists of, as a sentence
    remedies: list[str]  # settings that would lower the memory, the best first


@contextmanager
def explained_out_of_memory(device: torch.device, situation: Callable[[], Situation]) -> Iterator[None]:
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
        now = situation()
        raise UserError(
            f"out of memory at step {now.step} on {device} ({reason}). {now.held}; its peak was "
            f"{peak_memory(device) / 2**20:.0f} MiB. Set one of: {', '.join(now.remedies[:3])}; "
            "the newest checkpoint is untouched"
        ) from error


def pretraining(trainer: Trainer) -> Situation:
    config, views = trainer.config, trainer.config.views
    rois = config.optim.batch_size // (world_size() * config.optim.accumulate)
    held = (
        f"A rank held {rois} ROIs at once, of each {views.num_globals} x {views.global_size} px and {views.num_locals} "
        f"x {views.local_size} px, with K = {config.head.prototypes}"
    )
    return Situation(trainer.step + 1, held, remedies(config, rois, world_size()))


def finetuning(tuner: Finetuner) -> Situation:
    data, optim = tuner.config.data, tuner.config.optim
    proposals = (data.sample_size // tuner.config.detector.stride) ** 2
    held = f"It held {optim.batch_size} images of {data.sample_size} px at once, with {proposals} proposals in each"
    return Situation(tuner.step + 1, held, finetuning_remedies(tuner.config, tuner.device.type))


def remedies(config: PretrainConfig, rois: int, ranks: int) -> list[str]:
    """Settings that lower the memory of pretraining: first what a run may change when it goes on, then of new runs.

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


def finetuning_remedies(config: FinetuneConfig, device: str) -> list[str]:
    """The same for fine-tuning; all of them change a run's numbers, and so are for a new one."""
    data, optim = config.data, config.optim
    anew = []
    if config.train.precision == "fp32" and device == "cuda":
        anew.append("train.precision=bf16")
    if optim.batch_size > 1:
        anew.append(f"optim.batch_size={optim.batch_size // 2}")
    if data.sample_size >= 64:
        anew.append(f"data.sample_size={data.sample_size // 32 * 16}")
    if config.detector.stride < 16:
        anew.append(f"detector.stride={2 * config.detector.stride}")
    return [f"{one} (a new run)" for one in [*anew, "weights of a smaller architecture"]]
