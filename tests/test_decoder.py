"""The decoder against its formulas, written out with functional calls on the published tensor names."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from muse_fast import ops
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


def make_points(count, view_size, images):
    """Random points, the corners of the view first."""
    xy = torch.rand(count, 2) * view_size
    last = view_size - 1e-3
    corners = torch.tensor([[0.0, 0.0], [last, last], [last, 0.0], [0.0, last]])
    xy[: len(corners)] = corners[:count]
    return xy, torch.randint(images, (count,))


def rows_by_map(decoder, maps, xy, image_index, view_size):
    """The definition: project, unify, and read the unified map bilinearly, image by image."""
    unified = unify(decoder(maps))
    grid = (2 * xy.to(unified.dtype) / view_size - 1).view(-1, 1, 1, 1, 2)
    rows = [unified.sum((2, 3))[:0]]  # stays attached to the map when there is no point
    for i, image in enumerate(image_index.tolist()):
        rows.append(F.grid_sample(unified[image : image + 1], grid[i], align_corners=True)[..., 0, 0])
    return torch.cat(rows)


def rows_first(decoder, *arguments):
    return decoder.nucleus_rows(*arguments)


def learn(form, decoder, maps, *points):
    """Rows of one training step, every gradient of a weighted sum of them, and what the norms remember."""
    decoder = copy.deepcopy(decoder)
    maps = [x.clone().requires_grad_() for x in maps]
    rows = form(decoder, maps, *points)
    (rows * torch.linspace(-1, 2, rows.numel(), dtype=rows.dtype).view_as(rows).sin()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    return rows.detach(), [x.grad for x in maps], gradients, dict(decoder.named_buffers())


@pytest.mark.parametrize("count", [0, 1, 37])
@pytest.mark.parametrize("side", [96, 208, 224])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_nucleus_rows_equal_those_of_the_projected_map(training, side, count):
    decoder = randomise(TokenDecoder(16)).double().train(training)
    grid = side // 16
    maps = torch.randn(4, 3, 16, grid, grid, dtype=torch.float64)
    points = (*make_points(count, side, images=3), side)
    expected, got = (learn(form, decoder, maps, *points) for form in (rows_by_map, rows_first))
    assert got[0].shape == (count, 16)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    tracked = got[3]["hyper_feats.conv_list.0.layer.1.num_batches_tracked"]
    assert tracked == decoder.hyper_feats.conv_list[0].layer[1].num_batches_tracked + training


def test_nucleus_rows_of_a_pyramid_decoder_in_channels_last():
    decoder = randomise(Decoder((4, 8, 16, 32), level_dim=4)).double()
    maps = [torch.randn(2, 4 * 2**i, 24 >> i, 24 >> i, dtype=torch.float64) for i in range(4)]
    points = (*make_points(25, 96, images=2), 96)
    expected = learn(rows_by_map, decoder, maps, *points)
    last = [x.to(memory_format=torch.channels_last) for x in maps]
    got = learn(rows_first, decoder.to(memory_format=torch.channels_last), last, *points)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_padding_gives_zero_rows_and_no_gradient():
    decoder = randomise(TokenDecoder(16)).double()
    maps = torch.randn(4, 3, 16, 6, 6, dtype=torch.float64)
    xy, image_index = make_points(9, 96, images=3)
    padded = torch.where(torch.arange(9) % 3 == 1, -1, image_index)
    kept = padded >= 0
    rows = decoder.nucleus_rows(maps, xy, padded, 96)
    assert rows[~kept].count_nonzero() == 0
    torch.testing.assert_close(rows[kept], decoder.nucleus_rows(maps, xy[kept], padded[kept], 96), rtol=0, atol=1e-12)
    rows[~kept].sum().backward()
    assert all(not p.grad.any() for p in decoder.parameters() if p.grad is not None)


def test_a_frozen_norm_keeps_its_statistics_in_training():
    decoder = randomise(TokenDecoder(16)).double().train()
    decoder.hyper_feats.eval()
    maps = torch.randn(4, 2, 16, 6, 6, dtype=torch.float64)
    points = (*make_points(9, 96, images=2), 96)
    torch.testing.assert_close(
        learn(rows_first, decoder, maps, *points), learn(rows_by_map, decoder, maps, *points), rtol=0, atol=1e-10
    )


def test_evaluation_makes_no_dense_pass(monkeypatch):
    def dense_pass(*_):
        raise AssertionError("evaluation took statistics of a map")

    monkeypatch.setattr(ops, "projection_stats", dense_pass)
    decoder = TokenDecoder(16).eval()
    maps = torch.randn(4, 2, 16, 6, 6)
    assert decoder.nucleus_rows(maps, *make_points(5, 96, images=2), 96).shape == (5, 16)
    with pytest.raises(AssertionError, match="took statistics"):
        decoder.train().nucleus_rows(maps, *make_points(5, 96, images=2), 96)


def test_a_single_position_is_refused_in_training_alone():
    decoder = TokenDecoder(16)
    maps, points = torch.randn(4, 1, 16, 2, 2), (torch.rand(3, 2), torch.zeros(3, dtype=torch.int64), 32)
    for form in (rows_by_map, rows_first):
        with pytest.raises(ValueError, match="more than"):
            form(decoder.train(), maps, *points)
        assert form(decoder.eval(), maps, *points).shape == (3, 16)


def test_nucleus_rows_under_autocast_are_as_exact_as_those_of_the_projected_map():
    decoder = randomise(TokenDecoder(16))
    maps = torch.randn(4, 2, 16, 6, 6)
    points = (*make_points(40, 96, images=2), 96)
    truth = rows_by_map(copy.deepcopy(decoder).double(), maps.double(), *points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows, eager = rows_first(copy.deepcopy(decoder), maps, *points), rows_by_map(decoder, maps, *points)
    assert rows.dtype == torch.bfloat16
    assert (rows - truth).norm() <= 1.5 * (eager - truth).norm() <= 0.05 * truth.norm()


def test_nucleus_rows_compile_without_a_graph_break():
    decoder = randomise(Decoder((2, 3, 4, 5), level_dim=4))
    decoder.decode = tuple  # the convolutions before the rows are plain modules, and slow to compile
    maps = [torch.randn(2, 2 + i, 24 >> i, 24 >> i) for i in range(4)]
    points = (*make_points(11, 96, images=2), 96)

    def compiled(decoder, *arguments):
        return torch.compile(rows_first, fullgraph=True, backend="aot_eager")(decoder, *arguments)

    expected, got = (learn(form, decoder, maps, *points) for form in (rows_first, compiled))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_two_runs_are_bit_equal():
    decoder = randomise(TokenDecoder(16))
    maps = torch.randn(4, 2, 16, 6, 6)
    points = (*make_points(60, 96, images=2), 96)
    first, second = (learn(rows_first, decoder, maps, *points) for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)
