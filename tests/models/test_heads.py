"""DINO heads: geometry, initial values, and batches of zero or one row."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from muse_fast.models.heads import DINOHead, HeadOutput


@pytest.fixture
def head():
    torch.manual_seed(0)
    return DINOHead(24, 32, 16, 40)


def test_formula_in_float64(head):
    x = torch.randn(7, 24)
    state = {name: tensor.double() for name, tensor in head.state_dict().items()}
    y = x.double()
    for layer in (0, 2, 4):
        y = y @ state[f"mlp.{layer}.weight"].T + state[f"mlp.{layer}.bias"]
        y = y if layer == 4 else 0.5 * y * (1 + torch.erf(y / 2**0.5))
    z = y / y.square().sum(-1, keepdim=True).sqrt()
    w = state["prototypes_v"] / state["prototypes_v"].square().sum(-1, keepdim=True).sqrt()
    output = head(x)
    torch.testing.assert_close(output.z.double(), z, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.prototypes.double(), w, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.logits().double(), z @ w.T, rtol=1e-4, atol=1e-6)


def test_prototypes_equal_torch_weight_norm_with_g_one(head):
    linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 40, bias=False))
    with torch.no_grad():
        linear.parametrizations.weight.original0.fill_(1)
        linear.parametrizations.weight.original1.copy_(head.prototypes_v)
    z = F.normalize(torch.randn(5, 16), dim=-1)
    prototypes = head(torch.randn(1, 24)).prototypes
    torch.testing.assert_close(HeadOutput(z, prototypes).logits(), linear(z))


def test_prototypes_start_small_enough_for_adam():
    head = DINOHead(8, 8, 256, 2048)
    assert head.prototypes_v.std().item() == pytest.approx(256**-0.5 / 3**0.5, rel=0.01)
    assert head.prototypes_v.abs().max() <= 256**-0.5


@pytest.mark.parametrize("input_norm", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_rows_forward_and_backward(input_norm, rows):
    torch.manual_seed(0)
    head = DINOHead(24, 32, 16, 40, input_norm=input_norm).train()
    x = torch.randn(rows, 24, requires_grad=True)
    output = head(x)
    logits = output.logits()
    assert output.z.shape == (rows, 16)
    assert logits.shape == (rows, 40)
    logits.square().sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (rows, 24)
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert rows > 0 or not parameter.grad.any(), name
    assert all(tensor.isfinite().all() for tensor in head.state_dict().values())


def test_few_rows_do_not_change_the_statistics():
    head = DINOHead(24, 32, 16, 40, input_norm=True).train()
    head(torch.randn(50, 24))
    before = copy.deepcopy(head.state_dict())
    head(torch.randn(1, 24)), head(torch.randn(0, 24))
    assert all(torch.equal(before[name], tensor) for name, tensor in head.state_dict().items())


def test_one_row_is_normalised_as_in_evaluation():
    head = DINOHead(24, 32, 16, 40, input_norm=True)
    head.train()(torch.randn(50, 24) * 3)
    x = torch.randn(1, 24)
    in_training = head(x)
    torch.testing.assert_close(in_training, head.eval()(x))
    assert in_training.z.any()


def test_input_norm_standardises():
    torch.manual_seed(0)
    head = DINOHead(24, 32, 16, 40, input_norm=True).train()
    y = head.input_norm(5 + 3 * torch.randn(400, 24))
    torch.testing.assert_close(y.mean(0), torch.zeros(24), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(0, unbiased=False), torch.ones(24), rtol=0, atol=1e-3)


def test_zero_input_has_finite_gradient(head):
    with torch.no_grad():
        for parameter in head.mlp.parameters():
            parameter.zero_()
    output = head(torch.zeros(3, 24))
    output.logits().sum().backward()
    assert not output.z.any()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_unit_length_survives_bfloat16(head):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, prototypes = head(torch.randn(9, 24))
    assert z.dtype == prototypes.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(9))
    torch.testing.assert_close(prototypes.norm(dim=-1), torch.ones(40))
