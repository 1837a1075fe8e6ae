"""The decoder against its formulas, in functional calls with the published tensor names."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from muse_fast import ops
from muse_fast.models.decoder import Decoder, TokenDecoder, unify
from muse_fast.models.vit import PackedTokens


def randomise(module):
    """Change all weights, norms and running statistics from their neutral values."""
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
    """The unified map, with resizes by whole factors, which exist if the side is a multiple of 32."""
    e1, e2, e3, e4 = pyramid
    d3 = fuse(state, "decoder3", e4, e3)
    d2 = fuse(state, "decoder2", d3, e2)
    d1 = fuse(state, "decoder1", d2, e1)
    levels = [conv_bn(state, f"hyper_feats.conv_list.{i}", x, 0) for i, x in enumerate((d1, d2, d3, e4))]
    return torch.cat([levels[0], *(upsample(level, 2**i) for i, level in enumerate(levels[1:], start=1))], dim=1)


def encoded(decoder, *groups):
    """Input of ``decoder`` from an encoder with these four maps per group."""
    if not isinstance(decoder, TokenDecoder):
        return [tuple(maps) for maps in groups]
    layout = tuple((maps[0].shape[0], 1 + maps[0].shape[-1] ** 2) for maps in groups)
    taps = []
    for layer in range(4):
        tokens = [maps[layer].flatten(2).mT for maps in groups]  # [I, g * g, C]
        cls = [torch.full_like(x[:, :1], 1e3) for x in tokens]  # must not have any influence
        taps.append(torch.cat([torch.cat(pair, dim=1).flatten(0, 1) for pair in zip(cls, tokens, strict=True)]))
    return PackedTokens(tuple(taps), layout)


@pytest.mark.parametrize("grid", [6, 14])
def test_token_decoder_equals_its_formula(grid):
    torch.manual_seed(0)
    decoder = randomise(TokenDecoder(16)).double().eval()
    maps = torch.randn(4, 2, 16, grid, grid, dtype=torch.float64)
    state = decoder.state_dict()
    pyramid = [F.conv2d(maps[i], state[f"dim_map_layers.{i}.weight"]) for i in range(4)]
    pyramid = [upsample(pyramid[0], 4), upsample(pyramid[1], 2), pyramid[2], upsample(pyramid[3], 0.5)]
    with torch.no_grad():
        torch.testing.assert_close(
            unify(decoder(encoded(decoder, maps))[0]), reference(state, pyramid), rtol=1e-12, atol=1e-12
        )


def test_pyramid_decoder_equals_its_formula():
    torch.manual_seed(0)
    decoder = randomise(Decoder((4, 8, 16, 32), level_dim=4)).double().eval()
    pyramid = [torch.randn(2, 4 * 2**i, 24 >> i, 24 >> i, dtype=torch.float64) for i in range(4)]
    with torch.no_grad():
        torch.testing.assert_close(
            unify(decoder([pyramid])[0]), reference(decoder.state_dict(), pyramid), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("side", [96, 208, 224, 512])
def test_sizes(side):
    grid = side // 16
    decoder = TokenDecoder(16)
    levels = decoder(encoded(decoder, torch.randn(4, 1, 16, grid, grid)))[0]
    assert [level.shape[-1] for level in levels] == [side // 4, side // 8, side // 16, side // 32]
    assert unify(levels).shape == (1, 16, side // 4, side // 4)


def test_unify_interpolates_between_corners():
    """With aligned corners a ramp stays a ramp; levels are concatenated in order."""
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
    """Random points, starting with the corners of the view."""
    xy = torch.rand(count, 2) * view_size
    last = view_size - 1e-3
    corners = torch.tensor([[0.0, 0.0], [last, last], [last, 0.0], [0.0, last]])
    xy[: len(corners)] = corners[:count]
    return xy, torch.randint(images, (count,))


def rows_by_map(decoder, maps, xy, image_index, view_size):
    """The definition: project, unify, and sample the unified map bilinearly, image by image."""
    unified = unify(decoder(encoded(decoder, maps))[0])
    grid = (2 * xy.to(unified.dtype) / view_size - 1).view(-1, 1, 1, 1, 2)
    rows = [unified.sum((2, 3))[:0]]  # attached to the map even without points
    for i, image in enumerate(image_index.tolist()):
        rows.append(F.grid_sample(unified[image : image + 1], grid[i], align_corners=True)[..., 0, 0])
    return torch.cat(rows)


def rows_first(decoder, maps, xy, image_index, view_size):
    return decoder.nucleus_rows(encoded(decoder, maps), [(xy, image_index)], [view_size])


def learn(form, decoder, maps, *points):
    """Rows of one training step, all gradients of a weighted sum of them, and running statistics."""
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


def test_padding_has_zero_rows_and_no_gradient():
    decoder = randomise(TokenDecoder(16)).double()
    maps = torch.randn(4, 3, 16, 6, 6, dtype=torch.float64)
    xy, image_index = make_points(9, 96, images=3)
    padded = torch.where(torch.arange(9) % 3 == 1, -1, image_index)
    kept = padded >= 0
    rows = rows_first(decoder, maps, xy, padded, 96)
    assert rows[~kept].count_nonzero() == 0
    torch.testing.assert_close(rows[kept], rows_first(decoder, maps, xy[kept], padded[kept], 96), rtol=0, atol=1e-12)
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
    assert rows_first(decoder, maps, *make_points(5, 96, images=2), 96).shape == (5, 16)
    with pytest.raises(AssertionError, match="took statistics"):
        rows_first(decoder.train(), maps, *make_points(5, 96, images=2), 96)


def test_a_single_position_is_normalised_by_the_running_statistics():
    """The coarsest map of a single view of 32 px has one position."""
    decoder = randomise(TokenDecoder(16)).double().train()
    before = copy.deepcopy(decoder.state_dict())
    maps = torch.randn(4, 1, 16, 2, 2, dtype=torch.float64)
    points = (torch.rand(3, 2) * 32, torch.zeros(3, dtype=torch.int64), 32)
    expected, got = (learn(form, decoder, maps, *points) for form in (rows_by_map, rows_first))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    coarsest = "hyper_feats.conv_list.3.layer.1."
    assert all(torch.equal(got[3][name], before[name]) for name in got[3] if name.startswith(coarsest))
    assert not torch.equal(got[3]["decoder1.first_block.layer.1.running_mean"],
                           before["decoder1.first_block.layer.1.running_mean"])  # fmt: skip


@pytest.mark.parametrize("kind", [TokenDecoder, Decoder])
def test_groups_together_equal_groups_one_by_one(kind):
    """Rows, gradients and running statistics of two groups, compared with one call per group in order."""
    decoder = randomise(TokenDecoder(16) if kind is TokenDecoder else Decoder((4, 8, 16, 32), level_dim=4)).double()
    sides, images, groups = (96, 64), (3, 2), []
    for side, count in zip(sides, images, strict=True):
        of_level = [(16, side // 16)] * 4 if kind is TokenDecoder else [(4 * 2**i, side // 4 >> i) for i in range(4)]
        groups.append([torch.randn(count, c, g, g, dtype=torch.float64) for c, g in of_level])
    points = [make_points(11, side, images=count) for side, count in zip(sides, images, strict=True)]
    weight = torch.randn(22, 16, dtype=torch.float64)

    together, alone = copy.deepcopy(decoder), copy.deepcopy(decoder)
    rows = together.nucleus_rows(encoded(together, *groups), points, sides)
    one_by_one = [rows_first(alone, maps, *p, side) for maps, p, side in zip(groups, points, sides, strict=True)]
    torch.testing.assert_close(rows, torch.cat(one_by_one), rtol=0, atol=1e-10)
    (rows * weight).sum().backward()
    (torch.cat(one_by_one) * weight).sum().backward()
    for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(dict(together.named_buffers()), dict(alone.named_buffers()), rtol=1e-12, atol=1e-12)

    dense, each = copy.deepcopy(decoder), copy.deepcopy(decoder)
    levels = dense(encoded(dense, *groups))
    torch.testing.assert_close(levels, [each(encoded(each, maps))[0] for maps in groups], rtol=0, atol=1e-10)
    torch.testing.assert_close(dict(dense.named_buffers()), dict(each.named_buffers()), rtol=1e-12, atol=1e-12)


def test_nucleus_rows_under_autocast_are_as_accurate_as_the_projected_map():
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
    # Without plain convolutions, which are slow to compile.
    decoder.decode = lambda pyramids: [tuple(level.map for level in levels) for levels in pyramids]
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
