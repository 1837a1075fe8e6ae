"""Stochastic depth: which branches images lose, whichever way a batch is split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from muse_fast.batch import PackedNuclei, Views
from muse_fast.models.resnet import ResNetEncoder
from muse_fast.pretraining import trainer as trainer_module
from muse_fast.pretraining.drop_path import draw_scales
from muse_fast.pretraining.trainer import Trainer
from tests.pretraining.test_trainer import toy, toy_views
from tests.support.filled import open_branches

CPU = torch.device("cpu")


def test_a_branch_is_dropped_at_its_rate_and_the_mean_is_one() -> None:
    rates = [0.0, 0.1, 0.25, 0.9]
    scales = draw_scales(rates, seed=3, step=5, num_views=10, num_rois=2_000)
    assert scales.shape == (4, 10, 2_000) and scales.dtype == torch.float32
    for rate, of_branch in zip(rates, scales, strict=True):
        assert set(of_branch.unique().tolist()) == ({0.0} if rate else set()) | {torch.tensor(1 / (1 - rate)).item()}
        error = (rate * (1 - rate) / of_branch.numel()) ** 0.5
        assert (of_branch == 0).double().mean().item() == pytest.approx(rate, abs=4 * error)
        assert of_branch.double().mean().item() == pytest.approx(1, abs=4 * error / (1 - rate))


def test_branches_views_rois_and_steps_are_drawn_independently() -> None:
    dropped = torch.stack([draw_scales([0.5] * 3, 0, step, 4, 500) == 0 for step in range(2)]).double()
    for dim in range(4):
        first, second = dropped.select(dim, 0), dropped.select(dim, 1)
        both = (first * second).mean().item()
        assert both == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / first.numel()) ** 0.5), dim


def test_only_seed_and_step_determine_the_draw() -> None:
    first = draw_scales([0.5], 1, 2, 3, 64)
    torch.rand(10)
    assert torch.equal(draw_scales([0.5], 1, 2, 3, 64), first)
    assert not torch.equal(draw_scales([0.5], 2, 2, 3, 64), first)
    assert not torch.equal(draw_scales([0.5], 1, 3, 3, 64), first)


def test_a_rate_of_zero_drops_nothing() -> None:
    assert torch.equal(draw_scales([0.0, 0.0], 0, 0, 2, 5), torch.ones(2, 2, 5))


def scales_seen(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, accumulate: int, rois: int) -> Tensor:
    """Return the scales ``[branches, views, ROIs]`` of a rank's student in its second step."""
    trainer = Trainer(toy("model.drop_path=0.5"), CPU)
    trainer.step = 1
    micro_batches = [toy_views(seed, num_rois=rois // world_size // accumulate) for seed in range(accumulate)]
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "rank", lambda: rank)
        patch.setattr(trainer_module, "world_size", lambda: world_size)
        batches = trainer._prepare(micro_batches)
    parts = [batch.scales for batch in batches]
    assert all(part is not None for part in parts)
    return torch.cat([part.unflatten(1, (4, -1)) for part in parts if part is not None], dim=2)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_use_slices_of_the_same_draw(
    world_size: int, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [0.5 * layer / 11 for layer in range(12) for _ in range(2)]
    whole = draw_scales(rates, seed=0, step=1, num_views=4, num_rois=8)
    shares = [scales_seen(monkeypatch, rank, world_size, accumulate, rois=8) for rank in range(world_size)]
    torch.testing.assert_close(torch.cat(shares, dim=2), whole, rtol=0, atol=0)


def test_the_teacher_drops_no_path_and_the_student_does(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(toy("model.drop_path=0.5"), CPU)
    seen: dict[str, Any] = {}
    for who in ("student", "teacher"):
        encoder = getattr(trainer, who).backbone.encoder
        encoder.register_forward_pre_hook(lambda _, inputs, who=who: seen.update({who: inputs[1]}))
    trainer.train_step(toy_views())
    assert seen["teacher"] is None
    assert seen["student"].shape == (24, 8) and (seen["student"] == 0).any()


def test_resnet50_drops_the_branches_of_an_image() -> None:
    """An image that loses a block's branch goes through its shortcut only; other images do not change."""
    encoder = open_branches(ResNetEncoder(drop_path=0.3)).eval()
    assert encoder.drop_rates == pytest.approx([0.3 * block / 15 for block in range(16)])
    images = [torch.randn(2, 3, 64, 64), torch.randn(1, 3, 32, 32)]
    scales = torch.ones(16, 3)
    scales[5, 1], scales[15, 2] = 0.0, 0.0  # third block of layer2, last block of layer4
    with torch.no_grad():
        feature, maps = encoder(images, scales)
        kept, kept_maps = encoder(images)

        resnet = encoder.encoder
        x = resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(images[0][1:]))))
        x = resnet.layer1(x)
        x = resnet.layer2[3](resnet.layer2[1](resnet.layer2[0](x)).relu())  # without its third block
        torch.testing.assert_close(maps[0][1][1:], x, rtol=1e-5, atol=1e-5)
        last = kept_maps[1][2]
        last = resnet.layer4[1](resnet.layer4[0](last)).relu()
        torch.testing.assert_close(maps[1][3], last, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(maps[0], kept_maps[0], strict=True):
        torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(feature[0], kept[0])
    assert not torch.allclose(feature[1], kept[1], rtol=1e-3) and not torch.allclose(feature[2], kept[2], rtol=1e-3)


@pytest.mark.usefixtures("thin")
def test_a_batch_in_two_parts_trains_like_one() -> None:
    """With drop path. The image loss has no BatchNorm in its path, so its value is that of the whole batch."""
    whole = toy_views(num_rois=4, nuclei_per_view=0)
    parts = [cut(whole, slice(0, 2)), cut(whole, slice(2, 4))]
    settings = ("model.drop_path=0.5", "optim.batch_size=4")
    one, two = Trainer(toy(*settings), CPU), Trainer(toy(*settings, "optim.accumulate=2"), CPU)
    for _ in range(2):
        expected, got = one.train_step(whole), two.train_step(*parts)
        torch.testing.assert_close(got["loss_image"], expected["loss_image"], rtol=1e-5, atol=0)
        torch.testing.assert_close(got["grad_norm"], expected["grad_norm"], rtol=1e-4, atol=0)


def cut(views: Views, rois: slice) -> Views:
    """Return the views of some ROIs, without nuclei."""
    of_rois = [x.unflatten(0, (-1, views.num_rois))[:, rois].flatten(0, 1)
               for x in (views.global_images, views.local_images, views.mpp)]  # fmt: skip
    nothing = PackedNuclei(views.nuclei.xy, views.nuclei.index, torch.zeros(len(of_rois[2]) + 1, dtype=torch.int32))
    return Views(of_rois[0], of_rois[1], nothing, 0, of_rois[2], views.roi_ids[rois], views.epochs[rois])
