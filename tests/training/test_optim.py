"""The optimiser's groups and schedule, against AdamW written out."""

import copy
import math

import torch
from torch import nn

from muse_fast.training.guard import Guard
from muse_fast.training.optim import apply_schedule, build_optimizer
from muse_fast.training.schedules import Schedule
from tests.support.ranks import NoHostWait


def guard_of_norm() -> Guard:
    return Guard(["gradient norm"], torch.device("cpu"))


def test_vectors_are_not_decayed_and_matrices_are() -> None:
    """With zero gradients AdamW only decays: ``p <- p (1 - lr * wd)``."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, guard_of_norm())
    apply_schedule(optimizer, Schedule(0.1, 0.5, 0.04, 0.99, True))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * ((1 - 0.05) if p.ndim > 1 else 1))


def test_three_steps_equal_adamw_written_out_in_float64() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=False)
    w = layer.weight.detach().double().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    optimizer = build_optimizer(layer, guard_of_norm())
    for step, (lr, wd) in enumerate([(0.01, 0.1), (0.02, 0.2), (0.005, 0.3)], start=1):
        grad = torch.randn(3, 5)
        layer.weight.grad = grad.clone()
        apply_schedule(optimizer, Schedule(lr, wd, 0.04, 0.99, True))
        optimizer.step()
        g = grad.double()
        w *= 1 - lr * wd
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(layer.weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_are_not_optimised() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    optimised = [p for group in build_optimizer(model, guard_of_norm()).param_groups for p in group["params"]]
    assert [id(p) for p in optimised] == [id(model.bias)]


def test_a_step_does_nothing_once_the_guard_has_seen_a_value_that_is_not_finite() -> None:
    """Weights, moments and step counts stay; the host does not wait."""
    guard, layer = guard_of_norm(), nn.Linear(5, 3)
    optimizer = build_optimizer(layer, guard)
    for step, norm in enumerate((1.0, math.nan, 1.0), start=1):
        guard.look(step, [torch.tensor(norm)], torch.tensor([0]), torch.tensor([0]))
        for p in layer.parameters():
            p.grad = torch.full_like(p, norm)
        with NoHostWait():
            optimizer.step()
        state = {name: t.clone() for p in layer.parameters() for name, t in optimizer.state[p].items()}
        if step == 1:
            weights, first = copy.deepcopy(layer.state_dict()), state
    assert all(torch.equal(weights[name], value) for name, value in layer.state_dict().items())
    assert first["step"] == 1 and all(torch.equal(first[name], value) for name, value in state.items())
