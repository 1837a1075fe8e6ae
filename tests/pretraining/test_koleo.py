"""KoLeo against its equation in float64, by itself and as a loss of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from muse_fast.config import LossConfig
from muse_fast.pretraining.losses import koleo_loss, loss_weights
from muse_fast.pretraining.trainer import Trainer
from muse_fast.training.guard import NonFiniteError
from tests.pretraining.test_trainer import toy, toy_views
from tests.support.ranks import Ranks
from tests.support.thin import thin_networks
from tests.support.toy_runs import toy_runs, training_rows

pytestmark = pytest.mark.usefixtures("thin")
CPU = torch.device("cpu")


def equation(view: Tensor) -> Tensor:
    """L_KoLeo of Sablayrolles et al. 2019 ("Spreading vectors for similarity search"): -1/n sum_i log min_j |x_i - x_j|
    over j != i for x on the unit sphere, as a loop over all distances."""
    x = view / (view**2).sum(1, keepdim=True).sqrt()
    terms = []
    for i in range(len(x)):
        distances = torch.stack([((x[i] - x[j]) ** 2).sum().sqrt() for j in range(len(x)) if j != i])
        terms.append(distances.min().log())
    return -torch.stack(terms).mean()


def test_the_loss_and_its_gradient_are_those_of_the_equation() -> None:
    """The sum over two views; neighbours are in the same view although the other view has a nearer row."""
    torch.manual_seed(0)
    views = [torch.randn(5, 8, dtype=torch.float64)]
    views.append(views[0] + 0.01 * torch.randn(5, 8, dtype=torch.float64))
    features = torch.cat(views).requires_grad_()
    expected = torch.stack([equation(view) for view in features.split(5)]).sum()
    loss = koleo_loss(features, 5) / 5
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # DINOv2 adds 1e-8 to distances
    (got,), (truth,) = torch.autograd.grad(loss, features), torch.autograd.grad(expected, features)
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-6 * truth.abs().max().item())
    assert torch.autograd.gradcheck(lambda x: koleo_loss(x, 5), (features,))


def test_two_opposite_rows_have_distance_two() -> None:
    assert koleo_loss(torch.tensor([[3.0, 0.0], [-0.1, 0.0]]), 2).item() == pytest.approx(-2 * math.log(2), rel=1e-6)


def test_single_precision_under_autocast() -> None:
    features = torch.randn(12, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo_loss(features, 12)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(12 * equation(features.double()).item(), rel=1e-5)


def test_equal_rows_have_a_finite_gradient() -> None:
    """The gradients of two equal rows cancel; a third row still has its gradient."""
    features = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, -1.0, 0.5]], requires_grad=True)
    loss = koleo_loss(features, 3)
    loss.backward()
    assert math.isfinite(loss.item()) and features.grad is not None and torch.isfinite(features.grad).all()
    assert features.grad[2].abs().max() > 0
    zeros = torch.zeros(2, 3, requires_grad=True)
    koleo_loss(zeros, 2).backward()
    assert zeros.grad is not None and torch.isfinite(zeros.grad).all()


def test_a_roi_without_neighbours_costs_nothing() -> None:
    features = torch.randn(2, 4, requires_grad=True)
    loss = koleo_loss(features, 1)
    loss.backward()
    assert loss.item() == 0 and features.grad is not None and not features.grad.any()


def test_it_is_off_by_default() -> None:
    assert list(loss_weights(LossConfig())) == ["image", "nucleus"]
    assert loss_weights(LossConfig(lambda_image=0, lambda_koleo=0.1)) == {"image": 0, "nucleus": 1, "koleo": 0.1}
    trainer = Trainer(toy(), CPU)
    assert "loss_koleo" not in trainer.train_step(toy_views()) and "koleo loss" not in trainer.guard.names


@thin_networks()  # in the processes of ranks too
def koleo_of_step(*seeds: int) -> tuple[float, Tensor]:
    """Run a step over a micro-batch of three ROIs per seed, with and without KoLeo at a weight of 0.3.

    Returns ``loss_koleo`` and what KoLeo adds to the encoder's gradients.
    """
    settings = ("optim.clip_grad=0", f"optim.accumulate={len(seeds)}", "optim.batch_size=6")
    gradients = []
    for weight in (0.0, 0.3):
        trainer = Trainer(
            toy("train.precision=fp64", "model.drop_path=0", *settings, f"loss.lambda_koleo={weight}"), CPU
        )
        with mock.patch.object(trainer.optimizer, "step"):
            values = trainer.train_step(*(toy_views(seed, num_rois=3) for seed in seeds))
        gradients.append(gradient(trainer.student.backbone.encoder))
    torch.testing.assert_close(
        values["loss"], values["loss_image"] + values["loss_nucleus"] + 0.3 * values["loss_koleo"], rtol=1e-12, atol=0
    )
    return float(values["loss_koleo"]), gradients[1] - gradients[0]


def gradient(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("ranks", [False, True], ids=["micro-batches", "ranks"])
def test_neighbours_are_within_a_micro_batch_of_a_rank(ranks: bool, two_ranks: Ranks) -> None:
    """Logged value and gradient are those of the mean over both."""
    student = Trainer(toy("train.precision=fp64"), CPU).student.eval()
    means = []
    for seed in (0, 1):
        groups, nuclei = toy_views(seed, num_rois=3).groups()
        cls = student([images.double() for images in groups], nuclei).features["image"]
        means.append(equation(cls[:3]) + equation(cls[3:6]))
    expected = (means[0] + means[1]) / 2
    (0.3 * expected).backward()
    for value, added in two_ranks(koleo_of_step, [(0,), (1,)]) if ranks else [koleo_of_step(0, 1)]:
        assert value == pytest.approx(expected.item(), rel=1e-6)
        truth = gradient(student.backbone.encoder)
        assert (added - truth).norm() < 1e-5 * truth.norm()


def test_its_nan_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muse_fast.pretraining.losses.koleo_loss", lambda features, rois: features.sum() * math.nan)
    trainer = Trainer(toy("loss.lambda_koleo=0.1"), CPU)
    trainer.train_step(toy_views())
    with pytest.raises(NonFiniteError, match="koleo loss"):
        trainer.check()


def test_the_command_logs_it(tmp_path: Path, two_ranks: Ranks) -> None:
    runs = toy_runs(tmp_path, two_ranks)
    settings = ["loss.lambda_koleo=0.1", "optim.steps=2", "optim.warmup_steps=1"]
    rows = {}
    for engine in ("one", "ddp"):
        ended = runs.end(tmp_path / engine, engine, *settings)
        assert all(each.code == 0 for each in ended), ended
        rows[engine] = training_rows(tmp_path / engine)
        summary = json.loads((tmp_path / engine / "summary.json").read_text())
        assert math.isfinite(summary["loss_koleo"]["end"]) and "koleo loss" in ended[0].out
    # With fewer candidates, the nearest neighbour is not nearer.
    assert rows["ddp"][0]["loss_koleo"] < rows["one"][0]["loss_koleo"]
