"""The registry: an encoder that a test adds can do all that built-in ones can, and no other file knows its name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from muse_fast import load_backbone
from muse_fast.config import load_config
from muse_fast.errors import UserError
from muse_fast.export import export
from muse_fast.models.archs import ARCHS, OPTIONAL, Arch, check_model, find_arch, register
from muse_fast.models.backbone import build_backbone
from muse_fast.models.decoder import PYRAMID, build_decoder
from muse_fast.models.encoder import Encoder, Maps, check_images, conv_flops
from muse_fast.pretrain import pretrain
from muse_fast.pretraining.flops import view_flops
from muse_fast.pretraining.memory import remedies
from muse_fast.pretraining.trainer import Trainer
from tests.pretraining.test_trainer import changed, snapshot, toy, toy_views

ROOT = Path(__file__).parents[2]
WIDTHS = (8, 16, 24, 40)


class ToyEncoder(Encoder):
    """Four strided convolutions; stochastic depth scales the last map."""

    def __init__(self, *, drop_path: float = 0.0, **unused: object) -> None:
        super().__init__()
        channels = zip((3, *WIDTHS), WIDTHS, (4, 2, 2, 2), strict=False)
        self.encoder = nn.ModuleList(nn.Conv2d(a, b, stride, stride) for a, b, stride in channels)
        self.drop_rates = [drop_path]

    def forward(self, groups: Sequence[Tensor], scales: Tensor | None = None) -> tuple[Tensor, list[Maps]]:
        maps, first = [], 0
        for images in groups:
            check_images(images)
            pyramid = [images]
            for conv in self.encoder:
                pyramid.append(conv(pyramid[-1]).relu())
            if scales is not None:
                pyramid[-1] = pyramid[-1] * scales[0, first : first + len(images), None, None, None]
            maps.append(tuple(pyramid[1:]))
            first += len(images)
        return torch.cat([of_group[-1].mean(dim=(2, 3)) for of_group in maps]), maps


def toy_flops(size: int) -> int:
    channels = zip((3, *WIDTHS), WIDTHS, (4, 8, 16, 32), (4, 2, 2, 2), strict=False)
    return sum(conv_flops(size // stride, a, b, kernel) for a, b, stride, kernel in channels)


@pytest.fixture
def toy_arch(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Arch(
        build=ToyEncoder, widths=WIDTHS, strides=PYRAMID, flops=toy_flops, mark=("encoder.0.weight", (8, 3, 4, 4))
    )
    monkeypatch.setitem(ARCHS, "toy", arch)


@pytest.mark.usefixtures("toy_arch")
def test_a_new_encoder_trains_and_its_weights_load_again(tmp_path: Path) -> None:
    trainer = Trainer(toy("model.arch=toy", "optim.freeze_prototypes_steps=0"), torch.device("cpu"))
    before = snapshot(trainer)
    for seed in range(2):
        assert torch.isfinite(trainer.train_step(toy_views(seed))["loss"])
    moved = changed(before, snapshot(trainer))
    learning = {name for name in before if ".encoder." in name}
    assert len(learning) == 16 and learning <= moved  # weights and biases of four convolutions, student and teacher

    folder = trainer.save(tmp_path / "run")
    export(str(folder), tmp_path / "toy.safetensors", "safetensors")
    expected = trainer.teacher.backbone.state_dict()
    for source in (folder, tmp_path / "toy.safetensors"):
        backbone = load_backbone(None, source)
        assert (backbone.arch, backbone.image_dim, backbone.dense_dim) == ("toy", 40, 20)
        assert all(torch.equal(value, expected[name]) for name, value in backbone.state_dict().items())
    with pytest.raises(UserError, match="no architecture like toy"):
        export(str(folder), tmp_path / "timm", "timm")
    assert not (tmp_path / "timm").exists()


@pytest.mark.usefixtures("toy_arch")
def test_the_flops_of_a_new_encoder() -> None:
    backbone = build_backbone("toy").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.randn(1, 3, 96, 96))
    assert counter.get_total_flops() == view_flops("toy", 96)


@pytest.mark.usefixtures("toy_arch")
@pytest.mark.parametrize("arch", ["toy", "resnet50"])
@pytest.mark.parametrize("setting", ["model.attention=varlen", "model.recompute=full", "train.compile=true"])
def test_settings_that_an_encoder_does_not_support_are_refused(setting: str, arch: str) -> None:
    check_model(load_config(None, [setting]))
    config = load_config(None, [f"model.arch={arch}", setting])
    key = setting.partition("=")[0]
    with pytest.raises(
        UserError, match=rf"(?i)^{setting}: expected (sdpa|none|false); {arch} does not support .* ViTs"
    ):
        check_model(config)
    with pytest.raises(UserError, match=f"^{key}="):
        Trainer(config, torch.device("cpu"))
    assert not any("recompute" in remedy for remedy in remedies(config, 4, 1))


@pytest.fixture
def registry() -> Iterator[None]:
    with mock.patch.dict(ARCHS):
        yield


@pytest.mark.usefixtures("registry")
def test_the_example_of_contributing_trains_and_its_weights_load_again(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?register\(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    state = torch.get_rng_state()
    exec(compile(code, "CONTRIBUTING.md", "exec"), {"__name__": "example"})
    assert torch.equal(torch.get_rng_state(), state)
    trainer = Trainer(toy("model.arch=pyramid", "optim.freeze_prototypes_steps=0"), torch.device("cpu"))
    before = snapshot(trainer)
    for seed in range(2):
        assert torch.isfinite(trainer.train_step(toy_views(seed))["loss"])
    assert changed(before, snapshot(trainer)) == set(before)
    folder = trainer.save(tmp_path / "run")
    export(str(folder), tmp_path / "x.safetensors", "safetensors")
    expected = trainer.teacher.backbone.state_dict()
    backbone = load_backbone(None, tmp_path / "x.safetensors")
    assert (backbone.arch, backbone.image_dim, backbone.dense_dim) == ("pyramid", 128, 64)
    assert all(torch.equal(value, expected[name]) for name, value in backbone.state_dict().items())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.randn(1, 3, 64, 64))
    assert counter.get_total_flops() == view_flops("pyramid", 64)


class Tokens(nn.Module):
    """Four layers over patches of 8 px, with an image feature of its own and with timm's drop path."""

    def __init__(self, drop_path: float = 0.0) -> None:
        super().__init__()
        from timm.layers import DropPath

        self.first = nn.Conv2d(3, 12, 8, 8)
        self.layers = nn.ModuleList(nn.Conv2d(12, 12, 1) for _ in range(3))
        self.drop_path = DropPath(drop_path)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = [self.first(images)]
        for layer in self.layers:
            maps.append(maps[-1] + self.drop_path(layer(maps[-1])))
        return maps[-1].amax(dim=(2, 3))[:, :7], maps


@pytest.mark.usefixtures("registry")
def test_a_registered_module_may_have_one_stride_and_an_image_feature() -> None:
    register("tokens", Tokens, sides=range(32, 129, 8))
    arch = find_arch("tokens")
    assert (arch.widths, arch.strides, arch.image_dim) == ((12,) * 4, (8,) * 4, 7)
    trainer = Trainer(toy("model.arch=tokens", "views.local_size=32"), torch.device("cpu"))
    assert trainer.student.backbone.encoder.drop_rates == [0.2] and trainer.teacher.backbone.dense_dim == 12
    assert torch.isfinite(trainer.train_step(toy_views(0))["loss"])
    check_model(toy("model.arch=tokens", "views.local_size=40"))
    with pytest.raises(UserError, match=r"views\.local_size=36: expected a multiple of 8 from 32 to 128 .* nearest is"):
        check_model(toy("model.arch=tokens", "views.local_size=36"))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("vit_tiny", Tokens, "name=vit_tiny: expected a new one"),
        ("timm:mine", Tokens, "without ':'"),
        ("two", lambda: nn.Sequential(nn.Conv2d(3, 4, 4, 4)), "two: expected four maps"),
        (
            "frozen",
            lambda: nn.Sequential(nn.BatchNorm3d(3)),
            "0 is a BatchNorm3d that cannot use the statistics of all",
        ),
    ],
)
def test_modules_that_do_not_fit_are_not_registered(name: str, module: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        register(name, module)
    assert ARCHS.get(name) is None or name == "vit_tiny"


def test_an_unknown_arch_is_refused_before_data_is_read(tmp_path: Path) -> None:
    config = load_config(None, ["model.arch=vit_smal", f"data.roiset={tmp_path / 'none'}"])
    with pytest.raises(UserError, match=r"^model\.arch=vit_smal: expected one of vit_tiny, .*did you mean 'vit_small'"):
        pretrain(config, tmp_path / "out")
    with pytest.raises(UserError, match=r"^arch=vit_smal: expected one of"):
        find_arch("vit_smal")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ARCHS)
def test_an_entry_describes_its_encoder(name: str) -> None:
    arch = find_arch(name)
    with torch.device("meta"):
        encoder = build_backbone(name).encoder
    tensor, shape = arch.mark
    assert tuple(encoder.state_dict()[tensor].shape) == shape
    assert [other for other in ARCHS.values() if other.mark == arch.mark] == [arch]
    assert bool(list(encoder.layers)) == ("train.compile" in arch.supports)
    assert arch.on_meta
    assert set(arch.supports) <= set(OPTIONAL)


def test_maps_without_a_decoder_are_refused() -> None:
    for widths, strides in (((8, 8, 8, 8), (4, 4, 8, 8)), ((8, 8, 8, 16), (16, 16, 16, 16))):
        with pytest.raises(ValueError, match="no decoder"):
            build_decoder(widths, strides)


def test_names_are_compared_only_in_models() -> None:
    """A file that tests ``arch == "resnet50"`` would have to change for every new encoder."""
    files = [path for path in (ROOT / "muse_fast").rglob("*.py") if "models" not in path.parts]
    assert len(files) > 50
    asking = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in ARCHS
    }
    assert not asking
