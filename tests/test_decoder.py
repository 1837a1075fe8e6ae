"""The decoder against its formulas, written out with functional calls on the published tensor names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from muse_fast.models.decoder import Decoder, TokenDecoder, unify


def randomise(module):
    """Weights, norms and running statistics that are all different from their neutral values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif tensor.ndim == 1:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return module


def conv_bn(state, name, x, padding):
    x = F.conv2d(x, state[f"{name}.layer.0.weight"], padding=padding)
    norm = {key: state[f"{name}.layer.1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
    return F.batch_norm(x, **norm)


def upsample(x, factor):
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)


def fuse(state, name, coarse, fine):
    """U(coarse, fine) of the paper: upsample, concatenate, convolve, one residual block."""
    x = torch.cat([upsample(coarse, 2), fine], dim=1)
    x = conv_bn(state, f"{name}.first_block", x, 1).relu()
    y = conv_bn(state, f"{name}.last_block.conv1", x, 1).relu()
    return (conv_bn(state, f"{name}.last_block.conv2", y, 1) + x).relu()


def reference(state, pyramid):
    """The unified map by whole factors, which exist where the side is a multiple of 32."""
    e1, e2, e3, e4 = pyramid
    d3 = fuse(state, "decoder3", e4, e3)
    d2 = fuse(state, "decoder2", d3, e2)
    d1 = fuse(state, "decoder1", d2, e1)
    levels = [conv_bn(state, f"hyper_feats.conv_list.{i}", x, 0) for i, x in enumerate((d1, d2, d3, e4))]
    return torch.cat([levels[0], *(upsample(level, 2**i) for i, level in enumerate(levels[1:], start=1))], dim=1)


@pytest.mark.parametrize("grid", [6, 14])
def test_token_decoder_equals_its_formula(grid):
    torch.manual_seed(0)
    decoder = randomise(TokenDecoder(16)).double().eval()
    maps = torch.randn(4, 2, 16, grid, grid, dtype=torch.float64)
    state = decoder.state_dict()
    pyramid = [F.conv2d(maps[i], state[f"dim_map_layers.{i}.weight"]) for i in range(4)]
    pyramid = [upsample(pyramid[0], 4), upsample(pyramid[1], 2), pyramid[2], upsample(pyramid[3], 0.5)]
    with torch.no_grad():
        torch.testing.assert_close(unify(decoder(maps)), reference(state, pyramid), rtol=1e-12, atol=1e-12)


def test_pyramid_decoder_equals_its_formula():
    torch.manual_seed(0)
    decoder = randomise(Decoder((4, 8, 16, 32), level_dim=4)).double().eval()
    pyramid = [torch.randn(2, 4 * 2**i, 24 >> i, 24 >> i, dtype=torch.float64) for i in range(4)]
    with torch.no_grad():
        torch.testing.assert_close(
            unify(decoder(pyramid)), reference(decoder.state_dict(), pyramid), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("side", [96, 208, 224, 512])
def test_sizes(side):
    grid = side // 16
    levels = TokenDecoder(16)(torch.randn(4, 1, 16, grid, grid))
    assert [level.shape[-1] for level in levels] == [side // 4, side // 8, side // 16, side // 32]
    assert unify(levels).shape == (1, 16, side // 4, side // 4)


def test_unify_interpolates_between_corners():
    """A ramp stays a ramp when corners are aligned; level order is channel order."""
    levels = [torch.linspace(0, 1, n).expand(1, 1, n, n) for n in (9, 5, 3, 2)]
    torch.testing.assert_close(unify(levels), torch.linspace(0, 1, 9).expand(1, 4, 9, 9))


def test_published_names():
    block = ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    layers = [f"hyper_feats.conv_list.{i}.layer" for i in range(4)]
    for i in (1, 2, 3):
        layers += [f"decoder{i}.{part}.layer" for part in ("first_block", "last_block.conv1", "last_block.conv2")]
    names = {f"{layer}.{leaf}" for layer in layers for leaf in block} | {f"dim_map_layers.{i}.weight" for i in range(4)}
    assert set(TokenDecoder(16).state_dict()) == names
