"""The step: what it changes and does not change, and that it learns."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muse_fast import ops
from muse_fast.batch import PackedNuclei, Views
from muse_fast.config import PretrainConfig, load_config
from muse_fast.pretraining.trainer import Trainer
from muse_fast.training.guard import NonFiniteError
from muse_fast.training.report import read_back
from tests.support.filled import open_branches

pytestmark = pytest.mark.usefixtures("thin")
TOY = [
    "model.arch=vit_tiny", "model.drop_path=0.2", "views.global_size=64", "views.local_size=32", "views.num_locals=2",
    "head.hidden_dim=32", "head.prototypes=24", "optim.steps=50", "optim.batch_size=2", "optim.warmup_steps=2",
    "optim.freeze_prototypes_steps=2", "optim.ema_start=0.9", "train.precision=fp32",
]  # fmt: skip


CPU = torch.device("cpu")


def toy(*overrides: str) -> PretrainConfig:
    return load_config(None, [*TOY, *overrides])


def toy_views(seed: int = 0, nuclei_per_view: int = 3, num_rois: int = 2) -> Views:
    g = torch.Generator().manual_seed(seed)
    images = 4 * num_rois
    sizes = torch.tensor([64.0] * 2 * num_rois + [32.0] * 2 * num_rois).repeat_interleave(nuclei_per_view)
    nuclei = PackedNuclei(
        torch.rand(images * nuclei_per_view, 2, generator=g) * sizes[:, None],
        torch.arange(nuclei_per_view, dtype=torch.int32).repeat(images),
        torch.arange(0, images * nuclei_per_view + 1, max(nuclei_per_view, 1), dtype=torch.int32)
        if nuclei_per_view
        else torch.zeros(images + 1, dtype=torch.int32),
    )
    return Views(
        torch.randn(2 * num_rois, 3, 64, 64, generator=g),
        torch.randn(2 * num_rois, 3, 32, 32, generator=g),
        nuclei,
        2 * num_rois * nuclei_per_view,
        torch.ones(images),
        torch.arange(num_rois) + 10,
        torch.zeros(num_rois, dtype=torch.int64),
    )


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    parts = {"student": trainer.student.named_parameters(), "teacher": trainer.teacher.named_parameters()}
    tensors = {f"{part}.{n}": p.detach().clone() for part, named in parts.items() for n, p in named}
    return {**tensors, **{f"center.{n}": c.clone() for n, c in trainer.centers.items()}}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_losses_equal_the_equations_written_as_loops() -> None:
    """Equations 3, 6 and 7 over lists of views, sets of indices and stored softmaxes, in float64."""
    trainer = Trainer(toy("model.drop_path=0.0", "loss.lambda_nucleus=0.5"), torch.device("cpu"))
    trainer.centers["image"].uniform_(-0.1, 0.1)
    trainer.centers["nucleus"].uniform_(-0.1, 0.1)
    views = toy_views()
    with torch.no_grad():
        groups, nuclei = views.groups()
        student = {name: out.logits() for name, out in trainer.student.train()(groups, nuclei).heads.items()}
        teacher = {name: out.logits() for name, out in trainer.teacher.train()(groups[:1], nuclei[:1]).heads.items()}

    def cross_entropy(t: torch.Tensor, s: torch.Tensor, name: str) -> float:
        p = ((t.double() - trainer.centers[name].double()) / 0.04).softmax(-1)
        return -(p * (s.double() / 0.1).log_softmax(-1)).sum().item()

    image = [
        cross_entropy(teacher["image"][g * 2 + b], student["image"][v * 2 + b], "image")
        for g in range(2) for v in range(4) if v != g for b in range(2)
    ]  # fmt: skip
    nucleus = []
    offsets, index = views.nuclei.offsets.tolist(), views.nuclei.index.tolist()
    for g in range(2):
        for v in range(4):
            for b in range(2):
                if v == g:
                    continue
                rows_t = {index[r]: r for r in range(offsets[g * 2 + b], offsets[g * 2 + b + 1])}
                rows_s = {index[r]: r for r in range(offsets[v * 2 + b], offsets[v * 2 + b + 1])}
                for k in set(rows_t) & set(rows_s):
                    t, s = teacher["nucleus"][rows_t[k]], student["nucleus"][rows_s[k]]
                    nucleus.append(cross_entropy(t, s, "nucleus"))
    values = trainer.train_step(views)
    assert values["loss_image"] == pytest.approx(np.mean(image), rel=1e-4)
    assert values["loss_nucleus"] == pytest.approx(np.mean(nucleus), rel=1e-4)
    assert values["loss"] == pytest.approx(np.mean(image) + 0.5 * np.mean(nucleus), rel=1e-4)
    assert values["pairs_per_roi"] == len(nucleus) / 2 == 18


def test_a_step_changes_student_teacher_and_centres_but_not_frozen_prototypes() -> None:
    trainer = Trainer(toy(), torch.device("cpu"))
    before = snapshot(trainer)
    trainer.train_step(toy_views())
    moved = changed(before, snapshot(trainer))
    frozen = {n for n in before if n.endswith("prototypes_v")}
    assert moved == set(before) - frozen
    trainer.train_step(toy_views(1))
    trainer.train_step(toy_views(2))
    assert frozen <= changed(before, snapshot(trainer))


def gradients_at_the_update(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Take a step; return the gradients that the optimiser received."""
    seen, step = {}, trainer.optimizer.step

    def watched() -> None:
        named = trainer.student.named_parameters()
        seen.update({name: p.grad.double() for name, p in named if p.grad is not None})
        step()

    with monkeypatch.context() as patch:
        patch.setattr(trainer.optimizer, "step", watched)
        seen["norm"] = trainer.train_step(toy_views())["grad_norm"].double()
    return seen


@pytest.mark.parametrize("clip", ["global", "per_tensor"])
def test_gradients_are_clipped_to_the_configured_norm(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(limit: float) -> dict[str, torch.Tensor]:
        return gradients_at_the_update(Trainer(toy(f"optim.clip_grad={limit}", f"optim.clip={clip}"), CPU), monkeypatch)

    free = gradients(0)
    total = free.pop("norm")
    limit = torch.stack([g.norm() for g in free.values()]).median().item()  # half of the tensors are below it
    ours = gradients(limit)
    torch.testing.assert_close(total, torch.stack([g.norm() for g in free.values()]).norm(), rtol=1e-5, atol=0)
    assert ours.pop("norm") == total > limit  # the norm in the log is that before clipping
    assert ours.keys() == free.keys()
    for name, gradient in free.items():
        norm = gradient.norm() if clip == "per_tensor" else total
        expected = gradient * min(1.0, limit / (norm.item() + 1e-6))
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-9, msg=name)
    small = [name for name, gradient in free.items() if gradient.norm() < limit]
    assert small and (clip == "global") != all(torch.equal(ours[name], free[name]) for name in small)


@pytest.mark.parametrize("nuclei", [0, 1])
def test_batches_without_pairs_or_rows_train_the_image_loss(nuclei: int) -> None:
    trainer = Trainer(toy("head.input_norm=true"), torch.device("cpu"))
    before = snapshot(trainer)
    values = trainer.train_step(toy_views(nuclei_per_view=nuclei))
    assert math.isfinite(values["loss"]) and (values["loss_nucleus"] == 0) == (nuclei == 0)
    after = snapshot(trainer)
    assert all(torch.isfinite(t).all() for t in after.values())
    assert any("backbone.encoder" in n for n in changed(before, after))


def test_a_batch_of_one_roi() -> None:
    values = Trainer(toy("optim.batch_size=1"), torch.device("cpu")).train_step(toy_views(num_rois=1))
    assert math.isfinite(values["loss"]) and values["pairs_per_roi"] == 18


def poison_gradient(trainer: Trainer) -> None:
    trainer.student.backbone.encoder.encoder.norm.weight.register_hook(lambda grad: grad * float("inf"))


@pytest.mark.parametrize("case", ["nan image", "inf image", "nan gradient"])
def test_non_finite_values_stop_before_anything_changes(case: str) -> None:
    trainer = Trainer(toy(), torch.device("cpu"))
    trainer.train_step(toy_views())
    before = snapshot(trainer)
    views = toy_views(1)
    if case == "nan gradient":
        poison_gradient(trainer)
    else:
        views.global_images[1, 0, 3, 3] = float(case.split()[0])
    trainer.train_step(views)
    trainer.train_step(toy_views(2))  # not checked yet, but this step must not change anything either
    with pytest.raises(NonFiniteError, match=r"step 2: .*not finite.*ROIs \[10, 11\]") as raised:
        trainer.check()
    assert raised.value.step == 2
    assert not changed(before, snapshot(trainer))


@pytest.mark.parametrize("centering", ["ema", "sinkhorn"])
def test_the_nucleus_loss_falls_on_a_fixed_batch(centering: str) -> None:
    trainer = Trainer(toy(f"loss.centering={centering}", "optim.lr=2e-3"), torch.device("cpu"))
    views = toy_views(nuclei_per_view=6)
    losses = [trainer.train_step(views)["loss_nucleus"] for _ in range(15)]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("optim", ["optim.name=adamw", "optim.name=sgd", "optim.name=lars"])
def test_save_and_load_continue_bit_for_bit(optim: str, tmp_path: Path) -> None:
    """With drop path and another torch random state."""
    config = toy(optim, "optim.clip=per_tensor", "optim.lr=0.1")
    trainer = Trainer(config, torch.device("cpu"))
    for seed in range(3):
        trainer.train_step(toy_views(seed))
    folder = trainer.save(tmp_path)
    expected = [read_back(trainer.train_step(toy_views(seed))) for seed in range(3, 6)]
    other = Trainer(config, torch.device("cpu"))
    torch.rand(1000)
    other.load(folder)
    assert [read_back(other.train_step(toy_views(seed))) for seed in range(3, 6)] == expected
    assert not changed(snapshot(trainer), snapshot(other))


def test_the_nucleus_pairs_come_from_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropped pair shows in the measurements: the step does not match nuclei in any other way."""
    full = ops.match_nuclei

    def without_the_first(*arguments: Any, **named: Any) -> tuple[torch.Tensor, ...]:
        teacher, student, count = full(*arguments, **named)
        return teacher[1:], student[1:], count - 1

    monkeypatch.setattr(ops, "match_nuclei", without_the_first)
    assert Trainer(toy(), torch.device("cpu")).train_step(toy_views())["pairs_per_roi"] == 17.5


def test_the_centre_moves_to_the_mean_logit_of_the_teacher_before_its_update() -> None:
    trainer = Trainer(toy("optim.ema_start=0.0", "optim.ema_end=0.0"), torch.device("cpu"))  # the teacher moves a lot
    trainer.teacher.image_head.prototypes_v.add_(0.05)
    views = toy_views()
    with torch.no_grad():
        groups, nuclei = views.groups()
        targets = {name: out.logits() for name, out in trainer.teacher.train()(groups[:1], nuclei[:1]).heads.items()}
    trainer.train_step(views)
    torch.testing.assert_close(trainer.centers["image"], 0.1 * targets["image"].mean(0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(trainer.centers["nucleus"], 0.1 * targets["nucleus"].mean(0), rtol=1e-3, atol=1e-6)


def test_resnet50_trains_too() -> None:
    trainer = Trainer(toy("model.arch=resnet50"), torch.device("cpu"))
    open_branches(trainer.student)  # while they are closed, only the norm that opens them has a gradient
    before = snapshot(trainer)
    values = trainer.train_step(toy_views())
    assert all(math.isfinite(value) for value in values.values())
    frozen = {name for name in before if name.endswith("prototypes_v")}
    assert changed(before, snapshot(trainer)) == set(before) - frozen
