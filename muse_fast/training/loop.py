"""The loop of a training run: its steps, what they log, evaluations, checkpoints, and an early end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from muse_fast.runtime import distributed
from muse_fast.runtime.device import keep_freed_memory, peak_flops, peak_memory
from muse_fast.training.guard import NonFiniteError
from muse_fast.training.report import (
    Metrics,
    RunReport,
    StopSignal,
    Stopwatch,
    collected_between_steps,
    read_back,
)
from muse_fast.training.run import report_non_finite, report_stopped
from muse_fast.views.loader import StepSampler


class Trainable(Protocol):
    """Networks, an optimiser, and the step that updates them."""

    unit: str
    """What a batch consists of, in the plural."""
    step: int
    """Completed steps."""
    steps: int
    """Steps of the whole run."""
    device: torch.device

    @property
    def config(self) -> Any:
        """Settings; ``seed``, ``optim.batch_size``, ``optim.accumulate`` and ``train.log_every`` are read here."""

    def train_step(self, *micro_batches: Any, measure: bool) -> Metrics:
        """Take a step on this rank's share of a batch; return its measurements if ``measure``."""

    def flops(self, micro_batches: Sequence[Any]) -> float:
        """FLOPs of a step on this share."""

    def check(self) -> None:
        """Raise NonFiniteError if a step so far was not finite."""

    def save(self, run: Path) -> Path | None:
        """Write a checkpoint; the main rank returns its folder."""


def sampler_of(trainer: Trainable, items: NDArray[np.int64]) -> StepSampler:
    """Return the sampler of this rank's micro-batches of ``items`` for the remaining steps.

    Raises:
        UserError: the batch does not divide among ranks and micro-batches.
    """
    config = trainer.config
    return StepSampler(
        items,
        seed=config.seed,
        batch_size=config.optim.batch_size,
        start_step=trainer.step,
        stop_step=trainer.steps,
        accumulate=config.optim.accumulate,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def train(
    trainer: Trainable,
    out: Path,
    batches: Iterable[Any],
    report: RunReport,
    stop: StopSignal,
    *,
    evaluate: Callable[[int], Mapping[str, float] | None],
    saves_after: Callable[[int], bool],
) -> int | None:
    """Take the remaining steps of a run; all ranks call this together.

    Args:
        batches: this rank's micro-batches of all these steps.
        evaluate: returns the row of the evaluation after a step, or None if none is due.
        saves_after: whether a checkpoint is due after a step; one is after the last.

    Returns:
        None after the last step, otherwise the exit code of a run that ended early (75 stopped on request, with a
        checkpoint; 3 not finite).
    """
    if trainer.device.type == "cpu":
        keep_freed_memory()
    config, watch = trainer.config, Stopwatch()
    with collected_between_steps() as collect:
        for micro_batches in watch.timed(zip(*[iter(batches)] * config.optim.accumulate, strict=True)):
            step = trainer.step + 1
            distributed.at_step(step)
            is_last = step == trainer.steps
            log_it = is_last or step % config.train.log_every == 0
            values = trainer.train_step(*micro_batches, measure=log_it)
            # From here on, at some steps, the host waits for the device, and ranks wait for each other.
            asked_to_stop = False
            try:
                if log_it:
                    trainer.check()
                    report.training(step, read_back(values) | _throughput(trainer, watch, micro_batches))
                    collect()
                if (row := evaluate(step)) is not None:
                    report.evaluation(step, row)
                if log_it or distributed.world_size() == 1:
                    asked_to_stop = distributed.any_rank(stop.received is not None, trainer.device)
                if is_last or asked_to_stop or saves_after(step):
                    trainer.save(out)
            except NonFiniteError as error:
                return report_non_finite(out, config.seed, error)
            if asked_to_stop and not is_last:
                return report_stopped(out, stop.received or "another rank was asked to stop", step)
    return None


def _throughput(trainer: Trainable, watch: Stopwatch, micro_batches: Sequence[Any]) -> dict[str, float]:
    """Samples per second over all ranks, share of time spent waiting for data, memory, and MFU if it is known."""
    steps_per_second, data_wait = watch.read()
    row = {
        f"{trainer.unit}_per_second": steps_per_second * trainer.config.optim.batch_size,
        "data_wait": data_wait,
        "peak_memory_gib": peak_memory(trainer.device) / 2**30,
    }
    if peak := peak_flops(trainer.device):
        row["mfu"] = trainer.flops(micro_batches) * steps_per_second / peak
    return row
