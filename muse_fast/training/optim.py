"""The optimisers, and their state in checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from muse_fast.training.guard import Guard
from muse_fast.training.schedules import Schedule
from muse_fast.training.sharding import like, local, norms

MOMENTUM, TRUST = 0.9, 0.001  # DINO's


def build_optimizer(
    model: nn.Module, guard: Guard, name: str = "adamw", rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Build an optimiser over the trainable parameters, without decay of biases and other vectors (norms), as in DINO.

    Its step does nothing after ``guard`` has seen a value that is not finite.

    Args:
        name: ``adamw``, ``sgd`` or ``lars``.
        rates: factor of the learning rate by name of the parameter; 1 for others.
    """
    members = defaultdict[tuple[float, bool], list[nn.Parameter]](list)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[(rates or {}).get(parameter_name, 1.0), parameter.ndim > 1].append(parameter)
    groups = [{"params": members[key], "rate": key[0], "decayed": key[1]} for key in sorted(members, reverse=True)]
    if name == "adamw":
        return _guarded(torch.optim.AdamW(groups, fused=True), guard)
    return SGD(groups, guard.found_inf, trust=TRUST if name == "lars" else None)


def build_adam(model: nn.Module, guard: Guard) -> torch.optim.Adam:
    """Build Adam over all parameters, guarded in the same way; the caller sets the learning rate of its only group."""
    return _guarded(torch.optim.Adam(model.parameters(), fused=True), guard)


_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


def _guarded(optimizer: _Optimizer, guard: Guard) -> _Optimizer:
    optimizer.found_inf = guard.found_inf  # type: ignore[attr-defined]  # read by the fused kernels on the device
    return optimizer


class SGD(torch.optim.Optimizer):
    """SGD with momentum, and LARS (You et al., 2017) in the form of DINO.

        u = g + weight_decay * w
        u = u * trust * |w| / |u|    only LARS, only groups that are ``decayed``, and only if neither norm is 0
        m = momentum * m + u
        w = w - lr * m

    Tensors may be sharded, which torch's fused SGD does not accept; the norms are those of whole tensors.

    Args:
        found_inf: 0-dim float32 on the device; from the time it is 1, steps do nothing.
        trust: LARS's coefficient; None for SGD.
    """

    def __init__(self, groups: list[dict[str, Any]], found_inf: Tensor, trust: float | None = None) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.found_inf, self.trust = found_inf, trust
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; LARS changes the gradients."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            weight_decay = group["weight_decay"]
            if self.trust is not None and group["decayed"]:
                _adapt(parameters, weight_decay, self.trust)
                weight_decay = 0.0
            torch._fused_sgd_(
                local(parameters),
                local(p.grad for p in parameters),
                local(self.state[p]["momentum_buffer"] for p in parameters),
                weight_decay=weight_decay,
                momentum=MOMENTUM,
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=self.found_inf,
            )


def _adapt(parameters: Sequence[nn.Parameter], weight_decay: float, trust: float) -> None:
    """Turn the gradients of ``parameters``, of which all have one, into LARS's updates, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_add_(local(gradients), local(parameters), alpha=weight_decay)
    of_weight, of_update = norms([*parameters, *gradients]).chunk(2)
    defined = (of_weight > 0) & (of_update > 0)
    ratio = torch.where(defined, trust * of_weight / of_update, 1.0)
    torch._foreach_mul_(local(gradients), list(ratio))


def clip_gradients(gradients: Sequence[Tensor], norms: Tensor, limit: float) -> None:
    """Scale gradients in place to a norm of at most ``limit``, as DINO and torch do: by ``limit / (norm + 1e-6)``.

    Args:
        norms: ``[n]``, the norm of each whole tensor, to clip each by itself, or ``[]``, that of all tensors together.
    """
    scale = (limit / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(local(gradients), list(scale) if scale.ndim else scale)


def apply_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
    """Set this step's learning rates and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.lr * group["rate"]
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
