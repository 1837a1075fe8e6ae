"""Schedules as functions of only the step, so that a resumed run needs no schedule state.

Steps count from 0; ``steps`` is the length of the run, whose last step is ``steps - 1``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from muse_fast.config import PretrainConfig


def linear(start: float, end: float, step: int, steps: int) -> float:
    """Interpolate from ``start`` at step 0 to ``end`` at step ``steps`` and after."""
    return end if step >= steps else start + (end - start) * step / steps


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Follow half a cosine from ``start`` at step 0 to ``end`` at the last step and after."""
    progress = min(1.0, step / max(1, steps - 1))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(peak: float, end: float, step: int, steps: int, warmup: int) -> float:
    """Rise linearly to ``peak`` over ``warmup`` steps (1/warmup of it at step 0), then follow `cosine` to ``end``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(peak, end, step - warmup, steps - warmup)


def in_steps(config: PretrainConfig, num_rois: int) -> PretrainConfig:
    """Return ``config`` with durations that it states in epochs over ``num_rois`` ROIs in steps instead."""
    epochs = config.loss.teacher_temp_epochs
    if epochs is None:
        return config
    steps = round(epochs * num_rois / config.optim.batch_size)
    return replace(config, loss=replace(config.loss, teacher_temp_steps=steps, teacher_temp_epochs=None))


@dataclass(frozen=True, slots=True)
class Schedule:
    """The scheduled values of one step (paper, appendix B, with DINO's shapes).

    Attributes:
        encoder_lr: learning rate of the encoder's last layer before `layer_decay`; 0 while it is frozen.
    """

    lr: float
    weight_decay: float
    teacher_temp: float
    ema_momentum: float
    train_prototypes: bool
    train_encoder: bool = True
    encoder_lr: float = 0.0


def schedule_at(step: int, config: PretrainConfig) -> Schedule:
    """Return the values of ``step``; durations must be in steps, see `in_steps`."""
    optim, loss = config.optim, config.loss
    if loss.teacher_temp_epochs is not None:
        raise ValueError("loss.teacher_temp_epochs is set: convert it first, with schedules.in_steps(config, rois)")
    lr = warmup_cosine(optim.peak_lr, optim.min_lr, step, optim.steps, optim.warmup_steps)
    train_encoder = step >= optim.freeze_encoder
    return Schedule(
        lr=lr,
        weight_decay=cosine(optim.weight_decay_start, optim.weight_decay_end, step, optim.steps),
        teacher_temp=linear(loss.teacher_temp_start, loss.teacher_temp_end, step, loss.teacher_temp_steps),
        ema_momentum=cosine(optim.ema_start, optim.ema_end, step, optim.steps),
        train_prototypes=step >= optim.freeze_prototypes_steps,
        train_encoder=train_encoder,
        encoder_lr=lr * optim.encoder_lr_scale if train_encoder else 0.0,
    )
