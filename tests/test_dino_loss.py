"""dino_loss against values worked by hand, torch's soft-target cross-entropy in float64, and DINO's published loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast import ops
from muse_fast.ops import backends, reference

pytestmark = pytest.mark.usefixtures("deterministic")


needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the Triton kernels run: on the CPU, interpreted


class Case(NamedTuple):
    student_logits: Tensor
    teacher_logits: Tensor
    center: Tensor
    teacher_rows: Tensor
    student_rows: Tensor
    student_temp: float = 0.1
    teacher_temp: float = 0.04


def make_case(students: int, teachers: int, prototypes: int, pairs: int, dtype: torch.dtype = torch.float64) -> Case:
    """Logits like those of normalised features: cosines in [-1, 1]."""
    return Case(
        (torch.rand(students, prototypes, dtype=torch.float64) * 2 - 1).to(dtype),
        (torch.rand(teachers, prototypes, dtype=torch.float64) * 2 - 1).to(dtype),
        (torch.randn(prototypes, dtype=torch.float64) * 0.1).to(dtype),
        torch.randint(teachers, (pairs,)),
        torch.randint(students, (pairs,)),
    )


def by_cross_entropy(case: Case) -> Tensor:
    """Float64, pair by pair, through torch's cross-entropy with probabilities as targets."""
    student, teacher, center = (tensor.double() for tensor in case[:3])
    losses = [
        F.cross_entropy(student[i] / case.student_temp, ((teacher[j] - center) / case.teacher_temp).softmax(0))
        for j, i in zip(case.teacher_rows.tolist(), case.student_rows.tolist(), strict=True)
    ]
    return torch.stack(losses)


def test_worked_by_hand() -> None:
    """Teacher (3/4, 1/4) after centring and sharpening, student (1/5, 4/5): -3/4 ln 1/5 - 1/4 ln 4/5."""
    student = 0.1 * torch.tensor([[0.0, 0.0], [math.log(1), math.log(4)]])
    center = torch.tensor([7.0, -2.0])
    teacher = 0.04 * torch.tensor([[math.log(3), math.log(1)]]) + center
    loss = ops.dino_loss(student, teacher, center, torch.tensor([0, 0]), torch.tensor([1, 0]), 0.1, 0.04)
    expected = [-0.75 * math.log(1 / 5) - 0.25 * math.log(4 / 5), math.log(2)]
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("students", "teachers", "prototypes", "pairs"), [(9, 5, 31, 40), (1, 1, 1, 1), (1, 1, 2, 3), (17, 4, 1000, 17)]
)
def test_equals_cross_entropy(students: int, teachers: int, prototypes: int, pairs: int) -> None:
    case = make_case(students, teachers, prototypes, pairs)
    torch.testing.assert_close(ops.dino_loss(*case), by_cross_entropy(case), rtol=1e-12, atol=1e-12)


def test_equals_the_published_loss() -> None:
    """DINOLoss.forward of https://github.com/facebookresearch/dino/blob/main/main_dino.py: for two global views and
    ``ncrops`` student views of B images, the mean over (global, other view) of the mean over images."""
    images, crops, prototypes = 3, 5, 64
    case = make_case(crops * images, 2 * images, prototypes, 1)
    chunks = (case.student_logits / 0.1).chunk(crops)
    targets = F.softmax((case.teacher_logits - case.center) / 0.04, dim=-1).chunk(2)
    terms = [
        torch.sum(-target * F.log_softmax(chunks[view], dim=-1), dim=-1).mean()
        for g, target in enumerate(targets)
        for view in range(crops)
        if view != g
    ]
    pairs = [(g * images + b, v * images + b) for g in range(2) for v in range(crops) if v != g for b in range(images)]
    teacher_rows, student_rows = torch.tensor(pairs).unbind(1)
    loss = ops.dino_loss(*case._replace(teacher_rows=teacher_rows, student_rows=student_rows)).mean()
    assert loss.item() == pytest.approx(sum(term.item() for term in terms) / len(terms), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_precision_is_that_of_float32_on_the_rounded_logits(dtype: torch.dtype) -> None:
    case = make_case(20, 10, 1000, 30, dtype)
    loss = ops.dino_loss(*case)
    truth = by_cross_entropy(case)
    assert loss.dtype == torch.float32
    assert (loss - truth).norm() <= 2e-6 * truth.norm()


def test_a_shift_of_all_logits_changes_nothing() -> None:
    """Shifted by 2^13 = 8192, which float32 holds exactly for logits on a grid of 2^-9."""
    case = make_case(8, 6, 100, 20, torch.float32)
    student, teacher, center = ((tensor * 512).round() / 512 for tensor in case[:3])
    expected = ops.dino_loss(student, teacher, center, *case[3:])
    assert torch.equal(ops.dino_loss(student + 8192, teacher + 8192, center, *case[3:]), expected)


def test_gradient_reaches_the_student_alone() -> None:
    case = make_case(4, 3, 10, 6)
    student, teacher, center = (tensor.clone().requires_grad_() for tensor in case[:3])
    ops.dino_loss(student, teacher, center, *case[3:]).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert center.grad is None


@pytest.mark.parametrize("students", [0, 5])
def test_no_pairs_is_a_finite_zero_with_a_gradient(students: int) -> None:
    rows = torch.empty(0, dtype=torch.int64)
    student = torch.randn(students, 7, requires_grad=True)
    loss = ops.dino_loss(student, torch.randn(students, 7), torch.zeros(7), rows, rows, 0.1, 0.04)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.count_nonzero() == 0


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(ops.dino_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for pairs in (5, 12):
        case = make_case(6, 4, 33, pairs)
        torch.testing.assert_close(compiled(*case), by_cross_entropy(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits": torch.zeros(4)}, r"student_logits \[Ns, K\]"),
        ({"center": torch.zeros(4)}, "the centre 4"),
        ({"teacher_logits": torch.zeros(2, 4)}, "the teacher 4"),
        ({"student_rows": torch.zeros(2)}, "rows must be int64"),
        ({"student_rows": torch.zeros(3, dtype=torch.int64)}, r"must be \[P\]"),
        ({"student_temp": 0.0}, "temperatures must be positive"),
        ({"teacher_temp": -1.0}, "temperatures must be positive"),
        ({"backend": "cpp"}, "no cpp implementation"),
        ({"center": torch.zeros(5, device="meta")}, "on one device, got cpu, meta"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = make_case(3, 2, 5, 2)._asdict() | change
    with pytest.raises(ValueError, match=message):
        ops.dino_loss(**arguments)


def loss_and_gradient(case: Case, op: Callable[..., Tensor], **options: str) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its sum with pair weights 0.5 to 1.5, on the CPU in float64."""
    student = case.student_logits.detach().clone().requires_grad_()
    loss = op(student, *case[1:], **options)
    loss.backward(torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=loss.device))
    assert student.grad is not None
    assert student.grad.dtype == case.student_logits.dtype
    return loss.detach().double().cpu(), student.grad.double().cpu()


def on_device(case: Case) -> Case:
    return Case(*(item.to(DEVICE) if isinstance(item, Tensor) else item for item in case))


TRITON_SIZES = {
    "one": (1, 1, 1, 1),
    "two_prototypes": (3, 2, 2, 4),
    "prime": (5, 3, 31, 9),
    "odd": (6, 4, 1000, 11),
    "two_blocks": (3, 2, 2500, 5),
    "rows_without_a_pair": (9, 7, 129, 2),
}


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", TRITON_SIZES)
def test_triton_is_as_exact_as_eager(size: str, dtype: torch.dtype) -> None:
    """At most 1.5 times eager's own distance from float64, plus a floor that a 1 % error exceeds by far."""
    case = on_device(make_case(*TRITON_SIZES[size], dtype))
    exact = case._replace(**{name: getattr(case, name).double() for name in Case._fields[:3]})
    truths = loss_and_gradient(exact, reference.dino_loss)
    eagers = loss_and_gradient(case, reference.dino_loss)
    fused = loss_and_gradient(case, ops.dino_loss, backend="triton")
    rounded = truths
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter cuts digits off where a GPU rounds
        rounded = truths[0], (truths[1].float().view(torch.int32) & -0x10000).view(torch.float32).double()
    for truth, eager, got, goal in zip(truths, eagers, fused, rounded, strict=True):
        assert (got - goal).norm() <= 1.5 * (eager - truth).norm() + 1e-6 * truth.norm()


@needs_triton
def test_triton_takes_a_shift_of_all_logits() -> None:
    case = on_device(make_case(4, 3, 100, 8, torch.float32))
    student, teacher, center = ((tensor * 512).round() / 512 for tensor in case[:3])
    expected = ops.dino_loss(student, teacher, center, *case[3:], backend="triton")
    shifted = ops.dino_loss(student + 8192, teacher + 8192, center, *case[3:], backend="triton")
    assert torch.equal(shifted, expected)


@needs_triton
def test_triton_twice_is_bit_equal_and_takes_strided_inputs() -> None:
    case = on_device(make_case(6, 4, 300, 20, torch.float32))
    first = loss_and_gradient(case, ops.dino_loss, backend="triton")
    apart = case._replace(
        student_logits=torch.stack([case.student_logits, case.student_logits], 1)[:, 0],
        teacher_logits=case.teacher_logits.T.contiguous().T,
        teacher_rows=torch.stack([case.teacher_rows, case.teacher_rows], 1)[:, 0],
    )
    second = loss_and_gradient(apart, ops.dino_loss, backend="triton")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@needs_triton
@pytest.mark.parametrize("students", [0, 5])
def test_triton_without_pairs(students: int) -> None:
    rows = torch.empty(0, dtype=torch.int64, device=DEVICE)
    student = torch.randn(students, 7, requires_grad=True, device=DEVICE)
    teacher, center = torch.randn(students, 7, device=DEVICE), torch.zeros(7, device=DEVICE)
    loss = ops.dino_loss(student, teacher, center, rows, rows, 0.1, 0.04, backend="triton")
    assert loss.shape == (0,)
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.count_nonzero() == 0


@needs_triton
def test_triton_opcheck() -> None:
    from muse_fast.kernels import dino_loss as fused

    case = on_device(make_case(4, 3, 40, 6, torch.float32))
    torch.library.opcheck(fused.dino_loss_fwd, (case.student_logits.clone().requires_grad_(), *case[1:]))
    _, *stats = fused.dino_loss_fwd(*case)
    strided_gradient = torch.ones(1, device=DEVICE).expand(6)
    torch.library.opcheck(fused.dino_loss_bwd, (strided_gradient, *case[:3], *stats, *case[3:]))


@needs_triton
def test_triton_compiles_without_a_graph_break() -> None:
    def step(*arguments: Any) -> Tensor:
        return ops.dino_loss(*arguments, backend="triton").mean()

    case = on_device(make_case(4, 3, 40, 6, torch.float32))
    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        student = case.student_logits.clone().requires_grad_()
        function(student, *case[1:]).backward()
        gradients.append(student.grad)
    assert torch.equal(*gradients)
