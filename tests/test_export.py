"""Every export loads back with the same numbers: by load_backbone, by timm, and as a plain dict of tensors."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from muse_fast import load_backbone
from muse_fast.config import PretrainConfig, load_config
from muse_fast.errors import UserError
from muse_fast.export import FORMATS, export, main
from muse_fast.images.imagenet import normalise
from muse_fast.models.backbone import Backbone, build_backbone
from muse_fast.models.official import EXACT, official_pos_embed
from muse_fast.models.weights import POS_EMBED
from muse_fast.pretraining.distill import Network
from muse_fast.runtime import checkpoint
from muse_fast.sources import open_source
from tests.support.filled import fill
from tests.support.thin import RESNET_CHANNELS

NAMES = {"safetensors": "x.safetensors", "timm": "x", "muse-official": "x.pth"}


@dataclasses.dataclass
class Run:
    """A run folder with one checkpoint."""

    folder: Path
    config: PretrainConfig
    teacher: Network
    state: dict[str, dict[str, Tensor]]


def saved_run(folder: Path, arch: str, size: int = 224, *more: str) -> Run:
    """Save a run in which student and teacher differ in every tensor and no tensor has its initial value."""
    small = ["head.hidden_dim=8", "head.bottleneck_dim=4", "head.prototypes=16"]
    config = load_config(
        None, [f"model.arch={arch}", f"views.global_size={size}", "views.global_mpp_max=0.6", *small, *more]
    )
    with torch.device("meta"):
        teacher = fill(Network(config, 0.0))
    state = {
        "teacher": teacher.state_dict(),
        "student": {name: value + 1 for name, value in teacher.state_dict().items()} if arch == "vit_tiny" else {},
        "state": {"center/image": torch.rand(16), "center/nucleus": torch.rand(16)},
    }
    checkpoint.save(folder, 7, state, {"step": 7, "config": dataclasses.asdict(config)}, keep_every=0)
    return Run(folder, config, teacher, state)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return saved_run(tmp_path_factory.mktemp("run"), "vit_tiny")


@pytest.fixture(scope="module")
def tiles(shared_data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Two real tiles of 224 px and their nuclei, as arguments of `nucleus_features`."""
    pixels, points = [], []
    for image in open_source(f"brcam2c:{shared_data / 'brcam2c'}"):
        pixels.append(image.image[:224, :224])
        points.append(torch.from_numpy(image.xy[(image.xy < 224).all(axis=1)]))
        if len(pixels) == 2:
            break
    counts = torch.tensor([len(one) for one in points])
    assert counts.min() > 5
    images = normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)).contiguous()
    return images, torch.cat(points), torch.repeat_interleave(torch.arange(2), counts)


@torch.inference_mode()
def features(backbone: Backbone, tiles: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return backbone.nucleus_features(*tiles)


ARCHS = ["vit_tiny", *(pytest.param(arch, marks=pytest.mark.heavy) for arch in ("vit_small", "resnet50", "vit_base"))]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_format_gives_the_same_nucleus_features(
    arch: str, tiles: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    assert_same_features(arch, tiles, tmp_path)


def test_every_format_gives_the_same_features_of_a_thin_resnet(
    thin: None, tiles: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    assert_same_features("resnet50", tiles, tmp_path, channels=RESNET_CHANNELS)


def assert_same_features(arch: str, tiles: tuple[Tensor, Tensor, Tensor], tmp_path: Path, **options: Any) -> None:
    trained = saved_run(tmp_path / "run", arch)
    expected = features(trained.teacher.backbone, tiles)
    assert expected.std(dim=0).min() > 0
    for kind, name in NAMES.items():
        export(str(trained.folder), tmp_path / name, kind)
        loaded = load_backbone(None, tmp_path / name)
        assert loaded.arch == arch
        assert torch.equal(features(loaded, tiles), expected), kind
    encoder = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True, **options).eval()
    with torch.inference_mode():
        ours, timms = trained.teacher.backbone.cls(tiles[0]), encoder(tiles[0])
    torch.testing.assert_close(timms, ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())
    assert (timms - ours).norm() < 1e-5 * ours.norm()
    shutil.rmtree(tmp_path)  # pytest would keep these gigabytes


def test_timm_gets_every_tensor_and_the_position_embedding(run: Run, tmp_path: Path) -> None:
    export(str(run.folder), tmp_path / "x", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True)
    encoder = run.teacher.backbone.encoder.encoder.state_dict()
    assert model.state_dict().keys() == encoder.keys()
    assert all(torch.equal(value, encoder[name]) for name, value in model.state_dict().items())
    assert model.pos_embed.shape == (1, 197, 192)
    with_classes = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True, num_classes=3)
    assert with_classes.head.out_features == 3
    assert torch.equal(with_classes.blocks[5].mlp.fc1.weight, encoder["blocks.5.mlp.fc1.weight"])


def test_a_run_at_another_size_keeps_its_position_embedding(tmp_path: Path) -> None:
    small = saved_run(tmp_path / "run", "vit_tiny", size=96)
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        expected = small.teacher.backbone.cls(images)
        for kind, name in NAMES.items():
            export(str(small.folder), tmp_path / name, kind)
            assert torch.equal(load_backbone("vit_tiny", tmp_path / name).cls(images), expected), kind
        model = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("rule", ["scale_factor", "size"])
def test_every_export_keeps_the_rule_of_its_position_embedding(rule: str, tmp_path: Path) -> None:
    trained = saved_run(tmp_path / "run", "vit_tiny", 224, f"model.pos_embed_resize={rule}")
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        expected = trained.teacher.backbone.cls(images)
        assert torch.equal(load_backbone(None, trained.folder).cls(images), expected)
        for kind, name in NAMES.items():
            export(str(trained.folder), tmp_path / name, kind)
            loaded = load_backbone(None, tmp_path / name)
            assert loaded.pos_embed_resize == rule
            assert torch.equal(loaded.cls(images), expected), kind
            # of an export too
            export(str(tmp_path / name), tmp_path / f"again_{name}", kind)
            assert torch.equal(load_backbone(None, tmp_path / f"again_{name}").cls(images), expected), kind


def test_what_does_not_record_the_rule_resizes_by_size(run: Run, tmp_path: Path) -> None:
    """Checkpoints and exports from before the setting existed."""
    tensors = run.teacher.backbone.state_dict()
    save_file(tensors, tmp_path / "x.safetensors")
    content = {"teacher": {f"module.backbone.{name}": value for name, value in tensors.items()}, EXACT: True}
    torch.save(content, tmp_path / "x.pth")
    config = dataclasses.asdict(run.config)
    del config["model"]["pos_embed_resize"]
    checkpoint.save(tmp_path / "run", 7, run.state, {"step": 7, "config": config}, keep_every=0)
    export(str(tmp_path / "run"), tmp_path / "x", "timm")
    for name in ("x.safetensors", "x.pth", "run", "x"):
        assert load_backbone(None, tmp_path / name).pos_embed_resize == "size", name


def test_a_rule_of_another_version_is_refused(run: Run, tmp_path: Path) -> None:
    for key, value in {"pos_embed_resize": "antialias", "pos_embed_compat": "later"}.items():
        save_file(run.teacher.backbone.state_dict(), tmp_path / "x.safetensors", {key: value})
        with pytest.raises(UserError, match=rf"x\.safetensors: records .*{key}={value}.*expected"):
            load_backbone(None, tmp_path / "x.safetensors")


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_safetensors_contain_heads_centres_and_their_origin(run: Run, tmp_path: Path, which: str) -> None:
    out = tmp_path / "x.safetensors"
    assert main([str(run.folder), str(out), "--format", "safetensors", "--which", which]) == 0
    network = run.state[which]
    with safe_open(out, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    centers = {name: found.pop(name) for name in ("center.image", "center.nucleus")}
    assert found.keys() == network.keys()
    assert all(torch.equal(found[name], value) for name, value in network.items())
    assert all(torch.equal(value, run.state["state"][name.replace(".", "/")]) for name, value in centers.items())
    assert metadata["network"] == which
    assert (metadata["arch"], metadata["step"], metadata["image_size"]) == ("vit_tiny", "7", "224")
    assert metadata["mpp"] == "0.25-0.6"
    assert json.loads(metadata["head"]) == dataclasses.asdict(run.config.head)
    assert not any("/" in value for value in metadata.values())  # no paths of the training machine
    assert metadata["torch"] == torch.__version__ and metadata["muse_fast"]


def test_the_published_layout(run: Run, tmp_path: Path) -> None:
    """The authors' code can read the file, which contains only dicts of tensors."""
    export(str(run.folder), tmp_path / "x.pth", "muse-official")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    state = {
        name.replace("module.backbone.", ""): value
        for name, value in content["teacher"].items()
        if name.startswith("module.backbone.")
    }
    assert len(state) == len(content["teacher"]) == 232
    assert all(torch.equal(state[name], value) for name, value in run.teacher.backbone.state_dict().items())
    assert content["pos_embed_resize"] == "scale_factor"
    assert all(isinstance(value, (Tensor, dict, str)) for value in content.values())
    # The file contains only the backbone, not the storage of the whole checkpoint.
    size = sum(value.numel() * value.element_size() for value in state.values())
    assert (tmp_path / "x.pth").stat().st_size < 1.01 * size
    # The authors' loader resamples the position embedding; load_backbone can do so too.
    moved = load_backbone(None, tmp_path / "x.pth", compat="muse_official").state_dict()[POS_EMBED]
    assert torch.equal(moved, official_pos_embed(state[POS_EMBED]))


def save_published(path: Path) -> Backbone:
    """Save a file in the layout of the authors, and return the network with its tensors as stored."""
    backbone = build_backbone("vit_tiny").eval()
    torch.save({"teacher": {f"module.backbone.{n}": t for n, t in backbone.state_dict().items()}}, path)
    return backbone


def test_other_weights_than_checkpoints_are_converted(tmp_path: Path) -> None:
    """load_backbone uses every export of a published file as it uses that file, also at other image sizes."""
    backbone = save_published(tmp_path / "a.pth")
    expected, images = load_backbone(None, tmp_path / "a.pth"), torch.randn(1, 3, 96, 96)
    assert not torch.equal(expected.state_dict()[POS_EMBED], backbone.state_dict()[POS_EMBED])
    last = tmp_path / "a.pth"
    for kind, name in NAMES.items():
        export(str(last), tmp_path / name, kind)
        found = load_backbone(None, tmp_path / name)
        assert all(torch.equal(found.state_dict()[tensor], value) for tensor, value in expected.state_dict().items())
        with torch.inference_mode():
            assert torch.equal(found.cls(images), expected.cls(images)), kind
        last = tmp_path / name
    in_timm = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).state_dict()
    assert torch.equal(in_timm["pos_embed"], expected.state_dict()[POS_EMBED])


def test_a_published_file_is_exported_with_its_stored_position_embedding(tmp_path: Path) -> None:
    """The authors' code resamples it once, also if it comes by way of a safetensors file."""
    backbone = save_published(tmp_path / "a.pth")
    export(str(tmp_path / "a.pth"), tmp_path / "b.pth", "muse-official")
    export(str(tmp_path / "b.pth"), tmp_path / "b.safetensors", "safetensors")
    export(str(tmp_path / "b.safetensors"), tmp_path / "c.pth", "muse-official")
    for name in ("b.pth", "c.pth"):
        teacher = torch.load(tmp_path / name, weights_only=True)["teacher"]
        assert torch.equal(teacher[f"module.backbone.{POS_EMBED}"], backbone.state_dict()[POS_EMBED]), name


def test_mistakes_are_named_and_leave_nothing(run: Run, tmp_path: Path) -> None:
    source = str(run.folder)
    (tmp_path / "there.pth").write_text("mine")
    export(source, tmp_path / "ours.pth", "muse-official")
    before = sorted(tmp_path.iterdir())
    for arguments, message in [
        ((source, "there.pth", "muse-official"), r"there\.pth exists already"),
        ((source, "x.pt", "muse-official"), r"x\.pt: --format muse-official writes one file; .* ends in \.pth"),
        ((source, "x.pth", "safetensors"), r"x\.pth: .* ends in \.safetensors"),
        ((str(tmp_path), "x", "timm"), "neither a run.*nor a checkpoint"),
        ((str(tmp_path / "nowhere"), "x", "timm"), "nowhere do not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            export(arguments[0], tmp_path / arguments[1], arguments[2])
    with pytest.raises(UserError, match="--which student needs a run or a checkpoint"):
        export(str(tmp_path / "ours.pth"), tmp_path / "x", "timm", which="student")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.pth").read_text() == "mine"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_failed_write_leaves_nothing(kind: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("muse_fast.runtime.tensors.save_file", full)
        patch.setattr("torch.save", full)
        with pytest.raises(UserError, match=r"x.* was not written: .*No space left"):
            export(str(run.folder), tmp_path / NAMES[kind], kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_that_reads_back_differently_is_refused(
    kind: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def altered(*args: object) -> Backbone:
        backbone = load_backbone(*args)  # type: ignore[arg-type]
        backbone.decoder.decoder1.first_block.layer[0].weight.data[0, 0, 0, 0] += 1e-6
        return backbone

    monkeypatch.setattr("muse_fast.export.load_backbone", altered)
    with pytest.raises(UserError, match=r"reading it back returned other values for decoder\.decoder1\.first_block"):
        export(str(run.folder), tmp_path / NAMES[kind], kind)
    assert not list(tmp_path.iterdir())


def test_others_may_read_an_export(run: Run, tmp_path: Path) -> None:
    """Files follow the umask; by default, safetensors makes them readable only by their owner."""
    mask = os.umask(0o022)
    try:
        for kind, name in NAMES.items():
            export(str(run.folder), tmp_path / name, kind)
    finally:
        os.umask(mask)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_a_timm_folder_without_our_decoder_is_named(run: Run, tmp_path: Path) -> None:
    export(str(run.folder), tmp_path / "x", "timm")
    (tmp_path / "x" / "decoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"x: decoder\.safetensors is missing; a timm model has no decoder"):
        load_backbone(None, tmp_path / "x")
