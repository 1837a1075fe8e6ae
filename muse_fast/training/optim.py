"""The optimisers, and their state in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from muse_fast.training.guard import Guard
from muse_fast.training.schedules import Schedule
from muse_fast.training.sharding import like


def build_optimizer(model: nn.Module, guard: Guard) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, without decay of biases and other vectors (norms), as in DINO.

    Its step does nothing after ``guard`` has seen a value that is not finite.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    plain = [p for p in trainable if p.ndim <= 1]
    groups = [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False}]
    return _guarded(torch.optim.AdamW(groups, fused=True), guard)


def build_adam(model: nn.Module, guard: Guard) -> torch.optim.Adam:
    """Build Adam over all parameters, guarded in the same way; the caller sets the learning rate of its only group."""
    return _guarded(torch.optim.Adam(model.parameters(), fused=True), guard)


_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


def _guarded(optimizer: _Optimizer, guard: Guard) -> _Optimizer:
    optimizer.found_inf = guard.found_inf  # type: ignore[attr-defined]  # read by the fused kernels on the device
    return optimizer


def apply_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.lr
        group["weight_decay"] = schedule.weight_decay if group["decayed"] else 0.0


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of ``optimizer`` for a checkpoint, by names of the ``model``'s parameter and of the moment."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, values: Mapping[str, Tensor]) -> None:
    """Restore what `moments` returned, on any number of ranks."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in values.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name]
        is_counter = value.ndim == 0  # of steps
        optimizer.state[parameter][moment] = value.to(parameter.device) if is_counter else like(value, parameter)
