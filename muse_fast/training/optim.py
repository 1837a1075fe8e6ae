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
    """AdamW over the trainable parameters; biases and other vectors (norms) are not decayed, as in DINO.

    Its step does nothing once ``guard`` has seen values that are not finite.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    plain = [p for p in trainable if p.ndim <= 1]
    groups = [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False}]
    return _guarded(torch.optim.AdamW(groups, fused=True), guard)


def build_adam(model: nn.Module, guard: Guard) -> torch.optim.Adam:
    """Adam over all parameters, guarded alike; the caller sets the learning rate of its one group."""
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
    """State of ``optimizer`` by name of the parameter of ``model`` and of the moment, for a checkpoint."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, values: Mapping[str, Tensor]) -> None:
    """Put back what `moments` gave, whatever number of ranks it was saved by."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in values.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name]
        of_parameter = value.ndim > 0  # the count of steps is not
        optimizer.state[parameter][moment] = like(value, parameter) if of_parameter else value.to(parameter.device)
