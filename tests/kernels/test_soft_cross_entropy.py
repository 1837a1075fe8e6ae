"""soft_cross_entropy against hand-computed values, scipy in float64, and torch's cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from torch import Tensor

from muse_fast.kernels import reference, soft_cross_entropy
from muse_fast.ops import backends
from tests.support.agreement import FLOOR, GRADIENT_CAP, LOSS_CAP, assert_as_exact_as_eager

pytestmark = pytest.mark.usefixtures("deterministic")

needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels; on the CPU they are interpreted

BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


class Case(NamedTuple):
    student_logits: Tensor
    target: Tensor
    temp: float = 0.1


def make_case(*shape: int, dtype: torch.dtype = torch.float64, device: str = DEVICE) -> Case:
    """Logits like those of normalised features; targets like the sum of two teachers' probabilities."""
    student = torch.rand(shape, dtype=torch.float64) * 2 - 1
    teachers = torch.rand((2, *shape), dtype=torch.float64) * 2 - 1
    target = (teachers / 0.04).softmax(dim=-1).sum(dim=0)
    return Case(student.to(device, dtype), target.to(device, dtype))


def loss_and_gradient(case: Case, op: Callable[..., Tensor], **options: str) -> tuple[Tensor, Tensor]:
    """Return the loss, and the gradient of its sum with weights 0.5 to 1.5."""
    student = case.student_logits.detach().clone().requires_grad_()
    loss = op(student, *case[1:], **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    loss.backward(weights.view(loss.shape))
    assert student.grad is not None
    assert student.grad.dtype == case.student_logits.dtype
    return loss.detach(), student.grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_hand_computed_values(backend: str) -> None:
    """Student (1/5, 4/5); targets (3/4, 1/4), twice that, and zero."""
    student = 0.1 * torch.tensor([math.log(1), math.log(4)], device=DEVICE).expand(3, 2)
    target = torch.tensor([[0.75, 0.25], [1.5, 0.5], [0.0, 0.0]], device=DEVICE)
    once = -0.75 * math.log(1 / 5) - 0.25 * math.log(4 / 5)
    loss = soft_cross_entropy(student, target, 0.1, backend=backend)
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx([once, 2 * once, 0], rel=1e-5)


@pytest.mark.parametrize("shape", [(9, 31), (1, 1), (3, 2), (17, 1000)], ids=str)
def test_reference_equals_scipy(shape: tuple[int, int]) -> None:
    student, target, temp = make_case(*shape, device="cpu")
    truth = -(target.numpy() * log_softmax(student.numpy() / temp, axis=-1)).sum(axis=-1)
    loss = soft_cross_entropy(student, target, temp)
    torch.testing.assert_close(loss, torch.from_numpy(truth), rtol=1e-12, atol=1e-12)


def test_reference_passes_gradcheck() -> None:
    student, target, temp = make_case(4, 5, device="cpu")
    torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, target, temp), student.requires_grad_())


SIZES = {
    "one": (1, 1),
    "two_columns": (3, 2),
    "prime": (7, 31),
    "odd": (5, 999),
    "two_blocks": (3, 2500),
    "three_dimensions": (2, 3, 129),
}


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", SIZES)
def test_triton_is_as_exact_as_eager(size: str, dtype: torch.dtype) -> None:
    case = make_case(*SIZES[size], dtype=dtype)
    exact = Case(case.student_logits.double(), case.target.double())
    truth_loss, truth_gradient = loss_and_gradient(exact, reference.soft_cross_entropy)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter truncates where a GPU rounds
        truth_gradient = (truth_gradient.float().view(torch.int32) & -0x10000).view(torch.float32).double()
    assert_as_exact_as_eager(
        loss_and_gradient(case, soft_cross_entropy, backend="triton"),
        loss_and_gradient(case, reference.soft_cross_entropy),
        (truth_loss, truth_gradient),
        (LOSS_CAP[dtype], GRADIENT_CAP[dtype]),
        FLOOR[dtype],
    )


@needs_triton
def test_target_may_have_another_dtype() -> None:
    """As in DINOv2: 16-bit students, float32 teachers."""
    student, target, temp = make_case(5, 40, dtype=torch.float32)
    student = student.bfloat16()
    truth = reference.soft_cross_entropy(student.double(), target.double(), temp)
    loss = soft_cross_entropy(student, target, temp, backend="triton")
    assert (loss - truth).norm() <= 2e-6 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rising_logits(backend: str) -> None:
    """A row with a larger entry in every block, and one whose largest entry comes first."""
    rising = torch.linspace(-1, 1, 5000, device=DEVICE)
    student = torch.stack([rising, rising.flip(0)])
    target = (torch.stack([rising.flip(0), rising.flip(0)]) / 0.04).softmax(dim=-1)
    truth = reference.soft_cross_entropy(student.double(), target.double(), 0.1)
    loss = soft_cross_entropy(student, target, 0.1, backend=backend)
    assert (loss - truth).norm() <= 2e-6 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shift_of_all_logits_changes_nothing(backend: str) -> None:
    """Shifted by 2^13 = 8192, which is exact in float32 for logits on a grid of 2^-9."""
    student, target, temp = make_case(4, 100, dtype=torch.float32)
    student = (student * 512).round() / 512
    expected = soft_cross_entropy(student, target, temp, backend=backend)
    assert torch.equal(soft_cross_entropy(student + 8192, target, temp, backend=backend), expected)


@needs_triton
def test_triton_is_deterministic_and_accepts_strided_inputs() -> None:
    case = make_case(6, 300, dtype=torch.float32)
    first = loss_and_gradient(case, soft_cross_entropy, backend="triton")
    apart = case._replace(
        student_logits=torch.stack([case.student_logits, case.student_logits], 1)[:, 0],
        target=case.target.T.contiguous().T,
    )
    second = loss_and_gradient(apart, soft_cross_entropy, backend="triton")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    student = torch.empty(shape, device=DEVICE, requires_grad=True)
    loss = soft_cross_entropy(student, torch.empty(shape, device=DEVICE), 0.1, backend=backend)
    assert loss.shape == shape[:-1]
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_without_leading_dimensions(backend: str) -> None:
    student, target, temp = make_case(31, dtype=torch.float32)
    loss = soft_cross_entropy(student, target, temp, backend=backend)
    assert loss.item() == pytest.approx(F.cross_entropy(student / temp, target).item(), rel=1e-5)


def test_many_rows() -> None:
    """More than 65,535, the maximum of CUDA's second grid dimension."""
    case = make_case(65_536, 4, dtype=torch.float32)
    exact = Case(case.student_logits.double(), case.target.double())
    pairs = zip(loss_and_gradient(case, soft_cross_entropy), loss_and_gradient(exact, soft_cross_entropy), strict=True)
    for got, truth in pairs:
        assert (got - truth).norm() <= 2e-6 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_flows_only_to_the_student(backend: str) -> None:
    case = make_case(4, 10, dtype=torch.float32)
    student, target = (tensor.clone().requires_grad_() for tensor in case[:2])
    soft_cross_entropy(student, target, case.temp, backend=backend).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert target.grad is None


@needs_triton
def test_triton_opcheck() -> None:
    from muse_fast.kernels.fused.soft_cross_entropy import soft_cross_entropy_bwd, soft_cross_entropy_fwd

    case = make_case(6, 40, dtype=torch.float32)
    torch.library.opcheck(soft_cross_entropy_fwd, (case.student_logits.clone().requires_grad_(), *case[1:]))
    _, stats = soft_cross_entropy_fwd(*case)
    strided_gradient = torch.ones(1, device=DEVICE).expand(6)
    torch.library.opcheck(soft_cross_entropy_bwd, (strided_gradient, *case[:2], stats, case.temp))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend: str, dynamic: bool) -> None:
    def step(*arguments: Any) -> Tensor:
        return soft_cross_entropy(*arguments, backend=backend).mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7):
        case = make_case(rows, 40, dtype=torch.float32)
        gradients = []
        for function in (step, compiled):
            student = case.student_logits.clone().requires_grad_()
            function(student, *case[1:]).backward()
            gradients.append(student.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(3, 4)}, r"\(3, 5\) and \(3, 4\)"),
        ({"student_logits": torch.zeros(()), "target": torch.zeros(())}, r"student_logits \[..., K\]"),
        ({"student_logits": torch.zeros(3, 0), "target": torch.zeros(3, 0)}, "K >= 1"),
        ({"target": torch.zeros(3, 5, dtype=torch.int64)}, "must be floating point"),
        ({"target": torch.zeros(3, 5, device="meta")}, "on one device, got cpu, meta"),
        ({"temp": 0.0}, "temp must be positive, got 0.0"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; expected torch or triton"),
        ({"backend": "triton"}, "computes in float32"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = make_case(3, 5, device="cpu")._asdict() | change
    with pytest.raises(ValueError, match=message) as raised:
        soft_cross_entropy(**arguments)
    assert str(raised.value).startswith("soft_cross_entropy: ")
