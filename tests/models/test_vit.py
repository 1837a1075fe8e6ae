"""The ViT against timm, and its position embedding against DINO's formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from muse_fast.errors import UserError
from muse_fast.models.backbone import build_backbone
from muse_fast.models.vit import VisionTransformer, ViTEncoder, resampling, resize_pos_embed
from tests.support.published import dino_pos_embed, keys_weights

SIZES = [(14, 6), (14, 13), (14, 32), (32, 14), (14, 64)]


def build(dim=192, heads=3, rule="scale_factor"):
    return VisionTransformer(dim, heads, image_size=224, attention="sdpa", recompute="none", pos_embed_resize=rule)


def taps_of(model, images, scales=None):
    """Tokens of one group of images after each tapped layer, ``[I, 1 + T, C]``."""
    tokens = model([images], scales)
    return [tokens.split(tap)[0] for tap in tokens.taps]


def timm_vit(name: str):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(f"{name}_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    with torch.no_grad():  # initial biases and norms, all zeros and ones, would hide a swap
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("name", "dim", "heads"), [("vit_tiny", 192, 3), ("vit_small", 384, 6)])
def test_timm_weights_load_by_name_and_reproduce_its_tokens(name, dim, heads):
    reference = timm_vit(name)
    model = build(dim, heads).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = reference.forward_intermediates(
            images,
            indices=[2, 5, 8, 11],
            norm=True,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        taps = taps_of(model, images)
    for tap, (patches, prefix) in zip(taps, expected, strict=True):
        torch.testing.assert_close(tap, torch.cat([prefix, patches], dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(taps[-1][:, 0], reference(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [96, 256])
def test_tokens_at_other_sizes_equal_timm(side):
    """timm resizes by a rule of its own, so it gets the embedding that DINO's formula gives."""
    reference = timm_vit("vit_tiny")
    model = build().eval()
    model.load_state_dict(reference.state_dict())
    grid = side // 16
    reference.pos_embed.data = dino_pos_embed(reference.pos_embed.data, grid)
    reference.patch_embed.grid_size = (grid, grid)
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(taps_of(model, images)[-1][:, 0], reference(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_pos_embed_is_resized_as_in_dino(old, new):
    """Values, and the gradient that arrives at the stored table."""
    table = torch.randn(1, 1 + old * old, 5, dtype=torch.float64, requires_grad=True)
    resized, expected = resize_pos_embed(table, new, "scale_factor"), dino_pos_embed(table, new)
    torch.testing.assert_close(resized, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), table)[0] for x in (resized, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (resize_pos_embed(table, new, "size") - expected).abs().max() > 1e-3  # the rules differ


@pytest.mark.parametrize(("rule", "extra"), [("scale_factor", 0.1), ("size", 0.0)])
def test_resampling_is_keys_cubic(rule, extra):
    """Along each axis by itself, so of tables that are not square too."""
    for old, new in [*SIZES, (1, 2), (5, 1)]:
        expected = torch.tensor(keys_weights(old, new, (new + extra) / old), dtype=torch.float64)
        torch.testing.assert_close(resampling(old, new, rule), expected, rtol=0, atol=1e-12)
    columns, rows = resampling(14, 9, rule), resampling(10, 20, rule)
    maps = torch.randn(1, 3, 10, 14, dtype=torch.float64)
    scale = {"scale_factor": ((20 + extra) / 10, (9 + extra) / 14)} if extra else {"size": (20, 9)}
    expected = F.interpolate(maps, **scale, mode="bicubic")
    torch.testing.assert_close(rows @ maps @ columns.T, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["scale_factor", "size"])
def test_pos_embed_of_the_right_size_is_untouched(rule):
    table = torch.randn(1, 197, 8)
    assert resize_pos_embed(table, 14, rule) is table


def test_the_rule_matters_only_at_other_sizes():
    by_rule = [build(rule=rule).eval() for rule in ("scale_factor", "size")]
    by_rule[1].load_state_dict(by_rule[0].state_dict())
    with torch.no_grad():
        one, other = (taps_of(model, torch.ones(1, 3, 224, 224))[-1] for model in by_rule)
        assert torch.equal(one, other)
        one, other = (taps_of(model, torch.ones(1, 3, 96, 96))[-1] for model in by_rule)
        assert (one - other).abs().max() > 1e-3


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match="pos_embed_resize=timm: expected scale_factor or size"):
        build_backbone("vit_tiny", pos_embed_resize="timm")


@pytest.mark.parametrize("rule", ["scale_factor", "size"])
def test_pos_embed_resize_keeps_float32_under_autocast(rule):
    table = torch.randn(1, 197, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = resize_pos_embed(table, 6, rule)
    assert torch.equal(under_autocast, resize_pos_embed(table, 6, rule))


@pytest.mark.parametrize("side", [32, 96, 208, 304])
def test_token_counts(side):
    taps = taps_of(build(), torch.randn(1, 3, side, side))
    assert [tuple(tap.shape) for tap in taps] == [(1, 1 + (side // 16) ** 2, 192)] * 4


@pytest.mark.parametrize(
    "shape", [(1, 3, 16, 16), (1, 3, 1040, 1040), (1, 3, 100, 100), (1, 3, 96, 112), (1, 1, 96, 96)]
)
def test_unsupported_images_are_refused(shape):
    with pytest.raises(UserError, match=r"multiple of 16 from 32 to 1024|square"):
        taps_of(build(), torch.zeros(shape))


def test_no_images():
    assert taps_of(build(), torch.zeros(0, 3, 96, 96))[-1].shape == (0, 37, 192)


def test_scales_act_on_the_branches_of_their_image_and_layer():
    """Branches of one layer, scaled per image, against explicit formulas."""
    model = build().eval()
    images, scales = torch.randn(3, 3, 48, 48), torch.ones(24, 3)
    scales[6], scales[7] = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 0.5])  # layer 3
    x = model.embed(images)

    def normalised(x, norm):
        return F.layer_norm(x, (192,), norm.weight, norm.bias, eps=1e-6)

    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            first, second = (scales[2 * layer + branch][:, None, None] for branch in (0, 1))
            q, k, v = block.attn.qkv(normalised(x, block.norm1)).unflatten(2, (3, 3, 64)).permute(2, 0, 3, 1, 4)
            attended = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + first * block.attn.proj(attended)
            x = x + second * block.mlp.fc2(F.gelu(block.mlp.fc1(normalised(x, block.norm2))))
        expected = normalised(x, model.norm)
        torch.testing.assert_close(taps_of(model, images, scales)[-1], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(taps_of(model, images)[-1], expected, atol=1e-3)
        ones = taps_of(model, images, torch.ones(24, 3))
        assert all(torch.equal(a, b) for a, b in zip(ones, taps_of(model, images), strict=True))


def test_drop_rates_grow_linearly_over_the_layers():
    rates = ViTEncoder(192, 3, drop_path=0.11).drop_rates
    assert rates == pytest.approx([0.01 * layer for layer in range(12) for _ in range(2)])
