"""The losses against loops over the equations, in float64."""

import math

import pytest
import torch

from muse_fast.batch import Pairs
from muse_fast.models.heads import HeadOutput
from muse_fast.pretraining.losses import Temperatures, assignment_entropy, distillation_loss, image_pairs

CPU, TEMPS = torch.device("cpu"), Temperatures(student=0.1, teacher=0.04)
both_ways = pytest.mark.parametrize("logit_free", [True, False], ids=["logit-free", "stored-logits"])


def of_logits(logits: torch.Tensor) -> HeadOutput:
    """Return a head's output with these logits: the prototypes are unit vectors."""
    return HeadOutput(logits, torch.eye(logits.shape[1], dtype=logits.dtype))


def test_image_pairs_by_hand() -> None:
    pairs = image_pairs(num_rois=2, num_globals=2, num_views=3, device=CPU)
    assert list(zip(pairs.teacher_rows.tolist(), pairs.student_rows.tolist(), strict=True)) == [
        (0, 2), (1, 3), (0, 4), (1, 5),  # teacher global 0 with student views 1 and 2
        (2, 0), (3, 1), (2, 4), (3, 5),  # teacher global 1 with student views 0 and 2
    ]  # fmt: skip


@both_ways
def test_image_loss_is_dinos_mean_over_views(logit_free: bool) -> None:
    """Equation 3 as DINO's double loop: for each teacher view and each other student view, the mean over the batch."""
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
    pairs = image_pairs(num_rois, num_globals, num_views, CPU)
    ours = distillation_loss(of_logits(student), of_logits(teacher), center, pairs, TEMPS, logit_free=logit_free)
    assert ours.item() / len(pairs.teacher_rows) == pytest.approx((total / terms).item(), rel=1e-12)


@both_ways
def test_a_uniform_student_costs_ln_k(logit_free: bool) -> None:
    student, teacher = of_logits(torch.zeros(2, 128)), of_logits(torch.randn(2, 128))
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([1, 0]))
    loss = distillation_loss(student, teacher, torch.zeros(128), pairs, TEMPS, logit_free=logit_free)
    assert loss.item() == pytest.approx(2 * math.log(128), rel=1e-6)


@both_ways
def test_both_ways_and_padding_give_the_gradients_of_the_equation(logit_free: bool) -> None:
    student = HeadOutput(*(torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 9)))
    teacher = HeadOutput(*(torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 9)))
    center = torch.randn(9, dtype=torch.float64)
    pairs = Pairs(torch.tensor([0, 2, -1, 2]), torch.tensor([4, 1, 3, 1]))
    p = ((teacher.logits().detach() - center) / 0.04).softmax(1)
    log_q = (student.logits() / 0.1).log_softmax(1)
    expected = -(p[[0, 2, 2]] * log_q[[4, 1, 1]]).sum()
    loss = distillation_loss(student, teacher, center, pairs, TEMPS, logit_free=logit_free)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, student), rtol=1e-10, atol=1e-12)
    assert all(x.grad is None for x in teacher)


@both_ways
@pytest.mark.parametrize("rows", [0, 3])
def test_no_pairs_give_a_zero_that_trains_the_rest(rows: int, logit_free: bool) -> None:
    student = HeadOutput(torch.randn(rows, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True))
    teacher = HeadOutput(torch.randn(rows, 8), torch.randn(11, 8))
    none = torch.empty(0, dtype=torch.int64)
    loss = distillation_loss(student, teacher, torch.zeros(11), Pairs(none, none), TEMPS, logit_free=logit_free)
    assert loss.item() == 0.0
    loss.backward()
    for x in student:
        assert x.grad is not None and torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("rows", [10, 700])  # 700 rows need several blocks
def test_entropies_of_the_two_collapses(rows: int) -> None:
    same = torch.zeros(rows, 16)
    same[:, 3] = 9.0
    of_mean, of_row = assignment_entropy(of_logits(same), torch.zeros(16), 0.05)
    assert of_mean < 1e-3 and of_row < 1e-3
    flat_mean, flat_row = assignment_entropy(of_logits(torch.zeros(rows, 16)), torch.zeros(16), 0.05)
    assert flat_mean.item() == pytest.approx(1) and flat_row.item() == pytest.approx(1)
    spread_mean, spread_row = assignment_entropy(of_logits(9 * torch.eye(16).repeat(rows // 10, 1)), None, 0.05)
    assert spread_mean.item() == pytest.approx(1) and spread_row < 1e-3


def test_entropies_against_the_formula_in_float64() -> None:
    logits, center = torch.randn(600, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    p = ((logits - center) / 0.7).softmax(1)
    of_mean, of_row = assignment_entropy(of_logits(logits), center, 0.7)
    assert of_mean.item() == pytest.approx(-(p.mean(0) * p.mean(0).log()).sum().item() / math.log(12), rel=1e-12)
    assert of_row.item() == pytest.approx(-(p * p.log()).sum(1).mean().item() / math.log(12), rel=1e-12)
