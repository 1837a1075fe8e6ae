"""The losses against loops over the equations, in float64."""

import math

import pytest
import torch

from muse_fast.batch import Pairs
from muse_fast.ssl.losses import assignment_entropy, distillation_loss, image_pairs


def test_image_pairs_by_hand() -> None:
    pairs = image_pairs(num_rois=2, num_globals=2, num_views=3)
    assert list(zip(pairs.teacher.tolist(), pairs.student.tolist(), strict=True)) == [
        (0, 2), (1, 3), (0, 4), (1, 5),  # teacher global 0 with student views 1 and 2
        (2, 0), (3, 1), (2, 4), (3, 5),  # teacher global 1 with student views 0 and 2
    ]  # fmt: skip


def test_image_loss_is_dinos_mean_over_views() -> None:
    """Equation 3 and DINO's double loop: for each teacher view, each other student view, the mean over the batch."""
    torch.manual_seed(0)
    num_rois, num_globals, num_views, k = 3, 2, 4, 7
    student = torch.randn(num_views * num_rois, k, dtype=torch.float64)
    teacher = torch.randn(num_globals * num_rois, k, dtype=torch.float64)
    center = torch.randn(k, dtype=torch.float64)
    total, terms = 0.0, 0
    for g, t in enumerate(teacher.view(num_globals, num_rois, k)):
        p = ((t - center) / 0.04).softmax(-1)
        for v, s in enumerate(student.view(num_views, num_rois, k)):
            if v != g:
                total += -(p * (s / 0.1).log_softmax(-1)).sum(-1).mean()
                terms += 1
    ours = distillation_loss(student, teacher, center, image_pairs(num_rois, num_globals, num_views), 0.1, 0.04)
    assert ours.item() == pytest.approx((total / terms).item(), rel=1e-12)


def test_a_uniform_student_costs_ln_k() -> None:
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([1, 0]))
    loss = distillation_loss(torch.zeros(2, 128), torch.randn(2, 128), torch.zeros(128), pairs, 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(128), rel=1e-6)


def test_no_pairs_give_a_zero_that_trains_the_rest() -> None:
    student = torch.randn(3, 8, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    loss = distillation_loss(student, torch.randn(2, 8), torch.zeros(8), Pairs(none, none), 0.1, 0.04)
    assert loss.item() == 0.0
    loss.backward()
    assert student.grad is not None and torch.equal(student.grad, torch.zeros_like(student))


def test_no_rows_at_all() -> None:
    student = torch.randn(0, 8, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    loss = distillation_loss(student, torch.randn(0, 8), torch.zeros(8), Pairs(none, none), 0.1, 0.04)
    loss.backward()
    assert loss.item() == 0.0


def test_entropies_of_the_two_collapses() -> None:
    same = torch.zeros(10, 16)
    same[:, 3] = 9.0
    of_mean, of_row = assignment_entropy(same, torch.zeros(16), 0.05)
    assert of_mean < 1e-3 and of_row < 1e-3
    flat_mean, flat_row = assignment_entropy(torch.zeros(10, 16), torch.zeros(16), 0.05)
    assert flat_mean.item() == pytest.approx(math.log(16)) and flat_row.item() == pytest.approx(math.log(16))
    spread_mean, spread_row = assignment_entropy(9 * torch.eye(16), torch.zeros(16), 0.05)
    assert spread_mean.item() == pytest.approx(math.log(16)) and spread_row < 1e-3
