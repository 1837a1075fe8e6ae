"""Runs that start from weights: of another run with another view size (LFoV), of a backbone, of an encoder of timm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from muse_fast.errors import UserError
from muse_fast.export import FORMATS, export
from muse_fast.models.timm.networks import parse_spec
from muse_fast.models.vit import resize_pos_embed
from muse_fast.pretraining.start import describe, first_backbone
from muse_fast.pretraining.trainer import Trainer
from tests.pretraining.test_trainer import toy, toy_views
from tests.support.filled import fill

CPU = torch.device("cpu")
POS_EMBED = "backbone.encoder.encoder.pos_embed"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A trainer after two steps, so that teacher and centres differ from their start, and its checkpoint."""
    trainer = Trainer(toy("optim.freeze_prototypes_steps=0"), CPU)
    for seed in range(2):
        trainer.train_step(toy_views(seed))
    folder = trainer.save(tmp_path_factory.mktemp("origin"))
    assert folder is not None
    return trainer, folder


def test_the_backbone_before_training_is_that_of_the_first_step(origin: tuple[Trainer, Path]) -> None:
    drawn = torch.get_rng_state()
    for settings in (["seed=4"], [f"model.init={origin[1]}"]):
        trainer = Trainer(config := toy(*settings), CPU)
        if config.model.init:
            trainer.start_from(config.model.init)
        expected = trainer.teacher.backbone.state_dict()
        torch.set_rng_state(drawn)
        found = first_backbone(config).to(next(trainer.teacher.parameters()).dtype).state_dict()
        assert torch.equal(torch.get_rng_state(), drawn)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("side", [64, 96, 32])
def test_only_weights_teacher_and_centres_are_loaded(origin: tuple[Trainer, Path], side: int) -> None:
    source, folder = origin
    trainer = Trainer(toy(f"views.global_size={side}", "seed=9", "model.drop_path=0.0"), CPU)
    trainer.start_from(folder)
    assert trainer.step == 0 and not trainer.optimizer.state
    for ours, theirs in ((trainer.student, source.student), (trainer.teacher, source.teacher)):
        expected = theirs.state_dict()
        expected[POS_EMBED] = resize_pos_embed(expected[POS_EMBED], side // 16, "scale_factor")
        assert expected[POS_EMBED].shape[1] == 1 + (side // 16) ** 2
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    assert not torch.equal(trainer.student.image_head.prototypes_v, trainer.teacher.image_head.prototypes_v)
    assert all(torch.equal(trainer.centers[name], center) for name, center in source.centers.items())
    assert trainer.centers["image"].any()


def test_position_embeddings_are_resized_by_the_rule_of_the_origin(tmp_path: Path) -> None:
    source = Trainer(toy("model.pos_embed_resize=size"), CPU)
    folder = source.save(tmp_path)
    assert folder is not None
    trainer = Trainer(toy("views.global_size=96"), CPU)
    trainer.start_from(folder)
    stored = source.teacher.state_dict()[POS_EMBED]
    assert torch.equal(trainer.teacher.state_dict()[POS_EMBED], resize_pos_embed(stored, 6, "size"))


def test_the_optimiser_starts_fresh(origin: tuple[Trainer, Path]) -> None:
    trainer = Trainer(toy("optim.freeze_prototypes_steps=0"), CPU)
    trainer.start_from(origin[1])
    assert torch.isfinite(trainer.train_step(toy_views(7))["loss"])
    assert trainer.step == 1
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {1}


def test_weights_in_float32_start_a_run_in_float64(origin: tuple[Trainer, Path]) -> None:
    trainer = Trainer(toy("train.precision=fp64"), CPU)
    trainer.start_from(origin[1])
    assert torch.equal(trainer.student.image_head.prototypes_v, origin[0].student.image_head.prototypes_v.double())
    assert all(t.dtype == torch.float64 for t in (*trainer.student.parameters(), *trainer.centers.values()))


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize(
    ("setting", "was"),
    [
        ("model.arch=vit_small", "vit_tiny"),
        ("model.arch=resnet50", "vit_tiny"),
        ("head.prototypes=48", "24"),
        ("head.hidden_dim=64", "32"),
        ("head.bottleneck_dim=128", "256"),
        ("head.input_norm=true", "False"),
    ],
)
def test_another_architecture_or_other_heads_are_refused_by_name(
    origin: tuple[Trainer, Path], setting: str, was: str
) -> None:
    key, value = setting.split("=")
    trainer = Trainer(toy(setting), CPU)
    before = {name: t.clone() for name, t in trainer.student.state_dict().items()}
    with pytest.raises(UserError, match=rf"(?i)^model\.init={origin[1]} .*{key}={was} \(here {value}\)"):
        trainer.start_from(origin[1])
    assert all(torch.equal(before[name], t) for name, t in trainer.student.state_dict().items())


@pytest.mark.usefixtures("thin")
def test_resnet50_starts_from_resnet50(tmp_path: Path) -> None:
    """ResNet-50 has no position embedding to resize."""
    source, other = (
        Trainer(toy("model.arch=resnet50", *more), CPU) for more in ((), ("seed=1", "views.global_size=96"))
    )
    folder = source.save(tmp_path)
    assert folder is not None
    other.start_from(folder)
    assert all(torch.equal(t, source.student.state_dict()[name]) for name, t in other.student.state_dict().items())


# ------------------------------------------------------------------------------------------------ weights of a backbone


def copies(trainer: Trainer) -> dict[str, Tensor]:
    networks = {"student": trainer.student, "teacher": trainer.teacher}
    return {f"{part}.{name}": t.clone() for part, one in networks.items() for name, t in one.state_dict().items()}


def official(source: Trainer, path: Path) -> None:
    """A file as the authors publish it, with a head."""
    tensors = {f"module.backbone.{name}": t for name, t in source.teacher.backbone.state_dict().items()}
    torch.save({"teacher": tensors | {"module.head.mlp.0.bias": torch.ones(3)}, "epoch": 3}, path)


@pytest.mark.parametrize("kind", ["official", *FORMATS])
def test_a_backbone_is_loaded_into_student_and_teacher_and_heads_are_new(
    origin: tuple[Trainer, Path], kind: str, tmp_path: Path
) -> None:
    source, folder = origin
    path = tmp_path / f"weights{'.pth' if kind == 'official' else FORMATS[kind].suffix}"
    if kind == "official":
        official(source, path)
    else:
        export(str(folder), path, kind)
    trainer = Trainer(toy("seed=9", "views.global_size=96"), CPU)
    drawn = copies(trainer)
    report = trainer.start_from(path)
    found, expected = copies(trainer), source.teacher.state_dict()
    expected[POS_EMBED] = resize_pos_embed(expected[POS_EMBED], 6, "scale_factor")
    for name, value in trainer.student.state_dict().items():
        right = expected[name] if name.startswith("backbone.") else drawn[f"student.{name}"]
        assert torch.equal(value, right) and torch.equal(found[f"teacher.{name}"], right), name
    assert not any(center.any() for center in trainer.centers.values())
    heads = [name for name in expected if not name.startswith("backbone.")]
    assert report["new"] == [*heads, "centers"] and report["resized"] == [POS_EMBED]
    assert report["loaded"] == [name for name in expected if name not in heads]
    left_out = {
        "official": ["module.head.mlp.0.bias"],
        "safetensors": sorted([*heads, "center.image", "center.nucleus"]),
    }
    assert report["left_out"] == left_out.get(kind, [])
    lines = describe(report)
    of_decoder = sum(name.startswith("backbone.decoder.") for name in expected)
    assert lines[0].startswith("loaded: backbone.encoder (") and f"backbone.decoder ({of_decoder} tensors)" in lines[0]
    assert lines[1].startswith("new: image_head (") and lines[1].endswith(", centers")


def test_other_backbones_are_refused_and_nothing_changes(origin: tuple[Trainer, Path], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    official(origin[0], path)
    for settings, said in (
        (["model.arch=vit_small"], r"model.arch=vit_tiny \(here vit_small\)"),
        (["model.decoder_dim=32"], "model.init=.*does not fit vit_tiny.* of another shape: backbone.decoder"),
    ):
        trainer = Trainer(toy(*settings), CPU)
        before = copies(trainer)
        with pytest.raises(UserError, match=said):
            trainer.start_from(path)
        assert all(torch.equal(t, before[name]) for name, t in copies(trainer).items())


# --------------------------------------------------------------------------------------------------- encoders of timm

# The lines of docs/evaluate.md, small; the side of views; what the file has besides the network.
THIN = "depth=2:embed_dim=48:num_heads=3"
LAYOUTS = {
    "DINO": (f"vit_small_patch16_224.dino:{THIN}", 64),
    "DINO ResNet-50": ("resnet50:layers=[1,1,1,1]:channels=[4,8,12,16]", 64),
    "DINOv2": (f"vit_small_patch14_dinov2:{THIN}", 56),
    "UNI": (f"vit_large_patch16_224:init_values=1e-5:mean=imagenet:std=imagenet:{THIN}", 64),
    "UNI2-h": (
        "vit_giant_patch14_224:init_values=1e-5:mlp_ratio=5.33334:no_embed_class=true:mlp_layer=SwiGLUPacked:"
        f"act_layer=silu:reg_tokens=8:mean=imagenet:std=imagenet:{THIN}",
        56,
    ),
    "Virchow2": (
        "vit_huge_patch14_224:init_values=1e-5:mlp_ratio=5.3375:mlp_layer=SwiGLUPacked:act_layer=silu:reg_tokens=4:"
        f"mean=imagenet:std=imagenet:{THIN}",
        56,
    ),
    "Prov-GigaPath": (
        f"vit_giant_patch14_dinov2:img_size=224:patch_size=16:init_values=1e-5:mlp_ratio=5.33334:{THIN}",
        64,
    ),
    "H-optimus-0": (
        "vit_giant_patch14_reg4_dinov2:img_size=224:init_values=1e-5:mean=[0.707223,0.578729,0.703617]:"
        f"std=[0.211883,0.230117,0.177517]:{THIN}",
        56,
    ),
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = {"H-optimus-0": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))}
CONTENT: dict[str, Callable[[dict[str, Tensor]], Any]] = {  # of a file with the network's tensors; others: a bare dict
    "DINO": lambda state: {
        "student": {f"module.backbone.{name}": t + 1 for name, t in state.items()},
        "teacher": {f"backbone.{name}": t for name, t in state.items()} | {"head.last_layer.weight_v": torch.ones(2)},
        "epoch": 100,
    },
    "DINOv2": lambda state: state | {"mask_token": torch.ones(1, 48)},
}


def weights_in_layout(layout: str, path: Path) -> Any:
    """Write a file with random weights; return timm's own network with them, for images of any size."""
    spec = parse_spec(f"timm:{LAYOUTS[layout][0]}")
    classes = {key: getattr(timm.layers, value) for key, value in spec.options.items() if key == "mlp_layer"}
    any_size = {} if "resnet" in spec.name else {"dynamic_img_size": True}
    network = fill(timm.create_model(spec.name, num_classes=0, **any_size, **spec.options | classes)).eval()
    torch.save(CONTENT.get(layout, dict)(network.state_dict()), path)
    return network


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_encoder_of_timm_gives_the_tokens_of_timm(layout: str, tmp_path: Path) -> None:
    network = weights_in_layout(layout, tmp_path / "pytorch_model.bin")
    spec, side = LAYOUTS[layout]
    sizes = [f"views.global_size={side}", f"views.local_size={side}", "model.drop_path=0.0"]
    trainer = Trainer(toy(f"model.arch=timm:{spec}", *sizes), CPU)
    drawn = copies(trainer)
    report = trainer.start_from(f"timm:{spec}@{tmp_path / 'pytorch_model.bin'}")

    images = torch.rand(2, 3, side, side)
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(values).view(3, 1, 1) for values in one] for one in (IMAGENET, STATISTICS.get(layout, IMAGENET))
    )
    for one in (trainer.student, trainer.teacher):
        with torch.no_grad():
            cls, encoded = one.eval().backbone.encoder([(images - mean) / std])
            expected = network.forward_features((images - own_mean) / own_std)
            pooled = network.forward_head(expected, pre_logits=True)
        found = encoded[0][-1] if "resnet" in spec else encoded.split(encoded.taps[-1])[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cls, pooled, rtol=1e-5, atol=1e-5)
    others = [name for name in trainer.student.state_dict() if not name.startswith("backbone.encoder.")]
    assert report["new"] == [*others, "centers"]
    assert all(torch.equal(t, drawn[name]) for name, t in copies(trainer).items() if ".encoder." not in name)
    assert report["left_out"] == (["head.last_layer.weight_v"] if layout == "DINO" else [])
    assert ("mask_token" in report["converted"]) == (layout == "DINOv2")
    stored_at_size = "resnet" in spec or "img_size" in spec
    assert ("pos_embed" in report["converted"]) == (not stored_at_size)


TIMM = f"timm:vit_tiny_patch16_224:{THIN}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("norm.bias"), r"does not fit timm:vit_tiny\S*\. 1 missing: norm\.bias"),
        (lambda state: state.update(extra=torch.ones(1)), r"1 unexpected: extra"),
        (
            lambda state: state.update({"blocks.1.norm1.bias": torch.ones(7)}),
            r"1 of another shape: blocks\.1\.norm1\.bias \[7\] instead of \[48\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        network = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, embed_dim=48, num_heads=3)
    state = fill(network).state_dict()
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    trainer = Trainer(toy(f"model.arch={TIMM}"), CPU)
    before = copies(trainer)
    with pytest.raises(UserError, match=said):
        trainer.start_from(f"{TIMM}@{tmp_path / 'model.safetensors'}")
    assert all(torch.equal(t, before[name]) for name, t in copies(trainer).items())


def test_names_and_paths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(toy(f"model.arch={TIMM}"), CPU)
    (tmp_path / "a.pth").touch()
    for init, said in (
        (TIMM, r"no weights; expected timm:\S*@FILE"),
        (f"{TIMM}@{tmp_path / 'b.pth'}", "no such file"),
        (f"timm:vit_tiny_patch16_224@{tmp_path / 'a.pth'}", f"but model.arch={TIMM}; use one name for both"),
        (str(tmp_path / "nowhere"), r"model\.init=\S*nowhere: no such file or folder; expected a run"),
        (str(tmp_path), "neither a run"),
    ):
        with pytest.raises(UserError, match=said):
            trainer.start_from(init)
