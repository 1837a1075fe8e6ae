"""`load_backbone`: every kind of source, and error messages."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from muse_fast import load_backbone
from muse_fast.errors import UserError
from muse_fast.models.backbone import build_backbone
from muse_fast.runtime import checkpoint


def save_run(run, model, step):
    teacher = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    teacher["image_head.prototypes_v"] = torch.zeros(4, 4)
    state = {"step": step, "config": {"model": {"arch": model.arch}}}
    return checkpoint.save(run, step, {"teacher": teacher}, state, keep_every=1)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return [build_backbone("vit_tiny"), build_backbone("vit_tiny")]


def test_a_run_loads_its_newest_checkpoint(models, tmp_path):
    folders = [save_run(tmp_path, model, step) for step, model in zip((3, 12), models, strict=True)]
    loaded = load_backbone(None, tmp_path)
    assert loaded.arch == "vit_tiny"
    assert not loaded.training
    assert same(loaded, models[1])
    assert same(load_backbone("vit_tiny", folders[0]), models[0])
    assert same(load_backbone(None, str(folders[1])), models[1])


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(models, tmp_path, caplog):
    folders = [save_run(tmp_path, model, step) for step, model in zip((3, 12), models, strict=True)]
    file = folders[1] / "teacher.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert same(load_backbone(None, tmp_path), models[0])
    assert "step-00000012" in caplog.text
    with pytest.raises(UserError, match=r"teacher\.safetensors"):
        load_backbone(None, folders[1])


def test_exports(models, tmp_path):
    save_file(models[0].state_dict(), tmp_path / "export.safetensors")
    assert same(load_backbone(None, tmp_path / "export.safetensors"), models[0])
    prefixed = {f"backbone.{name}": tensor for name, tensor in models[0].state_dict().items()}
    save_file(prefixed | {"nucleus_head.mlp.0.bias": torch.zeros(2)}, tmp_path / "teacher.safetensors")
    assert same(load_backbone(None, tmp_path / "teacher.safetensors"), models[0])


def test_half_precision_files_become_float32(models, tmp_path):
    save_file({name: t.half() if t.is_floating_point() else t for name, t in models[0].state_dict().items()},
              tmp_path / "half.safetensors")  # fmt: skip
    loaded = load_backbone(None, tmp_path / "half.safetensors").state_dict()
    source = models[0].state_dict()
    assert all(loaded[name].dtype == source[name].dtype for name in source)
    assert torch.equal(loaded["encoder.encoder.cls_token"], source["encoder.encoder.cls_token"].half().float())


def test_loading_draws_no_random_numbers(models, tmp_path):
    save_file(models[0].state_dict(), tmp_path / "export.safetensors")
    before = torch.get_rng_state()
    load_backbone(None, tmp_path / "export.safetensors")
    assert torch.equal(before, torch.get_rng_state())


def test_random_weights_follow_the_seed(models):
    for arch, weights in [("vit_tiny", None), ("vit_tiny", "random"), (None, "random:vit_tiny")]:
        torch.manual_seed(0)
        loaded = load_backbone(arch, weights)
        assert same(loaded, models[0]), (arch, weights)
        assert not loaded.training


@pytest.mark.parametrize(
    ("arch", "weights", "compat", "message"),
    [
        ("vit_smal", None, None, "did you mean 'vit_small'"),
        (None, None, None, "need an arch"),
        (None, "random:vit_huge", None, "arch=vit_huge: expected one of vit_tiny"),
        ("vit_tiny", "random:vit_small", None, "contradict"),
        ("vit_tiny", None, "official", "unknown compat 'official'.*exact, muse_official"),
        ("vit_tiny", "no/such/file.pth", None, r"no/such/file\.pth do not exist"),
    ],
)
def test_invalid_arguments(arch, weights, compat, message):
    with pytest.raises(UserError, match=message):
        load_backbone(arch, weights, compat=compat)


def test_paths_without_weights(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"1")
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name, message in {
        "x.onnx": "unknown kind '.onnx'",
        "x.safetensors": "not a valid .safetensors",
        "empty": "neither a run.*nor a checkpoint",
        "run": "no intact checkpoint",
        "other.safetensors": "not the weights of a MUSE backbone.*fc.weight",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            load_backbone(None, tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_weights_of_another_arch(models, tmp_path):
    save_file(models[0].state_dict(), tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=r"t\.safetensors: contains a vit_tiny, not the requested resnet50"):
        load_backbone("resnet50", tmp_path / "t.safetensors")


def test_tensors_that_do_not_fit_are_listed(models, tmp_path):
    tensors = models[0].state_dict()
    tensors.pop("encoder.encoder.norm.bias")
    tensors["decoder.extra"] = torch.zeros(1)
    tensors["decoder.dim_map_layers.0.weight"] = torch.zeros(48, 100, 1, 1)
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.raises(UserError) as error:
        load_backbone(None, tmp_path / "t.safetensors")
    text = str(error.value)
    assert "1 missing: encoder.encoder.norm.bias" in text
    assert "1 unexpected: decoder.extra" in text
    assert "decoder.dim_map_layers.0.weight [48, 100, 1, 1] instead of [48, 192, 1, 1]" in text


def test_a_plain_vit_lacks_the_decoder(models, tmp_path):
    encoder = {name: t for name, t in models[0].state_dict().items() if name.startswith("encoder.")}
    save_file(encoder, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"82 missing: decoder.*and 74 more"):
        load_backbone("vit_tiny", tmp_path / "vit.safetensors")
