"""Linear layers of a transformer against `torch.nn.Linear`, whose autocast casts one tensor at a time."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from muse_fast import ops
from muse_fast.models.linear import linears
from muse_fast.models.vit import Block, Mlp, Stream


class Casts(TorchDispatchMode):
    """Counts casts to or from bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype != out.dtype:
            self.counts["one"] += 1
        if func is torch.ops.aten._foreach_copy_.default:
            self.counts["all"] += 1
        return out


def layers() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(12, 20), nn.Linear(20, 7)]


def learn(ours: bool, precision: torch.dtype, casts: Casts | None = None) -> list[Tensor]:
    """The result and all gradients of two layers with GELU between them and one after them."""
    first, second = layers()
    first, second = first.to(precision), second.to(precision)
    x = torch.randn(9, 12, dtype=precision, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.float32), casts or torch.enable_grad():
        if ours:
            one, two = linears(first, second)
            y = ops.gelu(two(ops.gelu(one(x), one.bias)), two.bias)
        else:
            y = nn.functional.gelu(second(nn.functional.gelu(first(x))))
    with casts or torch.enable_grad():
        (y.to(precision) * torch.linspace(-1, 2, y.numel(), dtype=precision).view_as(y)).sum().backward()
    tensors = [x, *first.parameters(), *second.parameters()]
    assert all(tensor.grad is not None for tensor in tensors)
    return [y.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)]


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=["autocast", "fp64"])
def test_bits_are_those_of_torch(precision: torch.dtype) -> None:
    got, expected = learn(True, precision), learn(False, precision)
    assert [one.dtype for one in got] == [one.dtype for one in expected]
    assert all(map(torch.equal, got, expected))


def test_weights_are_cast_together() -> None:
    """x and its gradient, the result, and the gradients of two biases are cast by themselves."""
    torchs, ours = Casts(), Casts()
    learn(False, torch.float32, torchs)
    learn(True, torch.float32, ours)
    assert ours.counts == {"all": 2, "one": torchs.counts["one"] - 6}


def test_a_compiler_gets_casts_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, autocast would not cast weights for a target's GELU."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    casts, both = Casts(), layers()
    with torch.autocast("cpu", torch.bfloat16), casts:
        found = linears(*both)
    assert {tensor.dtype for one in found for tensor in (one.weight, one.added)} == {torch.bfloat16}
    assert casts.counts == {"one": 4}
    found[0].weight.sum().backward()
    torch.testing.assert_close(both[0].weight.grad, torch.ones(20, 12), rtol=0, atol=0)


def test_without_autocast_nothing_is_copied() -> None:
    first, second = layers()
    for layer, linear in zip((first, second), linears(first, second), strict=True):
        assert linear.weight is layer.weight and linear.bias is layer.bias
        assert linear.added.data_ptr() == layer.bias.data_ptr() and not linear.added.requires_grad


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_layers_get_no_gradient(frozen: int) -> None:
    both = layers()
    both[frozen].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = linears(*both)
        assert not one.added.requires_grad and not two.added.requires_grad
        ops.gelu(two(ops.gelu(one(torch.randn(3, 12)), one.bias)), two.bias).float().sum().backward()
    has_gradient = [[p.grad is not None for p in layer.parameters()] for layer in both]
    assert has_gradient == [[number != frozen] * 2 for number in (0, 1)]


def test_gelu_of_a_target_is_close_to_gelu() -> None:
    """The tanh form differs from it by at most 0.0005, and torch takes it on a GPU only."""
    first, _ = layers()
    (one, _) = linears(*layers())
    x = torch.randn(50, 12) * 3
    with torch.no_grad():
        torch.testing.assert_close(one.gelu(x), nn.functional.gelu(first(x)), rtol=0, atol=5e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_only_targets_of_training_take_it(training: bool, gradients: bool, itemsize: int) -> None:
    """Not the student, nor predict, embed and evaluate, nor single precision; and never on a CPU."""
    mlp = Mlp(4).train(training)
    with torch.set_grad_enabled(gradients):
        for is_cuda in (False, True):
            x: Any = SimpleNamespace(is_cuda=is_cuda, itemsize=itemsize)
            assert mlp._is_target(x) == (training and not gradients and itemsize == 2 and is_cuda)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_layer_returns_no_parameter(recompute: str) -> None:
    """FSDP hooks what a layer returns. A parameter outlives the step, so its hooks would add up."""
    block = Block(8, 2, "sdpa", recompute)
    returned = [tensor for tensor in block(Stream(torch.randn(5, 8)), ((1, 5),), None) if tensor is not None]
    assert len(returned) == (1 if recompute == "full" else 3)
    assert all(tensor.requires_grad and not tensor.is_leaf for tensor in returned)
