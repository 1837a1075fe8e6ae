"""The ViT against timm, and its position embedding against F.interpolate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from muse_fast.errors import UserError
from muse_fast.models.vit import VisionTransformer, ViTEncoder, resize_pos_embed


def build(dim=192, heads=3):
    return VisionTransformer(dim, heads, image_size=224, attention="sdpa", recompute="none")


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
    """timm antialiases its own resize, so it uses our resized embedding."""
    reference = timm_vit("vit_tiny")
    model = build().eval()
    model.load_state_dict(reference.state_dict())
    grid = side // 16
    reference.pos_embed.data = resize_pos_embed(reference.pos_embed.data, grid)
    reference.patch_embed.grid_size = (grid, grid)
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(taps_of(model, images)[-1][:, 0], reference(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(14, 6), (14, 13), (14, 32), (32, 14), (14, 64)])
def test_pos_embed_resize_is_bicubic(old, new):
    table = torch.randn(1, 1 + old * old, 5, dtype=torch.float64)
    patches = table[:, 1:].reshape(1, old, old, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(patches, size=(new, new), mode="bicubic").permute(0, 2, 3, 1).reshape(1, new * new, 5)
    resized = resize_pos_embed(table, new)
    torch.testing.assert_close(resized[:, 1:], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(resized[:, 0], table[:, 0])


def test_pos_embed_of_the_right_size_is_untouched():
    table = torch.randn(1, 197, 8)
    assert resize_pos_embed(table, 14) is table


def test_pos_embed_resize_keeps_float32_under_autocast():
    table = torch.randn(1, 197, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize_pos_embed(table, 6), resize_pos_embed(table, 6).float())
        under_autocast = resize_pos_embed(table, 6)
    assert torch.equal(under_autocast, resize_pos_embed(table, 6))


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
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            first, second = (scales[2 * layer + branch][:, None, None] for branch in (0, 1))
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 3, 64)).permute(2, 0, 3, 1, 4)
            attended = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + first * block.attn.proj(attended)
            x = x + second * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        expected = model.norm(x)
        torch.testing.assert_close(taps_of(model, images, scales)[-1], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(taps_of(model, images)[-1], expected, atol=1e-3)
        ones = taps_of(model, images, torch.ones(24, 3))
        assert all(torch.equal(a, b) for a, b in zip(ones, taps_of(model, images), strict=True))


def test_drop_rates_grow_linearly_over_the_layers():
    rates = ViTEncoder(192, 3, drop_path=0.11).drop_rates
    assert rates == pytest.approx([0.01 * layer for layer in range(12) for _ in range(2)])
