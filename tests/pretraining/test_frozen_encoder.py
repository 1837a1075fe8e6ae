"""The encoder frozen for the first steps, and learning rates of its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from muse_fast.config import OptimConfig
from muse_fast.errors import UserError
from muse_fast.models.archs import find_arch
from muse_fast.models.encoder import Encoder
from muse_fast.models.maps import MapsEncoder
from muse_fast.pretraining.distill import encoder_rates
from muse_fast.pretraining.trainer import Trainer
from tests.pretraining.test_init import copies
from tests.pretraining.test_trainer import gradients_at_the_update, toy, toy_views

CPU = torch.device("cpu")
VIT = "model.arch=timm:vit_tiny_patch16_224:depth=2:embed_dim=24:num_heads=2"
CONVOLUTIONS = "model.arch=timm:resnet10t:channels=[4,8,16,32]:stem_width=4:zero_init_last=false"
ENCODER = "backbone.encoder."


def trainer(arch: str, *settings: str) -> Trainer:
    return Trainer(toy(arch, "optim.freeze_prototypes_steps=0", *settings), CPU)


def test_a_frozen_encoder_gets_no_gradient_and_all_else_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without BatchNorm and drop path, a frozen encoder gives the others the gradients that a free one gives them."""
    frozen = gradients_at_the_update(trainer(VIT, "optim.freeze_encoder=1", "optim.clip_grad=0"), monkeypatch)
    free = gradients_at_the_update(trainer(VIT, "model.drop_path=0.0", "optim.clip_grad=0"), monkeypatch)
    norm, _ = frozen.pop("norm"), free.pop("norm")
    assert frozen.keys() == {name for name in free if not name.startswith(ENCODER)} < free.keys()
    for name, gradient in frozen.items():
        torch.testing.assert_close(gradient, free[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in frozen.values()]).norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("arch", [VIT, CONVOLUTIONS])
@pytest.mark.parametrize("optimiser", ["adamw", "lars"])
def test_a_frozen_encoder_stays_as_it_is_until_it_learns(arch: str, optimiser: str) -> None:
    one = trainer(
        arch, "optim.freeze_encoder=2", f"optim.name={optimiser}", "optim.encoder_lr_scale=0.5", "optim.lr=0.1"
    )
    before = copies(one)
    for step in range(2):
        values = one.train_step(toy_views(step))
        assert values["encoder_lr"] == 0 < values["lr"]
    same = {name for name, t in copies(one).items() if torch.equal(t, before[name])}
    assert {name for name in before if ENCODER in name} <= same  # with the running statistics of BatchNorm
    assert not {name for name in same if name.startswith("student") and ENCODER not in name and before[name].ndim > 1}
    values = one.train_step(toy_views(2))
    assert values["encoder_lr"] == 0.5 * values["lr"]
    same = {name for name, t in copies(one).items() if torch.equal(t, before[name]) and t.ndim > 1}
    assert not {name for name in same if name.startswith("student")}


@pytest.mark.parametrize("saved_at", [1, 2, 3])
@pytest.mark.parametrize("arch", [VIT, CONVOLUTIONS])
def test_a_run_resumes_across_the_step_at_which_the_encoder_begins_to_learn(
    arch: str, saved_at: int, tmp_path: Path
) -> None:
    settings = ("optim.freeze_encoder=2", "optim.layer_decay=0.8", "optim.encoder_lr_scale=0.5", "optim.accumulate=2")
    whole = resumed = trainer(arch, *settings)
    for step in range(4):
        if step == saved_at:
            folder = whole.save(tmp_path)
            assert folder is not None
            resumed = trainer(arch, *settings)
            resumed.load(folder)
        for one in (whole, resumed) if step >= saved_at else (whole,):
            one.train_step(toy_views(step, num_rois=1), toy_views(10 + step, num_rois=1))
    assert resumed.step == 4
    found = copies(resumed)
    assert all(torch.equal(t, found[name]) for name, t in copies(whole).items())


TIMM = {  # arch -> timm's network, if not the same
    "vit_tiny": "vit_tiny_patch16_224",
    "resnet50": "resnet50",
    "timm:resnet18": "",
    "timm:swin_tiny_patch4_window7_224": "",
    "timm:vit_small_patch14_reg4_dinov2": "",
    "timm:eva02_tiny_patch14_224": "",
}


@pytest.mark.parametrize("arch", TIMM)
def test_rates_are_those_of_timm(arch: str) -> None:
    """The classifier of timm's network stands for decoder and heads."""
    with torch.device("meta"):
        network = timm.create_model(TIMM[arch] or arch.removeprefix("timm:"), num_classes=5)
        encoder = find_arch(arch).build()
    of_timm = {}
    for group in param_groups_layer_decay(network, layer_decay=0.5):
        of_timm |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    theirs = {f"{ENCODER}encoder.{name}": of_timm[id(p)] for name, p in network.named_parameters() if id(p) in of_timm}
    rates = encoder_rates(encoder, OptimConfig(layer_decay=0.5, encoder_lr_scale=0.1))
    assert len(rates) > 30 and len(set(rates.values())) > 4
    for parameter, rate in rates.items():
        assert rate == pytest.approx(0.1 * theirs[parameter], rel=1e-12), parameter


def test_without_decay_all_of_the_encoder_has_one_rate() -> None:
    encoder = Encoder()
    encoder.encoder = nn.Linear(2, 2)
    assert encoder_rates(encoder, OptimConfig(encoder_lr_scale=0.25)) == {
        f"{ENCODER}encoder.weight": 0.25,
        f"{ENCODER}encoder.bias": 0.25,
    }
    with pytest.raises(UserError, match=r"optim\.layer_decay: expected 1, as Linear does not say which layers it has"):
        encoder_rates(MapsEncoder(nn.Linear(2, 2)), OptimConfig(layer_decay=0.9))
