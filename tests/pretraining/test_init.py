"""A run that starts from the weights of another run, with another view size (LFoV)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from muse_fast.errors import UserError
from muse_fast.models.vit import resize_pos_embed
from muse_fast.pretraining.trainer import Trainer
from tests.pretraining.test_trainer import toy, toy_views

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
