"""Files in the published layout: every tensor is used and no code runs."""

from __future__ import annotations

import argparse
import logging
import os

import pytest
import torch

from muse_fast.errors import UserError
from muse_fast.models.backbone import build_backbone
from muse_fast.models.official import official_pos_embed, read_official
from muse_fast.models.weights import POS_EMBED, load_backbone
from tests.support.filled import fill
from tests.support.published import dino_pos_embed, keys_weights


def write_official(path, model, **extra):
    """Write tensors under ``module.backbone.``, heads, and the other entries that DINO's script saves."""
    teacher = {f"module.backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    heads = {"module.head.mlp.0.weight": torch.zeros(3, 3), "module.nu_head.mlp.0.weight": torch.zeros(3, 3)}
    content = {"teacher": teacher | heads, "epoch": 7, "args": argparse.Namespace(arch="x", lr=1e-3), **extra}
    torch.save(content, path)


def randomised(arch, image_size=224):
    with torch.device("meta"):
        return fill(build_backbone(arch, image_size=image_size))


@pytest.mark.parametrize("arch", ["vit_small", pytest.param("vit_base", marks=pytest.mark.heavy), "resnet50"])
def test_every_tensor_is_used_and_features_are_the_same(arch, tmp_path):
    model = randomised(arch)
    write_official(tmp_path / "official.pth", model)
    loaded = load_backbone(arch, tmp_path / "official.pth", compat="exact")
    (tmp_path / "official.pth").unlink()  # pytest would keep half a gigabyte
    assert not loaded.training
    source, copy = model.state_dict(), loaded.state_dict()
    assert source.keys() == copy.keys()
    assert all(torch.equal(source[name], copy[name]) for name in source)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        for a, b in zip(model(images).levels, loaded(images).levels, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(model.cls(images), loaded.cls(images))


def test_published_names_of_the_vit(tmp_path):
    """The names of the 232 tensors in the published files."""
    layer = [f"{part}.{leaf}" for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for leaf in
             ("weight", "bias")]  # fmt: skip
    vit = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    vit += [f"blocks.{i}.{name}" for i in range(12) for name in layer]
    conv_bn = ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    convs = [f"hyper_feats.conv_list.{i}.layer" for i in range(4)]
    for i in (1, 2, 3):
        convs += [f"decoder{i}.{part}.layer" for part in ("first_block", "last_block.conv1", "last_block.conv2")]
    decoder = [f"dim_map_layers.{i}.weight" for i in range(4)] + [
        f"{conv}.{leaf}" for conv in convs for leaf in conv_bn
    ]
    names = {f"encoder.encoder.{name}" for name in vit} | {f"decoder.{name}" for name in decoder}
    assert len(names) == 232
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in build_backbone("vit_small").state_dict().items()}
    assert shapes.keys() == names
    assert shapes["encoder.encoder.pos_embed"] == (1, 197, 384)
    assert shapes["decoder.dim_map_layers.3.weight"] == (768, 384, 1, 1)
    assert shapes["decoder.decoder3.first_block.layer.0.weight"] == (384, 1152, 3, 3)
    assert shapes["decoder.hyper_feats.conv_list.0.layer.0.weight"] == (96, 96, 1, 1)


@pytest.mark.parametrize("grid", [14, 32])
def test_position_quirk(grid):
    table = torch.randn(1, 1 + grid * grid, 6, dtype=torch.float64)
    moved = official_pos_embed(table)
    assert moved.shape == table.shape
    torch.testing.assert_close(moved, dino_pos_embed(table, grid))
    assert torch.equal(moved[:, 0], table[:, 0])

    # The same along the rows, with the weights of Keys' cubic.
    signal = torch.rand(grid, dtype=torch.float64)
    table = signal.repeat_interleave(grid)[None, :, None]  # every column is the signal
    rows = official_pos_embed(torch.cat([table[:, :1], table], dim=1))[0, 1:, 0].reshape(grid, grid)[:, 0]
    weights = torch.tensor(keys_weights(grid, grid, (grid + 0.1) / grid), dtype=torch.float64)
    torch.testing.assert_close(rows, weights @ signal, rtol=1e-9, atol=0)


@torch.inference_mode()
def tokens(backbone, images):
    """Patches with their positions, before the first layer."""
    return backbone.encoder.encoder.embed(images)


@pytest.mark.parametrize("side", [96, 224, 304])
def test_official_files_are_used_as_by_the_authors_code_at_every_size(side, tmp_path):
    """Their loader resamples the table to its own size, their network that one to the image, both by DINO's formula."""
    model = randomised("vit_tiny")
    write_official(tmp_path / "a.pth", model)
    loaded = load_backbone(None, tmp_path / "a.pth")
    exact = load_backbone(None, tmp_path / "a.pth", compat="exact")
    stored, grid = model.state_dict()[POS_EMBED], side // 16
    resampled = dino_pos_embed(stored, 14)
    images = torch.randn(1, 3, side, side)
    for backbone, table in ((loaded, resampled), (exact, stored)):
        expected = build_backbone("vit_tiny", image_size=side).eval()  # which needs no resize
        table = table if grid == 14 else dino_pos_embed(table, grid)
        expected.load_state_dict(model.state_dict() | {POS_EMBED: table})
        torch.testing.assert_close(tokens(backbone, images), tokens(expected, images), rtol=0, atol=1e-6)
        with torch.inference_mode():
            torch.testing.assert_close(backbone.cls(images), expected.cls(images), rtol=0, atol=1e-5)
    by_size = build_backbone("vit_tiny", pos_embed_resize="size").eval()
    by_size.load_state_dict(loaded.state_dict())
    off = (tokens(by_size, images) - tokens(loaded, images)).abs().max()
    assert off == 0 if side == 224 else off > 1e-3


def test_quirk_is_the_default_only_for_pth(tmp_path):
    from safetensors.torch import save_file

    model = randomised("vit_tiny")
    write_official(tmp_path / "a.pth", model)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    stored, moved = model.state_dict()[POS_EMBED], official_pos_embed(model.state_dict()[POS_EMBED])
    assert not torch.allclose(stored, moved, atol=1e-3)
    for name, compat, expected in [
        ("a.pth", None, moved),
        ("a.pth", "exact", stored),
        ("a.safetensors", None, stored),
        ("a.safetensors", "muse_official", moved),
    ]:
        loaded = load_backbone(None, tmp_path / name, compat=compat)
        assert torch.equal(loaded.state_dict()[POS_EMBED], expected), (name, compat)


def test_a_512_file_keeps_its_position_embedding(tmp_path):
    write_official(tmp_path / "l.pth", randomised("vit_tiny", image_size=512))
    assert load_backbone("vit_tiny", tmp_path / "l.pth").state_dict()[POS_EMBED].shape == (1, 1025, 192)


def test_heads_are_skipped_and_logged(tmp_path, caplog):
    write_official(tmp_path / "a.pth", build_backbone("vit_tiny"))
    with caplog.at_level(logging.INFO, logger="muse_fast"):
        tensors = read_official(tmp_path / "a.pth").tensors
    assert not any("head" in name for name in tensors)
    assert "module.nu_head.mlp.0.weight" in caplog.text
    assert "2 tensors" in caplog.text


def test_old_file_format_loads_too(tmp_path):
    model = build_backbone("vit_tiny")
    teacher = {f"module.backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"teacher": teacher}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert len(read_official(tmp_path / "old.pth").tensors) == 232


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_file_does_not_run(tmp_path):
    write_official(tmp_path / "evil.pth", build_backbone("vit_tiny"), optimizer=Malicious(tmp_path / "ran"))
    with pytest.raises(UserError, match=r"evil\.pth.*could run code.*save only its tensors"):
        read_official(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_namespace_is_allowed_only_during_the_call(tmp_path):
    write_official(tmp_path / "a.pth", build_backbone("vit_tiny"))
    read_official(tmp_path / "a.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_files_of_another_kind(tmp_path):
    cases = {
        "pointer.pth": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "git-LFS pointer.*git lfs pull",
        ),
        "page.pth": (b"<!DOCTYPE html><html>not found</html>", "damaged"),
        "empty.pth": (b"", "damaged"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            read_official(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path):
    write_official(tmp_path / "a.pth", build_backbone("vit_tiny"))
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.pth.*damaged"):
        read_official(tmp_path / "cut.pth")


def test_files_without_a_teacher(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth.*'teacher'.*\['model'\]"):
        read_official(tmp_path / "other.pth")
    torch.save({"teacher": {"cls_token": torch.zeros(1)}}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match=r"plain\.pth.*module\.backbone\."):
        read_official(tmp_path / "plain.pth")
