"""Files of other projects: whatever stands around and before a network's names, the same weights are loaded."""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import re
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from muse_fast import load_backbone
from muse_fast.errors import UserError
from muse_fast.models.backbone import build_backbone
from muse_fast.models.timm.backbone import load_timm, summarise
from muse_fast.models.weight_files import find_network, read_pth
from tests.support.filled import fill

NAME = "vit_tiny_patch16_224:depth=3"
DINOV2 = "vit_small_patch14_dinov2:depth=4:img_size=28"
State = dict[str, Tensor]


def network(spec: str, **more: Any) -> State:
    """Random weights of a network of timm, none of them equal or constant."""
    name, *options = spec.split(":")
    settings = {key: int(value) for key, value in (option.split("=") for option in options)}
    with torch.device("meta"):
        return fill(timm.create_model(name, num_classes=0, **settings, **more)).state_dict()


@pytest.fixture(scope="module")
def vit() -> State:
    return network(NAME)


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def assert_loads(spec: str, path: pathlib.Path, expected: State, side: int = 224) -> dict[str, Any]:
    loaded = load_timm(f"timm:{spec}@{path}", image_size=side)
    found = loaded.backbone.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    return loaded.about


# --------------------------------------------------------------------------------------------------- around the network

RECORDS: dict[str, Callable[[], Any]] = {
    "a number of numpy": lambda: np.float64(0.9),
    "an array of numpy": lambda: np.arange(3.0),
    "a random state": lambda: np.random.RandomState(0).get_state(),
    "a path": lambda: argparse.Namespace(out=pathlib.PosixPath("/x"), lr=0.1),
    "a default dict": lambda: collections.defaultdict(list, a=[1]),
    "a date": lambda: datetime.datetime(2026, 1, 1),
    "settings of OmegaConf": lambda: __import__("omegaconf").OmegaConf.create({"lr": 0.1, "sizes": [1, 2]}),
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("record", RECORDS)
def test_records_of_training_are_passed_over(vit: State, record: str, old_format: bool, tmp_path: pathlib.Path) -> None:
    content = {"model": vit, "record": RECORDS[record](), "epoch": 3}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not old_format)
    read = read_pth(tmp_path / "a.pth")
    assert read["epoch"] == 3 and all(torch.equal(read["model"][name], vit[name]) for name in vit)
    assert type(read["record"]).__module__ != "numpy"  # it was not built


class Other:
    """Not a record of a known package."""


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_other_objects_are_named(vit: State, tmp_path: pathlib.Path) -> None:
    torch.save({"model": vit, "sampler": Other()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: contains objects that could run code.*\(tests\S*\.Other\); if you"):
        read_pth(tmp_path / "a.pth")
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"b\.pt: a whole network stored with its classes.*save only its tensors"):
        read_pth(tmp_path / "b.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"c\.pt: a TorchScript program.*save only its tensors"):
        read_pth(tmp_path / "c.pt")


def test_a_damaged_archive_is_named(vit: State, tmp_path: pathlib.Path) -> None:
    torch.save(vit, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("b/data.pkl", b"cnumpy\ndtype\n")
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:9999])
    for name in "ab":
        with pytest.raises(UserError, match=rf"{name}\.pth: damaged"):
            read_pth(tmp_path / f"{name}.pth")


# ------------------------------------------------------------------------------------------------- before the names

LAYOUTS: dict[str, tuple[Callable[[State], Any], str, list[str]]] = {
    "bare": (lambda net: net, "", []),
    "torch.compile": (lambda net: under("_orig_mod.", net), "", []),
    "DataParallel of torch.compile": (lambda net: {"model": under("module._orig_mod.", net)}, "under module.", []),
    "torch.compile of blocks": (
        lambda net: {name.replace("attn.", "_orig_mod.attn."): one for name, one in net.items()}, "", [],
    ),
    "Lightning": (
        lambda net: {"state_dict": under("model.", net) | {"loss.weight": torch.ones(2)}, "hyper_parameters": {"a": 1}},
        "under model.", ["loss.weight"],
    ),
    "Lightning, a backbone": (
        lambda net: {"state_dict": under("model.backbone.", net), "epoch": 1}, "under model.backbone.", [],
    ),
    "CellViT": (
        lambda net: {"model_state_dict": under("encoder.", net) | {"decoder0.weight": torch.ones(2)}, "arch": "x"},
        "under encoder.", ["decoder0.weight"],
    ),
    "CONCH": (lambda net: under("visual.trunk.", net) | {"logit_scale": torch.ones(1)}, "under visual.trunk.",
              ["logit_scale"]),
    "one unusual key": (lambda net: {"ema_weights": net, "step": torch.tensor(3), "epoch": 3}, "", []),
    "student and teacher": (
        lambda net: {"model": under("student.backbone.", {n: t + 1 for n, t in net.items()})
                     | under("teacher.backbone.", net) | {"dino_loss.center": torch.ones(1, 2)}},
        "under teacher.backbone.", ["dino_loss.center", "student"],
    ),
    "chunks": (
        lambda net: {"teacher": under("backbone.", {
            name.replace("blocks.", "blocks.0." if name.startswith("blocks.0.") else "blocks.1.", 1): one
            for name, one in net.items()})},
        "blocks in chunks, under backbone.", [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_network_is_found_by_its_own_names(vit: State, name: str, tmp_path: pathlib.Path) -> None:
    make, layout, outside = LAYOUTS[name]
    torch.save(make(vit), tmp_path / "a.ckpt")
    about = assert_loads(NAME, tmp_path / "a.ckpt", vit)
    assert about["layout"] == layout and (not layout or f"a.ckpt, {layout}" in summarise(about))
    left_out = {"student" if one.startswith("student.") else one for one in about["left_out"]}
    assert left_out == set(outside)


def test_two_networks_of_which_none_is_a_teacher_are_refused(vit: State, tmp_path: pathlib.Path) -> None:
    torch.save(under("base_encoder.", vit) | under("momentum_encoder.", vit), tmp_path / "moco.pth")
    with pytest.raises(UserError, match=r"moco\.pth: contains the network 2 times, under base_encoder\., momentum_enc"):
        load_timm(f"timm:{NAME}@{tmp_path}/moco.pth", image_size=224)
    torch.save({"net_a": vit, "net_b": vit}, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"two\.pth: expected a state dict.*got net_a, net_b\. Save the one to use"):
        load_timm(f"timm:{NAME}@{tmp_path}/two.pth", image_size=224)


def test_one_rank_of_fsdp_is_named(tmp_path: pathlib.Path) -> None:
    torch.save({"model": {"teacher.backbone.blocks.0._flat_param": torch.ones(9)}}, tmp_path / "rank_0.pth")
    with pytest.raises(UserError, match=r"rank_0\.pth: one rank's part of an FSDP run.*gathered for evaluation"):
        load_timm(f"timm:{NAME}@{tmp_path}/rank_0.pth", image_size=224)


def test_stages_are_not_chunks() -> None:
    """EfficientNet numbers the blocks of each stage from 0; one with a single stage has no block twice."""
    with torch.device("meta"):
        state = timm.create_model("efficientnet_b0", num_classes=0).state_dict()
    assert "blocks.1.0.conv_pw.weight" in state
    first = {name: tensor for name, tensor in state.items() if not re.match(r"blocks\.[1-9]", name)}
    for kept in (state, first):
        found = find_network(pathlib.Path("a"), under("model.", kept), kept.keys())
        assert found.tensors.keys() == kept.keys()


# ------------------------------------------------------------------------------------------------------- Hugging Face

VIT_LAYER = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DINOV2_LAYER = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls2.gamma": "layer_scale2.lambda1",
}


def of_hugging_face(net: State, layer: dict[str, str], depth: int) -> State:
    """The names that ``transformers`` gives a ViT; written out from its conversion tables."""
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    names |= {
        f"patch_embed.proj.{leaf}": f"embeddings.patch_embeddings.projection.{leaf}" for leaf in ("weight", "bias")
    }
    names |= {f"norm.{leaf}": f"layernorm.{leaf}" for leaf in ("weight", "bias")}
    theirs: State = {}
    for i in range(depth):
        for ours, other in layer.items():
            for leaf in (".weight", ".bias") if not ours.endswith("gamma") else ("",):
                names[f"blocks.{i}.{ours}{leaf}"] = f"encoder.layer.{i}.{other}{leaf}"
        for leaf in ("weight", "bias"):
            joined = net[f"blocks.{i}.attn.qkv.{leaf}"]
            width = len(joined) // 3
            for part, of in enumerate(("query", "key", "value")):
                rows = joined[part * width : (part + 1) * width].clone()
                theirs[f"encoder.layer.{i}.attention.attention.{of}.{leaf}"] = rows
    assert len(names) + 2 * depth == len(net)
    return theirs | {other: net[ours] for ours, other in names.items()}


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_a_vit_of_hugging_face(vit: State, prefix: str, tmp_path: pathlib.Path) -> None:
    heads = {"pooler.dense.weight": torch.ones(2, 2), "pooler.dense.bias": torch.ones(2)}
    state = under(prefix, of_hugging_face(vit, VIT_LAYER, 3) | heads) | {"classifier.bias": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors")
    about = assert_loads(NAME, tmp_path / "model.safetensors", vit)
    assert about["layout"] == "names of Hugging Face" + (f", under {prefix}" if prefix else "")
    assert about["left_out"] == sorted(
        ["classifier.bias", f"{prefix}pooler.dense.bias", f"{prefix}pooler.dense.weight"]
    )


def test_dinov2_of_hugging_face(tmp_path: pathlib.Path) -> None:
    net = network(DINOV2)
    state = of_hugging_face(net, DINOV2_LAYER, 4) | {"embeddings.mask_token": torch.zeros(1, 384)}
    save_file(state, tmp_path / "model.safetensors")
    assert_loads(DINOV2, tmp_path / "model.safetensors", net, side=28)


def test_swiglu_and_registers_of_hugging_face() -> None:
    """Names that timm's own conversion of DINOv2 continues with."""
    theirs = [
        "embeddings.register_tokens", "encoder.layer.7.mlp.weights_in.bias", "encoder.layer.7.mlp.weights_out.weight",
        "encoder.layer.7.attention.attention.query.weight",
    ]  # fmt: skip
    found = find_network(pathlib.Path("a"), dict.fromkeys(theirs, torch.ones(1)), ["register_tokens"])
    assert sorted(found.tensors) == ["blocks.7.mlp.w12.bias", "blocks.7.mlp.w3.weight", "register_tokens"]


# ---------------------------------------------------------------------------------------------------- backbones of ours


@pytest.mark.parametrize("arch", ["vit_tiny", pytest.param("resnet50", marks=pytest.mark.heavy)])
def test_a_backbone_saved_by_another_script(arch: str, tmp_path: pathlib.Path) -> None:
    with torch.device("meta"):
        model = fill(build_backbone(arch))
    state = model.state_dict()
    for name, content in {
        "bare.pt": state,
        "ddp.pth": {"model": under("module._orig_mod.", state), "best": np.float64(0.5)},
        "lightning.ckpt": {"state_dict": under("net.backbone.", state) | {"net.image_head.bias": torch.ones(2)}},
    }.items():
        torch.save(content, tmp_path / name)
        loaded = load_backbone(None, tmp_path / name).state_dict()  # the position embedding as it is stored
        (tmp_path / name).unlink()
        assert all(torch.equal(loaded[key], state[key]) for key in state), name


def test_an_encoder_of_another_project_is_named(vit: State, tmp_path: pathlib.Path) -> None:
    torch.save({"teacher": under("backbone.", vit)}, tmp_path / "dino.pth")
    with pytest.raises(
        UserError, match=r"of an encoder without MUSE's decoder \(evaluate and finetune take it as --weights timm:"
    ):
        load_backbone(None, tmp_path / "dino.pth")


def test_the_files_in_a_folder_are_listed(tmp_path: pathlib.Path) -> None:
    """As the Hub of Hugging Face gives them."""
    for name in ("preprocessor_config.json", "model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).touch()
    listed = r"name the file of weights in it \(model\.safetensors, pytorch_model\.bin\)"
    with pytest.raises(UserError, match=rf"is a folder; {listed}; expected the weights of vit_tiny"):
        load_timm(f"timm:{NAME}@{tmp_path}", image_size=224)
    with pytest.raises(UserError, match=rf"neither a run.* nor a checkpoint.*if it is of another project, {listed}"):
        load_backbone(None, tmp_path)
