"""BatchNorm statistics of untrained networks, against float64 and torch's cumulative average."""

from __future__ import annotations

import copy
import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import muse_fast
from muse_fast.classification.calibration import calibrate_batch_norm
from muse_fast.classification.features import stack_tiles
from muse_fast.classification.tiles import Tile
from muse_fast.models import norm as norms
from muse_fast.models.calibration import batch_norms_of
from muse_fast.models.decoder import Projection


def tiles(count: int, side: int = 16) -> list[Tile]:
    rng = np.random.default_rng(0)
    brightness = rng.uniform(0.2, 1, count)  # so that batches differ
    return [
        Tile((rng.integers(0, 255, (side, side, 3)) * one).astype(np.uint8), np.full((2, 2), 3, np.float32),
             np.zeros(2, np.int64), f"slide {i}")
        for i, one in enumerate(brightness)
    ]  # fmt: skip


class Small(nn.Module):
    """Two convolutions with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, 2), nn.BatchNorm2d(4, momentum=None)
        )

    def nucleus_features(self, images: Tensor, xy: Tensor, image_index: Tensor) -> Tensor:
        return self.layers(images).mean((2, 3))[image_index]


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items() if "running_" in name}


def test_equals_the_cumulative_average_of_torch() -> None:
    torch.manual_seed(0)
    network, images = Small(), tiles(12)
    expected = copy.deepcopy(network)
    assert calibrate_batch_norm(network, images, batch_size=4, seed=3) == 2
    for one in batch_norms_of(expected):
        one.momentum = None
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    for start in (0, 4, 8):
        batch = stack_tiles([images[i] for i in order[start : start + 4]])
        expected.layers(batch.images)
    for name, value in statistics(expected).items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    assert [one.momentum for one in batch_norms_of(network)] == [0.1, None]
    assert all(one.num_batches_tracked == 3 for one in batch_norms_of(network))
    assert not any(module.training for module in network.modules())
    for name, value in expected.named_parameters():
        assert torch.equal(network.get_parameter(name), value)


def test_batches_of_unequal_sizes_count_by_their_tiles() -> None:
    """7 tiles in batches of 3, 2 and 2: the mean of the first layer is that of all tiles."""
    torch.manual_seed(0)
    network, images = Small(), tiles(7)
    calibrate_batch_norm(network, images, batch_size=3)
    assert batch_norms_of(network)[0].num_batches_tracked == 3
    conv = network.layers[0].double()
    expected = conv(stack_tiles(images).images.double()).mean((0, 2, 3))
    torch.testing.assert_close(batch_norms_of(network)[0].running_mean.double(), expected, rtol=1e-4, atol=1e-6)


def test_result_depends_on_tiles_weights_and_seed_only() -> None:
    torch.manual_seed(0)
    network, images = Small(), tiles(10)
    calibrate_batch_norm(network, images, batch_size=4)
    first = statistics(network)
    torch.manual_seed(9)
    for one in batch_norms_of(network):
        one.running_mean.fill_(float("nan"))
    calibrate_batch_norm(network, images, batch_size=4)
    for name, value in statistics(network).items():
        assert torch.equal(first[name], value)
    calibrate_batch_norm(network, images, batch_size=4, seed=1)
    assert not torch.equal(first["layers.4.running_var"], statistics(network)["layers.4.running_var"])


@pytest.mark.parametrize("count", range(2, 9))
def test_no_batch_has_a_single_tile(count: int) -> None:
    """torch refuses a batch with one value per channel, which one tile of 3 px would have."""
    network, sizes = Small(), []
    network.layers[0].register_forward_pre_hook(lambda _, images: sizes.append(len(images[0])))
    calibrate_batch_norm(network, [dataclasses.replace(one, xy=one.xy * 0) for one in tiles(count, 5)], batch_size=1)
    assert sum(sizes) == count and min(sizes) >= 2 and max(sizes) <= 3


def test_a_network_without_batch_norm_does_not_run() -> None:
    network = nn.Conv2d(3, 3, 1)
    assert calibrate_batch_norm(network, tiles(2)) == 0


def test_a_failure_leaves_the_network_usable() -> None:
    network = Small()
    with mock.patch.object(Small, "nucleus_features", side_effect=RuntimeError), pytest.raises(RuntimeError):
        calibrate_batch_norm(network, tiles(2))
    assert [one.momentum for one in batch_norms_of(network)] == [0.1, None]
    assert not network.training


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("arch", ["vit_tiny", "resnet50"])
def test_every_layer_of_our_networks_has_the_moments_of_its_input(arch: str) -> None:
    """In one batch, also for the levels of the decoder, whose projections are never stored."""
    torch.manual_seed(0)
    network, images = muse_fast.load_backbone(arch), tiles(5, 64)
    inputs: dict[nn.Module, Tensor] = {}
    normalise, moments = norms._batch_norm, Projection.moments

    def watched_norm(x: Tensor, norm: nn.Module, residual: Tensor | None, relu: bool) -> Tensor:
        inputs[norm] = x.double()
        return normalise(x, norm, residual, relu)

    def watched_moments(projection: Projection, x: Tensor) -> tuple[Tensor, Tensor]:
        conv, norm = projection.layer
        inputs[norm] = F.conv2d(x.double(), conv.weight.double())
        return moments(projection, x)

    with (
        mock.patch.object(norms, "_batch_norm", watched_norm),
        mock.patch.object(Projection, "moments", watched_moments),
    ):
        assert calibrate_batch_norm(network, images, batch_size=5) == len(batch_norms_of(network))
    assert inputs.keys() == {*batch_norms_of(network)}
    for norm, x in inputs.items():
        var, mean = torch.var_mean(x, dim=(0, 2, 3))
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-3, atol=1e-4 * float(x.abs().max()))
