"""The network of the learned detector: its receptive field, and how it shifts with its input."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from muse_fast.finders.network import MULTIPLE, REACH, STRIDE, NucleusNet, optical_density


@pytest.fixture(scope="module")
def network() -> NucleusNet:
    torch.manual_seed(0)
    net = NucleusNet().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # timm initialises the last of every block to 0
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


def test_size(network: NucleusNet) -> None:
    """ResNet-18 has 11,689,512 parameters: 8,393,728 in its last stage, 513,000 in its classifier."""
    encoder = sum(p.numel() for p in network.encoder.parameters())
    assert encoder == 11_689_512 - 8_393_728 - 513_000
    assert sum(p.numel() for p in network.parameters()) < 3_000_000


@pytest.mark.parametrize("sides", [(16, 16), (32, 48), (208, 16)])
def test_one_logit_per_cell(network: NucleusNet, sides: tuple[int, int]) -> None:
    logits = network(torch.zeros(2, 3, *sides))
    assert logits.shape == (2, sides[0] // STRIDE, sides[1] // STRIDE)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("cell", [128, 131, 135])
def test_reach(network: NucleusNet, cell: int) -> None:
    """By the gradient of a cell: no pixel further away than REACH influences it, and REACH is not much too large."""
    network = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.data.abs_()  # no ReLU stops the gradient
    image = torch.ones(1, 3, 544, 16, requires_grad=True)
    network(image)[0, cell, 4].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    first, last = int(rows.min()), int(rows.max()) + 1
    assert first >= cell * STRIDE - REACH
    assert last <= (cell + 1) * STRIDE + REACH
    assert last - first > 1.75 * REACH


def test_shifts_by_the_multiple_shift_the_heatmap(network: NucleusNet) -> None:
    image = torch.rand(1, 3, 352, 352)
    moved = network(image[..., 2 * MULTIPLE :])
    inside = slice(REACH // STRIDE, -REACH // STRIDE)
    expected = network(image)[..., 2 * MULTIPLE // STRIDE :]
    torch.testing.assert_close(moved[..., inside, inside], expected[..., inside, inside], rtol=1e-4, atol=1e-4)


def test_optical_density() -> None:
    values = optical_density(torch.tensor([255, 100, 1, 0], dtype=torch.uint8))
    torch.testing.assert_close(values, torch.tensor([0.0, math.log10(2.55), math.log10(255), math.log10(255)]))
