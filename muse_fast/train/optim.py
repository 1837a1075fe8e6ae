"""The optimiser: AdamW with the schedule's learning rate and weight decay set before each step."""

from __future__ import annotations

import torch
from torch import nn

from muse_fast.train.guard import Guard
from muse_fast.train.schedules import Schedule


def build_optimizer(model: nn.Module, guard: Guard) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases and other vectors (norms) are not decayed, as in DINO.

    Its step does nothing once ``guard`` has seen values that are not finite.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    plain = [p for p in trainable if p.ndim <= 1]
    groups = [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    optimizer.found_inf = guard.found_inf  # type: ignore[attr-defined]  # read by the fused kernels on the device
    return optimizer


def apply_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.lr
        group["weight_decay"] = schedule.weight_decay if group["decayed"] else 0.0
