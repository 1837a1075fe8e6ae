"""linear_dino_loss against numpy in float64 and the closed-form gradients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import Tensor

from muse_fast import ops

pytestmark = pytest.mark.usefixtures("deterministic")


class Case(NamedTuple):
    student_z: Tensor
    student_W: Tensor
    teacher_z: Tensor
    teacher_W: Tensor
    center: Tensor
    teacher_rows: Tensor
    student_rows: Tensor
    student_temp: float = 0.1
    teacher_temp: float = 0.04


def make_case(
    students: int, teachers: int, width: int, prototypes: int, pairs: int, dtype: torch.dtype = torch.float64
) -> Case:
    def unit_rows(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, dtype=torch.float64), dim=-1).to(dtype)

    return Case(
        unit_rows(students),
        unit_rows(prototypes),
        unit_rows(teachers),
        unit_rows(prototypes),
        (torch.randn(prototypes, dtype=torch.float64) * 0.1).to(dtype),
        torch.randint(teachers, (pairs,)),
        torch.randint(students, (pairs,)),
    )


def by_scipy(case: Case) -> np.ndarray:
    z, weight, teacher_z, teacher_weight, center, teacher_rows, student_rows = (t.double().numpy() for t in case[:7])
    teacher_rows, student_rows = teacher_rows.astype(int), student_rows.astype(int)
    target = softmax((teacher_z @ teacher_weight.T - center) / case.teacher_temp, axis=-1)
    log_prediction = log_softmax(z @ weight.T / case.student_temp, axis=-1)
    return -np.einsum("pk,pk->p", target[teacher_rows], log_prediction[student_rows])


@pytest.mark.parametrize(
    ("students", "teachers", "width", "prototypes", "pairs"), [(9, 5, 16, 31, 40), (1, 1, 1, 1, 1), (7, 3, 13, 1000, 9)]
)
def test_equals_scipy(students: int, teachers: int, width: int, prototypes: int, pairs: int) -> None:
    case = make_case(students, teachers, width, prototypes, pairs)
    np.testing.assert_allclose(ops.linear_dino_loss(*case).numpy(), by_scipy(case), rtol=1e-12, atol=1e-12)


def test_equals_dino_loss_of_the_stored_logits() -> None:
    case = make_case(9, 5, 16, 31, 20)
    stored = ops.dino_loss(case.student_z @ case.student_W.T, case.teacher_z @ case.teacher_W.T, *case[4:])
    torch.testing.assert_close(ops.linear_dino_loss(*case), stored, rtol=1e-12, atol=0)


def test_float32() -> None:
    case = make_case(9, 5, 16, 31, 40, torch.float32)
    loss = ops.linear_dino_loss(*case)
    truth = torch.from_numpy(by_scipy(case))
    assert loss.dtype == torch.float32
    assert (loss - truth).norm() <= 2e-6 * truth.norm()


def test_bfloat16_keeps_the_softmax_in_float32() -> None:
    """Only the logits are rounded to bfloat16: 2^-9 of 1 at a temperature of 0.04 moves no loss by a hundredth."""
    case = make_case(40, 20, 64, 512, 60, torch.bfloat16)
    loss = ops.linear_dino_loss(*case)
    truth = torch.from_numpy(by_scipy(case))
    assert loss.dtype == torch.float32
    assert (loss - truth).norm() <= 5e-3 * truth.norm()


def test_gradient_reaches_the_student_alone() -> None:
    case = make_case(4, 3, 8, 10, 6)
    leaves = [tensor.clone().requires_grad_() for tensor in case[:5]]
    ops.linear_dino_loss(*leaves, *case[5:]).sum().backward()
    has_gradient = [leaf.grad is not None and leaf.grad.abs().sum().item() > 0 for leaf in leaves]
    assert has_gradient == [True, True, False, False, False]


def test_no_pairs_is_a_finite_zero_with_a_gradient() -> None:
    case = make_case(4, 3, 8, 10, 0)
    z, weight = case.student_z.clone().requires_grad_(), case.student_W.clone().requires_grad_()
    loss = ops.linear_dino_loss(z, weight, *case[2:])
    assert loss.shape == (0,)
    loss.sum().backward()
    assert z.grad is not None
    assert weight.grad is not None
    assert z.grad.count_nonzero() == weight.grad.count_nonzero() == 0


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(ops.linear_dino_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for pairs in (5, 12):
        case = make_case(6, 4, 8, 33, pairs)
        np.testing.assert_allclose(compiled(*case).numpy(), by_scipy(case), rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_z": torch.zeros(3, 9)}, "student_z"),
        ({"teacher_W": torch.zeros(10)}, "teacher_W"),
        ({"teacher_W": torch.zeros(11, 8)}, "the teacher 11"),
        ({"center": torch.zeros(1, 10)}, "the centre"),
        ({"teacher_rows": torch.zeros(6)}, "rows must be int64"),
        ({"teacher_rows": torch.zeros(5, dtype=torch.int64)}, r"must be \[P\]"),
        ({"student_temp": 0.0}, "temperatures must be positive"),
        ({"backend": "triton"}, "no triton implementation"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = make_case(4, 3, 8, 10, 6)._asdict() | change
    with pytest.raises(ValueError, match=message):
        ops.linear_dino_loss(**arguments)
