"""The optimisers' groups, schedule and equations, and clipping, against the equations written out in float64."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from muse_fast.runtime.distributed import world_size
from muse_fast.training.guard import Guard
from muse_fast.training.optim import apply_schedule, build_optimizer, clip_gradients, load_moments, moments
from muse_fast.training.schedules import Schedule
from muse_fast.training.sharding import full, like, norms
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


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_each_parameter_learns_at_its_own_rate(name: str) -> None:
    """In its first step AdamW changes every value by lr, and SGD by lr times the gradient, here 1; without decay."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    rates = {"0.weight": 0.5, "0.bias": 0.25}
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = build_optimizer(model, guard_of_norm(), name, rates)
    apply_schedule(optimizer, Schedule(0.1, 0.0, 0.04, 0.99, True))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for key, p in model.named_parameters():
        change = before[key] - p.detach()
        torch.testing.assert_close(change, torch.full_like(p, 0.1 * rates.get(key, 1.0)), rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_step_does_nothing_once_the_guard_has_seen_a_value_that_is_not_finite(name: str) -> None:
    """Weights, moments and step counts stay; the host does not wait."""
    guard, layer = guard_of_norm(), nn.Linear(5, 3)
    optimizer = build_optimizer(layer, guard, name)
    apply_schedule(optimizer, Schedule(0.1, 0.5, 0.04, 0.99, True))
    for step, norm in enumerate((1.0, math.nan, 1.0), start=1):
        guard.look(step, [torch.tensor(norm)], [(torch.tensor([0]), torch.tensor([0]))])
        for p in layer.parameters():
            p.grad = torch.full_like(p, norm)
        with NoHostWait():
            optimizer.step()
        state = {name: t.clone() for p in layer.parameters() for name, t in optimizer.state[p].items()}
        if step == 1:
            weights, first = copy.deepcopy(layer.state_dict()), state
    assert all(torch.equal(weights[name], value) for name, value in layer.state_dict().items())
    assert first.get("step", 1) == 1 and all(torch.equal(first[name], value) for name, value in state.items())


SCHEDULE = [(0.5, 0.01), (1.0, 0.02), (0.2, 0.0), (0.3, 0.01)]  # learning rate and weight decay


class Weights(nn.Module):
    """A matrix that joins late, a kernel, a matrix of zeros, one without gradient in a step, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.kernel = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 2, 3, 3))
        self.zeros, self.idle = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.randn(1, 4))
        self.bias, self.gain = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(7))

    def gradient(self, name: str, step: int) -> Tensor | None:
        """The gradient of a step; drawn, so that ranks agree."""
        shape = dict(self.named_parameters())[name].shape
        generator = torch.Generator().manual_seed(100 * step + len(name))
        if name == "late" and step == 0:
            return None
        return torch.randn(shape, generator=generator) * (0.0 if (name, step) == ("idle", 2) else 4.0 / (1 + len(name)))


def stepped(name: str, clip: float, reload: bool = False) -> dict[str, Tensor]:
    """Return the weights after SCHEDULE, from one rank or sharded over several; ``reload`` the state midway."""
    torch.manual_seed(0)
    weights = Weights()
    if world_size() > 1:
        fully_shard(weights)
    optimizer = build_optimizer(weights, guard_of_norm(), name)
    for step, (lr, wd) in enumerate(SCHEDULE):
        for key, p in weights.named_parameters():
            gradient = weights.gradient(key, step)
            p.grad = None if gradient is None else like(gradient, p)
        gradients = [p.grad for p in weights.parameters() if p.grad is not None]
        clip_gradients(gradients, norms(gradients), clip)
        apply_schedule(optimizer, Schedule(lr, wd, 0.04, 0.99, True))
        optimizer.step()
        if reload and step == 1:
            state = {key: full(value) for key, value in moments(weights, optimizer).items()}
            optimizer = build_optimizer(weights, guard_of_norm(), name)
            load_moments(weights, optimizer, state)
    return {key: full(p).detach().double() for key, p in weights.named_parameters()}


def written_out(name: str, clip: float) -> dict[str, Tensor]:
    """SGD with momentum, and LARS, as DINO's `LARS` and `clip_gradients` compute them, in float64.

    https://github.com/facebookresearch/dino/blob/main/utils.py
    """
    torch.manual_seed(0)
    weights = Weights()
    found = {key: p.detach().double() for key, p in weights.named_parameters()}
    buffers = {key: torch.zeros_like(w) for key, w in found.items()}
    for step, (lr, wd) in enumerate(SCHEDULE):
        for key, w in found.items():
            gradient = weights.gradient(key, step)
            if gradient is None:
                continue
            g = gradient.double()
            g = g * min(1.0, clip / (g.norm().item() + 1e-6))
            if w.ndim > 1:
                g = g + wd * w
                if name == "lars" and w.norm() > 0 and g.norm() > 0:
                    g = g * 0.001 * w.norm() / g.norm()
            buffers[key] = 0.9 * buffers[key] + g
            found[key] = w - lr * buffers[key]
    return found


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_four_steps_equal_sgd_and_lars_written_out_in_float64(name: str, reload: bool) -> None:
    expected = written_out(name, clip=3.0)
    for key, got in stepped(name, 3.0, reload).items():
        torch.testing.assert_close(got, expected[key], rtol=1e-6, atol=1e-7)


def test_sgd_is_torchs() -> None:
    layer, twin = (nn.Linear(5, 3, bias=False) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    ours, theirs = build_optimizer(layer, guard_of_norm(), "sgd"), torch.optim.SGD(twin.parameters(), 0.1, 0.9)
    for lr, wd in SCHEDULE:
        layer.weight.grad = torch.randn(3, 5)
        twin.weight.grad = layer.weight.grad.clone()
        apply_schedule(ours, Schedule(lr, wd, 0.04, 0.99, True))
        theirs.param_groups[0].update(lr=lr, weight_decay=wd)
        ours.step()
        theirs.step()
    torch.testing.assert_close(layer.weight, twin.weight)


# ------------------------------------------------------------------------------------------------------------- clipping


def clipped(lengths: list[float], limit: float, per_tensor: bool) -> tuple[list[Tensor], list[float]]:
    """Return gradients of the given norms, and the norms that clipping leaves."""
    gradients = [nn.functional.normalize(torch.randn(4, 3).flatten(), dim=0).view(4, 3) * n for n in lengths]
    ours = [g.clone() for g in gradients]
    found = norms(ours)
    torch.testing.assert_close(found, torch.tensor(lengths))
    with NoHostWait():
        clip_gradients(ours, found if per_tensor else torch.linalg.vector_norm(found), limit)
    for mine, before in zip(ours, gradients, strict=True):  # the direction stays
        torch.testing.assert_close(mine * before.norm(), before * mine.norm())
    return ours, [g.norm().item() for g in ours]


def test_each_tensor_is_clipped_by_its_own_norm_or_all_by_the_global_one() -> None:
    """DINO's rule does not touch six tensors of norm 2.9 and 0.5; the global norm of 5.10 shrinks them to 0.59."""
    lengths = [2.9, 0.5] * 3
    assert clipped(lengths, 3.0, per_tensor=True)[1] == pytest.approx(lengths, rel=1e-6)
    together = 3.0 / math.sqrt(3 * 2.9**2 + 3 * 0.5**2)
    assert together == pytest.approx(0.5886, abs=1e-4)
    assert clipped(lengths, 3.0, per_tensor=False)[1] == pytest.approx([n * together for n in lengths], rel=1e-5)
    large = [0.0, 2.9, 3.0, 3.1, 300.0]
    assert clipped(large, 3.0, per_tensor=True)[1] == pytest.approx([0.0, 2.9, 3.0, 3.0, 3.0], rel=1e-5)
    assert clipped([7.0], 3.0, per_tensor=True)[1] == pytest.approx(clipped([7.0], 3.0, per_tensor=False)[1])


def test_clipping_by_the_global_norm_is_torchs() -> None:
    parameters = [nn.Parameter(torch.randn(n, 3)) for n in (1, 5, 40)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    ours = [p.grad.clone() for p in parameters if p.grad is not None]
    clip_gradients(ours, torch.linalg.vector_norm(norms(ours)), 0.3)
    nn.utils.clip_grad_norm_(parameters, 0.3)
    assert all(p.grad is not None and torch.equal(g, p.grad) for g, p in zip(ours, parameters, strict=True))
