"""Losses of fine-tuning against closed forms in float64, with their gradients."""

import math

import pytest
import torch

from muse_fast.detection.losses import (
    UNKNOWN,
    consistency_weight,
    distance,
    mean,
    pseudo_labels,
    regression_loss,
    type_loss,
)


def rows(count: int, classes: int) -> torch.Tensor:
    return torch.randn(count, classes + 1, dtype=torch.float64, requires_grad=True)


def test_regression_is_the_mean_squared_distance() -> None:
    points = torch.tensor([[1.0, 2.0], [5.0, 5.0]], dtype=torch.float64, requires_grad=True)
    nuclei = torch.tensor([[4.0, 6.0], [5.0, 4.0]], dtype=torch.float64)
    loss = mean(*regression_loss(points, nuclei))
    assert loss.item() == (25 + 1) / 2
    loss.backward()
    torch.testing.assert_close(points.grad, points.detach() - nuclei, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
def test_type_loss_in_closed_form(weight: float) -> None:
    logits = rows(50, 3)
    target = torch.randint(-1, 4, (50,))
    loss = mean(*type_loss(logits, target, weight))
    part = target >= 0
    gain = torch.tensor([1, 1, 1, weight], dtype=torch.float64)[target.clamp_min(0)] * part
    probability = logits.detach().exp() / logits.detach().exp().sum(dim=1, keepdim=True)
    picked = probability[torch.arange(50), target.clamp_min(0)]
    assert loss.item() == pytest.approx((-(picked.log()) * gain).sum().item() / gain.sum().item(), rel=1e-12)
    loss.backward()
    one_hot = torch.nn.functional.one_hot(target.clamp_min(0), 4)
    expected = gain[:, None] / gain.sum() * (probability - one_hot)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-15)
    assert (logits.grad[~part] == 0).all()


def test_losses_without_targets_are_zero_with_zero_gradients() -> None:
    logits, points = rows(5, 2), torch.zeros(0, 2, dtype=torch.float64, requires_grad=True)
    loss = mean(*type_loss(logits, torch.full((5,), UNKNOWN), 0.5)) + mean(*regression_loss(points, torch.zeros(0, 2)))
    assert loss.item() == 0
    loss.backward()
    assert (logits.grad == 0).all()
    assert mean(*type_loss(logits[:0], torch.zeros(0, dtype=torch.int64), 0.5)).item() == 0


def test_pseudo_labels_need_confidence() -> None:
    probability = torch.tensor([[0.95, 0.03, 0.02], [0.5, 0.3, 0.2], [0.01, 0.01, 0.98], [0.9, 0.1, 0.0]]).double()
    assert pseudo_labels(probability.log(), 0.92).tolist() == [0, UNKNOWN, 2, UNKNOWN]


def test_the_consistency_weight_rises_from_zero_to_its_maximum() -> None:
    assert consistency_weight(0, 150, 0.1) == 0
    assert consistency_weight(75, 150, 0.1) == pytest.approx(0.05)
    assert consistency_weight(150, 150, 0.1) == pytest.approx(0.1)
    assert consistency_weight(50, 150, 0.1) == pytest.approx(0.1 * (1 - math.cos(math.pi / 3)) / 2)
    values = [consistency_weight(epoch, 150, 0.1) for epoch in range(151)]
    assert values == sorted(values)
    assert not any(consistency_weight(epoch, 150, 0.0) for epoch in range(151))


def test_mean_distance_in_closed_form() -> None:
    points, nuclei = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([[4.0, 6.0], [5.0, 4.0]])
    assert mean(*distance(points, nuclei)).item() == (5 + 1) / 2
    assert mean(*distance(points[:0], nuclei[:0])).item() == 0
