"""A step over micro-batches is that of the mean over all their pairs, in float64, with BatchNorm per micro-batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from muse_fast.batch import Views
from muse_fast.pretraining.distill import Network
from muse_fast.pretraining.trainer import Trainer
from tests.pretraining.test_trainer import toy, toy_views

pytestmark = pytest.mark.usefixtures("thin")
CPU = torch.device("cpu")
EXACT = [
    "model.drop_path=0.0", "train.precision=fp64", "optim.clip_grad=0", "optim.accumulate=2", "optim.batch_size=4",
    "optim.freeze_prototypes_steps=0", "loss.lambda_image=0.7", "loss.lambda_nucleus=1.3", "head.input_norm=true",
]  # fmt: skip


def nucleus_pairs(views: Views) -> list[tuple[int, int]]:
    """Return the rows of the same nucleus in a global and in another view, found with sets."""
    offsets, index, pairs = views.nuclei.offsets.tolist(), views.nuclei.index.tolist(), []
    for roi in range(views.num_rois):
        rows = [{index[r]: r for r in range(offsets[image], offsets[image + 1])}
                for image in range(roi, len(offsets) - 1, views.num_rois)]  # fmt: skip
        for g in range(views.num_globals):
            for v in range(len(rows)):
                if v != g:
                    pairs += [(rows[g][k], rows[v][k]) for k in rows[g].keys() & rows[v].keys()]
    return pairs


def image_pairs(views: Views) -> list[tuple[int, int]]:
    count, num_views = views.num_rois, views.num_globals + views.num_locals
    return [(g * count + b, v * count + b)
            for g in range(views.num_globals) for v in range(num_views) if v != g for b in range(count)]  # fmt: skip


def sums_by_hand(student: Network, teacher: Network, centers: dict[str, Tensor], views: Views) -> dict[str, Tensor]:
    """Sum the cross-entropies over the pairs of a micro-batch, with stored softmaxes."""
    groups, nuclei = views.groups()
    groups = [images.double() for images in groups]
    with torch.no_grad():
        targets = teacher.train()(groups[:1], nuclei[:1]).heads
    outputs = student.train()(groups, nuclei).heads
    sums = {}
    for name, pairs in (("image", image_pairs(views)), ("nucleus", nucleus_pairs(views))):
        t, s = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for side in (0, 1))
        p = ((targets[name].logits() - centers[name]) / 0.04).softmax(1)
        sums[name] = -(p[t] * (outputs[name].logits() / 0.1).log_softmax(1)[s]).sum()
    return sums


@pytest.mark.parametrize("logit_free", ["true", "false"])
@pytest.mark.parametrize("nuclei", [(3, 5), (0, 4), (0, 0)], ids=str)
def test_a_step_is_that_of_the_mean_over_all_pairs(
    nuclei: tuple[int, int], logit_free: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, every gradient, and BatchNorm's running statistics."""
    trainer = Trainer(toy(*EXACT, f"loss.logit_free={logit_free}"), CPU)
    for center in trainer.centers.values():
        center.uniform_(-0.1, 0.1)
    student, teacher = copy.deepcopy(trainer.student), copy.deepcopy(trainer.teacher)
    centers = {name: center.clone() for name, center in trainer.centers.items()}
    views = [toy_views(seed, nuclei_per_view=count) for seed, count in enumerate(nuclei)]

    micro = [sums_by_hand(student, teacher, centers, part) for part in views]
    counts = {"image": sum(len(image_pairs(v)) for v in views), "nucleus": sum(len(nucleus_pairs(v)) for v in views)}
    means = {name: (micro[0][name] + micro[1][name]) / max(counts[name], 1) for name in counts}
    (0.7 * means["image"] + 1.3 * means["nucleus"]).backward()

    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    got = trainer.train_step(*views)
    for name, expected in means.items():
        torch.testing.assert_close(got[f"loss_{name}"], expected.detach(), rtol=1e-12, atol=0)
    assert got["pairs_per_roi"] == counts["nucleus"] / 4
    largest = max(p.grad.abs().max().item() for p in student.parameters())
    for (name, ours), theirs in zip(trainer.student.named_parameters(), student.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        scale = max(theirs.grad.abs().max().item(), 1e-4 * largest)  # some are zero up to rounding
        torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, rtol=0, atol=1e-10, msg=name)
    for mine, own in ((trainer.student, student), (trainer.teacher, teacher)):
        for name, buffer in mine.named_buffers():
            torch.testing.assert_close(buffer, dict(own.named_buffers())[name], rtol=1e-12, atol=1e-12, msg=name)


def test_the_centre_follows_the_mean_over_all_micro_batches() -> None:
    trainer = Trainer(toy(*EXACT), CPU)
    teacher, views = copy.deepcopy(trainer.teacher), [toy_views(0, nuclei_per_view=2), toy_views(1, nuclei_per_view=7)]
    logits: dict[str, list[Tensor]] = {"image": [], "nucleus": []}
    for part in views:
        groups, nuclei = part.groups()
        with torch.no_grad():
            for name, output in teacher.train()([groups[0].double()], nuclei[:1]).heads.items():
                logits[name].append(output.logits())
    trainer.train_step(*views)
    for name, parts in logits.items():
        torch.testing.assert_close(trainer.centers[name], 0.1 * torch.cat(parts).mean(0), rtol=1e-12, atol=1e-14)


def test_the_optimiser_takes_one_step_per_batch() -> None:
    trainer = Trainer(toy(*EXACT), CPU)
    for seed in range(3):
        trainer.train_step(toy_views(seed), toy_views(seed + 10))
    assert trainer.step == 3
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {3}
