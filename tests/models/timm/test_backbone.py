"""Backbones of timm in place of ours: features at nuclei, loading of files, and error messages."""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from muse_fast.classification.features import extract_features
from muse_fast.classification.probes import new_head
from muse_fast.classification.tiles import Tile
from muse_fast.classification.tuned import finetune
from muse_fast.errors import UserError
from muse_fast.images.imagenet import normalise
from muse_fast.models.timm.backbone import TimmBackbone, load_timm, summarise
from muse_fast.models.timm.networks import parse_spec

VITS = {"vit_tiny_patch16_224": 192, "vit_small_patch14_reg4_dinov2": 384}
HIERARCHIES = {"resnet18": (1, 2, 3, 4), "convnext_atto": (0, 1, 2, 3)}  # stages from stride 4 on


def bilinear(one: Tensor, xy: Tensor, index: Tensor, side: int, align_corners: bool) -> np.ndarray:
    """Sample rows ``[N, c]`` of a map ``[I, c, h, w]`` point by point in float64."""
    values = one.detach().double().numpy()
    rows = []
    for (x, y), image in zip(xy.double().numpy(), index.tolist(), strict=True):
        u, v = (
            p / side * (cells - 1) if align_corners else p / side * cells - 0.5
            for p, cells in ((x, one.shape[3]), (y, one.shape[2]))
        )
        u, v = np.clip(u, 0, one.shape[3] - 1), np.clip(v, 0, one.shape[2] - 1)
        left, top = int(u), int(v)
        right, bottom = min(left + 1, one.shape[3] - 1), min(top + 1, one.shape[2] - 1)
        a, b = u - left, v - top
        upper = (1 - a) * values[image, :, top, left] + a * values[image, :, top, right]
        lower = (1 - a) * values[image, :, bottom, left] + a * values[image, :, bottom, right]
        rows.append((1 - b) * upper + b * lower)
    return np.stack(rows)


def pictures(side: int) -> Tensor:
    return torch.randint(256, (2, 3, side, side), dtype=torch.uint8)


def in_own_statistics(pixels: Tensor, network: Any, side: int) -> Tensor:
    """Pixels as preprocessed by timm's pipeline, resized first if the network needs it."""
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = pixels / 255
    if side != pixels.shape[-1]:
        images = torch.nn.functional.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
    return (images - mean) / std


def load(name: str, **more: Any) -> TimmBackbone:
    torch.manual_seed(3)
    return load_timm(f"timm:{name}", **more).backbone


def points(side: int, count: int = 40) -> tuple[Tensor, Tensor]:
    corners = torch.tensor([[0.0, 0.0], [side - 1e-3, side - 1e-3]])
    return torch.cat([torch.rand(count, 2) * side, corners]), torch.randint(2, (count + 2,))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("side", [112, 100])  # 100 px becomes 112 with either patch
def test_a_vit_returns_its_last_tokens(name: str, side: int, align_corners: bool) -> None:
    backbone = load(name, image_size=side, align_corners=align_corners)
    torch.manual_seed(3)
    network = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()  # resamples positions on the fly
    pixels = pictures(side)
    with torch.no_grad():
        tokens = network.forward_features(in_own_statistics(pixels, network, 112))[:, network.num_prefix_tokens :]
        grid = 112 // network.patch_embed.patch_size[0]
        one = tokens.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        xy, index = points(side)
        found = backbone.nucleus_features(normalise(pixels), xy, index)
    assert found.shape == (len(xy), VITS[name]) == (len(xy), backbone.dense_dim)
    np.testing.assert_allclose(found, bilinear(one, xy, index, side, align_corners), atol=5e-4)
    assert one.std() > 0.2  # so an error of 1 % would fail


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("name", HIERARCHIES)
@pytest.mark.parametrize("side", [96, 50])
def test_a_hierarchy_returns_all_its_stages(name: str, side: int, align_corners: bool) -> None:
    backbone = load(name, image_size=side, align_corners=align_corners)
    network = timm.create_model(name, features_only=True, out_indices=HIERARCHIES[name]).eval()
    own = backbone.network.state_dict()  # features_only renames stages.0 to stages_0
    state = {n.replace(".", "_", 1) if n.startswith(("stages.", "stem.")) else n: t for n, t in own.items()}
    network.load_state_dict({key: state[key] for key in network.state_dict()})
    pixels = pictures(side)
    with torch.no_grad():
        maps = network(in_own_statistics(pixels, timm.create_model(name), -(-side // 32) * 32))
        xy, index = points(side)
        found = backbone.nucleus_features(normalise(pixels), xy, index)
    assert [backbone.side // one.shape[-1] for one in maps] == backbone.strides == [4, 8, 16, 32]
    assert found.shape == (len(xy), backbone.dense_dim)
    for rows, one in zip(found.split([one.shape[1] for one in maps], dim=1), maps, strict=True):
        assert one.std() > 0.02
        np.testing.assert_allclose(rows, bilinear(one, xy, index, side, align_corners), atol=2e-3 * float(one.std()))


@pytest.mark.parametrize(
    ("name", "side", "stride"), [("vit_tiny_patch16_224", 96, 16), ("vit_small_patch14_dinov2", 100, 14)]
)
def test_the_middle_of_a_token_reads_only_that_token(name: str, side: int, stride: int) -> None:
    backbone = load(name, image_size=side)
    images = torch.randn(1, 3, side, side)
    grid = -(-side // stride)
    columns, rows = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="xy")
    middles = (torch.stack([columns, rows], -1).reshape(-1, 2) + 0.5) * (side / grid)
    with torch.no_grad():
        (one,) = backbone.maps(images)
        found = backbone.nucleus_features(images, middles, torch.zeros(grid * grid, dtype=torch.int64))
    torch.testing.assert_close(found, one[0].flatten(1).T, atol=2e-4, rtol=0)
    assert (one[0, :, 0, 0] - one[0, :, 0, 1]).abs().mean() > 0.02


def test_padding_and_no_nuclei() -> None:
    backbone = load("resnet18", image_size=64)
    images = torch.randn(2, 3, 64, 64)
    found = backbone.nucleus_features(images, torch.rand(2, 2) * 64, torch.tensor([1, -1]))
    assert found[0].abs().max() > 0 == found[1].abs().max()
    assert backbone.nucleus_features(images, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)).shape == (0, 960)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224:depth=2", "resnet10t"])
def test_it_can_be_fine_tuned(name: str) -> None:
    rng = np.random.default_rng(0)

    def tiles(count: int) -> list[Tile]:
        found = []
        for number in range(count):
            label = rng.integers(0, 2, 4)
            image = rng.integers(0, 60, (32, 32, 3), np.uint8)
            xy = np.array([[8, 8], [24, 8], [8, 24], [24, 24]], np.float32)
            for (x, y), kind in zip(xy.astype(int), label, strict=True):
                image[y - 8 : y + 8, x - 8 : x + 8, 0] += np.uint8(150 * kind)
            found.append(Tile(image, xy, label, f"slide {number}"))
        return found

    backbone = load(name, image_size=32, align_corners=True)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    splits = {"train": tiles(8), "val": tiles(4), "test": tiles(4)}
    sets = extract_features(backbone, splits)
    head = new_head(backbone.dense_dim, 2, torch.Generator().manual_seed(0))
    tuned = finetune(backbone, head, splits, sets, lr=2e-3, epochs=12, batch_size=4)
    assert tuned.test["accuracy"] > 0.9
    # The maps depend on every weight, so all of them have changed.
    same = [key for key, value in backbone.named_parameters() if torch.equal(value, before[key])]
    assert not same


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    """Weights of a small ViT with its classifier."""
    torch.manual_seed(8)
    return timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5).state_dict()


SMALL = "timm:vit_tiny_patch16_224:depth=1"


def same_weights(backbone: TimmBackbone, stored: dict[str, Tensor]) -> bool:
    loaded = backbone.network.state_dict()
    return loaded.keys() == {n for n in stored if not n.startswith("head.")} and all(
        torch.equal(loaded[name], stored[name]) for name in loaded
    )


def test_files_load_strictly_and_skipped_tensors_are_listed(
    stored: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    save_file(stored, tmp_path / "a.safetensors")
    torch.save(stored, tmp_path / "b.pth")
    torch.save({"model": stored, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / "c.bin")
    teacher = {f"module.backbone.{n}": t for n, t in stored.items() if not n.startswith("head.")}
    student = {name: torch.zeros_like(t) for name, t in teacher.items()}
    full = {"student": student, "teacher": teacher | {"module.head.mlp.0.weight": torch.zeros(2)}}
    torch.save(full, tmp_path / "d.pth")
    for file in ("a.safetensors", "b.pth", "c.bin", "d.pth"):
        loaded = load_timm(f"{SMALL}@{tmp_path / file}", image_size=224)
        assert same_weights(loaded.backbone, stored), file
        left_out = ["module.head.mlp.0.weight"] if file == "d.pth" else ["head.bias", "head.weight"]
        assert loaded.about["left_out"] == left_out
        assert loaded.about["converted"] == []
        assert f"{file}, {'under module.backbone., ' * (file == 'd.pth')}without {left_out[0]}" in summarise(
            loaded.about
        )
        assert not loaded.backbone.training
    bare = load_timm(SMALL, image_size=224)
    assert "random weights" in summarise(bare.about)
    assert not same_weights(bare.backbone, stored)


def test_the_published_names_of_dinov2_with_registers(tmp_path: Path) -> None:
    """DINOv2 stores a position for CLS and names the registers differently; timm's conversion handles both."""
    name = "vit_small_patch14_reg4_dinov2:depth=1:img_size=28"
    torch.manual_seed(2)
    own = load_timm(f"timm:{name}", image_size=28).backbone.network.state_dict()
    position = torch.randn(1, 1, 384)
    published = {key: value for key, value in own.items() if key not in ("reg_token", "cls_token", "pos_embed")} | {
        "register_tokens": own["reg_token"],
        "cls_token": own["cls_token"] - position,
        "pos_embed": torch.cat([position, own["pos_embed"]], dim=1),
        "mask_token": torch.zeros(1, 384),
    }
    torch.save(published, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    loaded = load_timm(f"timm:{name}@{tmp_path}/dinov2_vits14_reg4_pretrain.pth", image_size=28)
    for key, value in loaded.backbone.network.state_dict().items():
        torch.testing.assert_close(value, own[key], atol=1e-6, rtol=0)
    assert loaded.about["converted"] == ["mask_token", "pos_embed", "register_tokens"]


def test_old_files_without_batch_norm_counter_load(tmp_path: Path) -> None:
    state = timm.create_model("resnet10t").state_dict()
    save_file({n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}, tmp_path / "r.safetensors")
    loaded = load_timm(f"timm:resnet10t@{tmp_path}/r.safetensors", image_size=64)
    assert torch.equal(loaded.backbone.network.conv1[0].weight, state["conv1.0.weight"])
    assert loaded.about["left_out"] == ["fc.bias", "fc.weight"]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/this_must_never_be_made",)


def test_files_that_do_not_fit_are_refused(stored: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "f.pth"

    def refusal(content: object, spec: str = SMALL) -> str:
        torch.save(content, file)
        with pytest.raises(UserError) as error:
            load_timm(f"{spec}@{file}", image_size=224)
        assert str(file) in str(error.value)
        return str(error.value)

    less = {name: t for name, t in stored.items() if name != "norm.weight"}
    more = less | {"decoder.weight": torch.zeros(1)}
    said = refusal(more)
    assert "does not fit timm:vit_tiny_patch16_224. 1 missing: norm.weight; 1 unexpected: decoder.weight" in said
    assert "missing" in refusal(stored, "timm:vit_tiny_patch16_224:depth=2")
    assert "blocks.0.attn.proj.bias [192] instead of [384]" in refusal(stored, "timm:vit_small_patch16_224:depth=1")
    # Filters of another patch size are not resized, even if timm's conversion runs and would do so.
    said = refusal(stored | {"mask_token": torch.zeros(1, 192)}, f"{SMALL}:patch_size=14")
    assert "patch_embed.proj.weight [192, 3, 16, 16] instead of [192, 3, 14, 14]" in said
    assert "expected a state dict, bare or under teacher" in refusal({"optimizer": {"lr": 1.0}})
    assert "got list" in refusal([1, 2])
    assert "could run code" in refusal({"model": stored, "extra": Evil()})
    assert not Path("/tmp/this_must_never_be_made").exists()
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="git-LFS pointer"):
        load_timm(f"{SMALL}@{file}", image_size=224)
    (tmp_path / "f.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match=r"f\.safetensors: not a valid"):
        load_timm(f"{SMALL}@{tmp_path}/f.safetensors", image_size=224)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm:resnet81", r"timm \S+ has no 'resnet81'; did you mean 'resnet"),
        ("timm:", "has no ''"),
        ("timm:resnet18.no_such_tag", "timm cannot build this.*no_such_tag"),
        ("timm:resnet18@nowhere.pth", r"no such file nowhere\.pth; expected the weights of resnet18"),
        ("timm:resnet18:depth", "'depth'; expected key=value"),
        ("timm:resnet18:mean=0.5", r"mean=0\.5: expected imagenet or three numbers"),
        ("timm:resnet18:std=[1,2]", r"expected imagenet or three numbers"),
        ("timm:resnet18:depths=[2", "timm:resnet18"),
        ("timm:vit_tiny_patch16_224:tall=3", "timm cannot build this.*tall"),
        ("timm:mixer_s32_224", r"does not run on images of 96 px.*--size"),
    ],
)
def test_invalid_specs_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_timm(text, image_size=96)


def test_settings_of_a_spec(tmp_path: Path) -> None:
    (tmp_path / "a@b.pth").touch()
    spec = parse_spec(
        f"timm:vit_large_patch16_224:init_values=1e-5:mean=imagenet:std=[0.2,0.3,1]:mlp_layer=SwiGLUPacked@{tmp_path}/a@b.pth"
    )
    assert spec.name == "vit_large_patch16_224"
    assert spec.options == {"init_values": 1e-5, "mlp_layer": "SwiGLUPacked"}
    assert spec.statistics == {"mean": (0.485, 0.456, 0.406), "std": (0.2, 0.3, 1.0)}
    assert spec.file == tmp_path / "a@b.pth"
    about = load_timm("timm:vit_tiny_patch16_224:depth=1:mean=imagenet", image_size=32).about
    assert (about["mean"], about["std"]) == ([0.485, 0.456, 0.406], [0.5, 0.5, 0.5])
    assert "timm's for vit_tiny_patch16_224.augreg_in21k_ft_in1k" in summarise(about)
    tagged = load_timm("timm:vit_small_patch16_224.dino:depth=1", image_size=32).about
    assert tagged["mean"] == [0.485, 0.456, 0.406]
    assert tagged["statistics_of"] == "vit_small_patch16_224.dino"
    given = load_timm("timm:resnet10t:mean=imagenet:std=imagenet", image_size=32).about
    assert summarise(given).endswith("std 0.229/0.224/0.225")
    gated = load_timm("timm:vit_tiny_patch16_224:depth=1:mlp_layer=SwiGLUPacked:reg_tokens=2", image_size=32)
    assert type(gated.backbone.network.blocks[0].mlp).__name__ == "GluMlp"
    assert gated.backbone.network.num_prefix_tokens == 3


def test_uint8_images_are_normalised_and_unnormalised_floats_warn() -> None:
    pixels, nuclei = pictures(64), points(64, 4)
    with torch.no_grad():
        backbone = load("resnet10t", image_size=64)
        found = backbone.nucleus_features(pixels, *nuclei)
        torch.testing.assert_close(found, backbone.nucleus_features(normalise(pixels), *nuclei))
        backbone = load("resnet10t", image_size=64)
        with pytest.warns(UserWarning, match="as if not normalised"):
            wrong = backbone.nucleus_features(pixels / 255, *nuclei)
    assert not torch.allclose(found, wrong, rtol=1e-2, atol=1e-3)


def test_images_of_another_size_are_refused() -> None:
    backbone = load("resnet10t", image_size=64)
    for images in (torch.zeros(1, 3, 96, 96), torch.zeros(1, 3, 64, 32)):
        with pytest.raises(UserError, match="was loaded for square images of 64 px, got"):
            backbone.nucleus_features(images, torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
