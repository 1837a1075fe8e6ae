"""dino_loss against hand-computed values, torch's soft-target cross-entropy in float64, and DINO's published loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast import ops
from muse_fast.ops import backends
from tests.support.agreement import FLOOR, GRADIENT_CAP, LOSS_CAP, assert_as_exact_as_eager

pytestmark = pytest.mark.usefixtures("deterministic")

needs_library = pytest.mark.skipif(backends.library_error() is not None, reason=str(backends.library_error()))
needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
FAST = [pytest.param("cpp", marks=needs_library), pytest.param("triton", marks=needs_triton)]
every_backend = pytest.mark.parametrize("backend", ["reference", *FAST])
fast_backends = pytest.mark.parametrize("backend", FAST)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INTERPRETED = not torch.cuda.is_available()  # whether Triton's interpreter runs the kernels


class Case(NamedTuple):
    student_logits: Tensor
    teacher_logits: Tensor
    center: Tensor
    teacher_rows: Tensor
    student_rows: Tensor
    student_temp: float = 0.1
    teacher_temp: float = 0.04


def make_case(
    students: int, teachers: int, prototypes: int, pairs: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Case:
    """Logits like those of normalised features: cosines in [-1, 1]."""
    tensors = (
        (torch.rand(students, prototypes, dtype=torch.float64) * 2 - 1).to(dtype),
        (torch.rand(teachers, prototypes, dtype=torch.float64) * 2 - 1).to(dtype),
        (torch.randn(prototypes, dtype=torch.float64) * 0.1).to(dtype),
        torch.randint(teachers, (pairs,)),
        torch.randint(students, (pairs,)),
    )
    return Case(*(tensor.to(device) for tensor in tensors))


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def loss_and_gradient(case: Case, backend: str, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the loss, and the gradient of its sum with pair weights 0.5 to 1.5."""
    student = case.student_logits.detach().requires_grad_()
    loss = ops.dino_loss(student, *case[1:], backend=backend)
    if weights is None:
        weights = torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=loss.device)
    loss.backward(weights)
    assert student.grad is not None
    assert student.grad.dtype == student.dtype
    return loss.detach(), student.grad


def assert_exact(case: Case, backend: str) -> None:
    """Assert that a backend is as exact as eager PyTorch on the same inputs, with float64 as the truth."""
    dtype = case.student_logits.dtype
    truth = loss_and_gradient(Case(*(tensor.double() for tensor in case[:3]), *case[3:]), "reference")
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:  # it truncates where a GPU rounds
        truth = truth[0], (truth[1].float().view(torch.int32) & -0x10000).view(torch.float32)
    got, eager = loss_and_gradient(case, backend), loss_and_gradient(case, "reference")
    assert_as_exact_as_eager(got, eager, truth, (LOSS_CAP[dtype], GRADIENT_CAP[dtype]), FLOOR[dtype])


def by_cross_entropy(case: Case) -> Tensor:
    """Compute the loss in float64, pair by pair, with torch's cross-entropy for probabilities as targets."""
    student, teacher, center = (tensor.double() for tensor in case[:3])
    losses = [
        F.cross_entropy(student[i] / case.student_temp, ((teacher[j] - center) / case.teacher_temp).softmax(0))
        for j, i in zip(case.teacher_rows.tolist(), case.student_rows.tolist(), strict=True)
    ]
    return torch.stack(losses)


@every_backend
def test_equals_hand_computed_values(backend: str) -> None:
    """Teacher (3/4, 1/4) after centring and sharpening, student (1/5, 4/5): -3/4 ln 1/5 - 1/4 ln 4/5."""
    student = 0.1 * torch.tensor([[0.0, 0.0], [math.log(1), math.log(4)]])
    center = torch.tensor([7.0, -2.0])
    teacher = 0.04 * torch.tensor([[math.log(3), math.log(1)]]) + center
    arguments = (student, teacher, center, torch.tensor([0, 0]), torch.tensor([1, 0]))
    loss = ops.dino_loss(*(tensor.to(device_of(backend)) for tensor in arguments), 0.1, 0.04, backend=backend)
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


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_computes_in_float32_on_rounded_logits(dtype: str, backend: str) -> None:
    case = make_case(20, 10, 1000, 30, DTYPES[dtype], device_of(backend))
    loss = ops.dino_loss(*case, backend=backend)
    truth = by_cross_entropy(case)
    assert loss.dtype == torch.float32
    assert (loss - truth).norm() <= 2e-6 * truth.norm()


SIZES = {
    "one": (1, 1, 1, 1),
    "two_prototypes": (3, 2, 2, 4),
    "prime": (5, 3, 31, 9),
    "odd": (6, 4, 1000, 11),
    "one_block": (2, 2, 2048, 3),
    "two_blocks": (3, 2, 2500, 5),
    "32_blocks": (2, 1, 65536, 2),
    "rows_without_a_pair": (9, 7, 129, 2),
}


@fast_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_is_as_exact_as_eager(size: str, dtype: str, backend: str) -> None:
    assert_exact(make_case(*SIZES[size], DTYPES[dtype], device_of(backend)), backend)


@fast_backends
def test_many_rows(backend: str) -> None:
    """65,536 rows for each of four views."""
    if backend == "triton" and INTERPRETED:
        pytest.skip("Triton's interpreter needs a millisecond per pair")
    rows = 4 * 65536
    assert_exact(make_case(rows, rows, 3, rows, torch.float32, device_of(backend)), backend)


@fast_backends
@pytest.mark.parametrize("teacher", ["one_hot", "uniform", "half_switched_off"])
def test_extreme_teachers(teacher: str, backend: str) -> None:
    case = make_case(5, 3, 5000, 9, torch.float32, device_of(backend))
    case.center.zero_()
    if teacher == "half_switched_off":
        case.teacher_logits[:, :2500] = -math.inf
    else:
        case.teacher_logits.fill_(-7)
    if teacher == "one_hot":
        case.teacher_logits[:, 4321] = 7
    assert_exact(case, backend)


@fast_backends
@pytest.mark.parametrize("span", [30, 1e4])
def test_wide_logits(span: float, backend: str) -> None:
    """Differences whose exponentials underflow to zero and overflow float32."""
    case = make_case(5, 3, 3000, 9, torch.float32, device_of(backend))
    assert_exact(case._replace(student_logits=case.student_logits * span), backend)
    assert_exact(case._replace(teacher_logits=case.teacher_logits * span, center=case.center * 0), backend)


@every_backend
def test_a_shift_of_all_logits_changes_nothing(backend: str) -> None:
    """Shifted by 10,000, which is exact in float32 for logits on a grid of 2^-9."""
    case = make_case(8, 6, 100, 20, torch.float32, device_of(backend))
    student, teacher, center = ((tensor * 512).round() / 512 for tensor in case[:3])
    expected = ops.dino_loss(student, teacher, center, *case[3:], backend=backend)
    shifted = ops.dino_loss(student + 10000, teacher + 10000, center, *case[3:], backend=backend)
    assert torch.equal(shifted, expected)


@every_backend
def test_padding_yields_zeros(backend: str) -> None:
    """Pairs without a teacher or student row do not affect the others, whatever their output gradients are."""
    case = make_case(6, 4, 50, 9, torch.float32, device_of(backend))
    case.teacher_rows[[0, 4]] = -1
    case.student_rows[[4, 8]] = -3
    padding = (case.teacher_rows < 0) | (case.student_rows < 0)
    weights = torch.linspace(0.5, 1.5, 9, device=padding.device).masked_fill(padding, math.nan)
    loss, gradient = loss_and_gradient(case, backend, weights)
    assert loss[padding].tolist() == [0.0] * 3

    full = case._replace(teacher_rows=case.teacher_rows[~padding], student_rows=case.student_rows[~padding])
    expected, expected_gradient = loss_and_gradient(full, backend, weights[~padding])
    assert torch.equal(loss[~padding], expected)
    assert torch.equal(gradient, expected_gradient)


@every_backend
@pytest.mark.parametrize(("students", "teachers"), [(5, 5), (5, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("pairs", [0, 3])
def test_only_padding_is_a_finite_zero_with_a_gradient(pairs: int, students: int, teachers: int, backend: str) -> None:
    rows = torch.full((pairs,), -1, device=device_of(backend))
    student, teacher = (torch.randn(count, 7, device=rows.device) for count in (students, teachers))
    case = Case(student, teacher, torch.zeros(7, device=rows.device), rows, rows)
    loss, gradient = loss_and_gradient(case, backend)
    assert loss.tolist() == [0.0] * pairs
    assert gradient.shape == student.shape
    assert gradient.count_nonzero() == 0


@every_backend
def test_gradient_flows_only_to_the_student(backend: str) -> None:
    case = make_case(4, 3, 10, 6, torch.float32, device_of(backend))
    student, teacher, center = (tensor.clone().requires_grad_() for tensor in case[:3])
    ops.dino_loss(student, teacher, center, *case[3:], backend=backend).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert center.grad is None


@fast_backends
def test_dtypes_may_differ(backend: str) -> None:
    """Converting to float32 is exact, so only the gradient is rounded."""
    case = make_case(5, 3, 300, 9, torch.float32, device_of(backend))
    student, center = case.student_logits.half(), case.center.bfloat16()
    mixed = loss_and_gradient(case._replace(student_logits=student, center=center), backend)
    wide = loss_and_gradient(case._replace(student_logits=student.float(), center=center.double()), backend)
    assert torch.equal(mixed[0], wide[0])
    assert torch.equal(mixed[1], wide[1].half())


@fast_backends
def test_is_deterministic_and_accepts_strided_inputs(backend: str) -> None:
    case = make_case(6, 4, 300, 20, torch.float32, device_of(backend))
    case = case._replace(teacher_logits=case.teacher_logits[:1].expand(4, -1))
    weights = torch.ones(20, device=case.center.device)
    apart = Case(
        student_logits=torch.stack([case.student_logits, case.student_logits], 1)[:, 0],
        teacher_logits=case.teacher_logits.T.contiguous().T,
        center=torch.stack([case.center, case.center], 1)[:, 0],
        teacher_rows=torch.stack([case.teacher_rows, case.teacher_rows], 1)[:, 0],
        student_rows=torch.stack([case.student_rows, case.student_rows], 1)[:, 0],
    )
    expected = loss_and_gradient(case, backend, weights)
    for strided in (case, apart):
        got = loss_and_gradient(strided, backend, weights[:1].expand(20))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("size", [(24, 20, 5000, 70), (3000, 1, 31, 3000), (1, 3, 65536, 5)])
def test_cpp_is_bit_identical_with_one_thread_and_two(size: tuple[int, int, int, int]) -> None:
    case = make_case(*size, torch.float32)
    one = loss_and_gradient(case, "cpp")
    with threads(2):
        two = loss_and_gradient(case, "cpp")
    assert torch.equal(two[0], one[0])
    assert torch.equal(two[1], one[1])


@needs_library
def test_cpp_stores_no_softmax_and_copies_no_rows() -> None:
    case = make_case(32, 16, 4096, 48, torch.float32)
    apart = case._replace(student_logits=torch.stack([case.student_logits, case.student_logits], 1)[:, 0])
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        _, gradient = loss_and_gradient(apart, "cpp")
    events = profile.kineto_results.events()
    allocated = sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")
    assert gradient.nbytes <= allocated <= gradient.nbytes + 4096


@needs_library
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("rows", ["teacher_rows", "student_rows"])
def test_rows_out_of_range_are_errors(rows: str, backend: str) -> None:
    case = make_case(3, 2, 5, 4, torch.float32)
    getattr(case, rows)[2] = 3
    message = f"dino_loss: {rows} must be below" if backend == "cpp" else None
    with pytest.raises((IndexError, RuntimeError), match=message):
        ops.dino_loss(*case, backend=backend)


def ops_of(backend: str) -> tuple[Any, Any]:
    if backend == "cpp":
        return torch.ops.muse_fast.dino_loss_fwd.default, torch.ops.muse_fast.dino_loss_bwd.default
    from muse_fast.kernels.fused.dino_loss import dino_loss_bwd, dino_loss_fwd

    return dino_loss_fwd, dino_loss_bwd


@fast_backends
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_opcheck(dtype: str, backend: str) -> None:
    forward, backward = ops_of(backend)
    case = make_case(4, 3, 40, 6, DTYPES[dtype], device_of(backend))
    case.student_rows[1] = -1
    for student in (case.student_logits, torch.stack([case.student_logits, case.student_logits], 1)[:, 0]):
        torch.library.opcheck(forward, (student.detach().requires_grad_(), *case[1:]))
        _, *stats = forward(*case)
        strided_gradient = torch.ones(1, device=student.device).expand(6)
        torch.library.opcheck(backward, (strided_gradient, student.detach(), *case[1:3], *stats, *case[3:]))


@every_backend
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool, backend: str) -> None:
    def step(*arguments: Any) -> Tensor:
        return ops.dino_loss(*arguments, backend=backend).mean()

    torch.compiler.reset()  # the number of recompilations is limited
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for pairs in (5, 12):
        case = make_case(6, 4, 33, pairs, torch.float32, device_of(backend))
        gradients = []
        for function in (step, compiled):
            student = case.student_logits.clone().requires_grad_()
            function(student, *case[1:]).backward()
            gradients.append(student.grad)
        assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits": torch.zeros(4)}, r"student_logits \[Ns, K\]"),
        ({"center": torch.zeros(4)}, "the centre 4"),
        (
            {name: torch.zeros(2, 0) for name in ("student_logits", "teacher_logits")} | {"center": torch.zeros(0)},
            "at least 1; the student has 0",
        ),
        ({"teacher_logits": torch.zeros(2, 4)}, "the teacher 4"),
        ({"student_rows": torch.zeros(2)}, "rows must be int64"),
        ({"student_rows": torch.zeros(3, dtype=torch.int64)}, r"must be \[P\]"),
        ({"student_temp": 0.0}, "temperatures must be positive"),
        ({"teacher_temp": -1.0}, "temperatures must be positive"),
        ({"backend": "cuda"}, "no cuda implementation"),
        ({"backend": "cpp"}, "computes in float32"),
        ({"center": torch.zeros(5, device="meta")}, "on one device, got cpu, meta"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = make_case(3, 2, 5, 2)._asdict() | change
    with pytest.raises(ValueError, match=message):
        ops.dino_loss(**arguments)
