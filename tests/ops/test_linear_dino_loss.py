"""linear_dino_loss against scipy in float64 and, with its gradients, against eager PyTorch's distance from float64."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from muse_fast import ops
from muse_fast.ops import backends
from tests.support.agreement import FLOOR, GRADIENT_CAP, LOSS_CAP, assert_as_exact_as_eager

pytestmark = pytest.mark.usefixtures("deterministic")

needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
FAST = ["blocked", pytest.param("triton", marks=needs_triton)]
every_backend = pytest.mark.parametrize("backend", ["reference", *FAST])
fast_backends = pytest.mark.parametrize("backend", FAST)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# On a GPU, Triton rounds probabilities to 16 bits before they weigh prototypes or rows, as flash attention does.
TENSOR_CORE_CAP = {torch.bfloat16: 5e-3, torch.float16: 7e-4}
INTERPRETED = not torch.cuda.is_available()  # whether Triton's interpreter runs the kernels


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
    students: int,
    teachers: int,
    width: int,
    prototypes: int,
    pairs: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Case:
    def unit_rows(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, dtype=torch.float64), dim=-1).to(dtype)

    tensors = (
        unit_rows(students),
        unit_rows(prototypes),
        unit_rows(teachers),
        unit_rows(prototypes),
        (torch.randn(prototypes, dtype=torch.float64) * 0.1).to(dtype),
        torch.randint(teachers, (pairs,)),
        torch.randint(students, (pairs,)),
    )
    return Case(*(tensor.to(device) for tensor in tensors))


def on_grid(case: Case) -> Case:
    """Round features to multiples of 1/64, so that their products and sums are exact in float32."""
    return Case(*((tensor * 64).round() / 64 for tensor in case[:4]), *case[4:])


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def module_of(backend: str) -> Any:
    folder = {"blocked": "muse_fast.kernels.blocked", "triton": "muse_fast.kernels.fused"}[backend]
    return importlib.import_module(f"{folder}.linear_dino_loss")


def loss_and_gradients(case: Case, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, and the gradients for z and W of its sum with pair weights 0.5 to 1.5."""
    z, weight = (tensor.detach().requires_grad_() for tensor in case[:2])
    loss = ops.linear_dino_loss(z, weight, *case[2:], backend=backend)
    loss.backward(torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=loss.device))
    assert z.grad is not None and weight.grad is not None
    assert z.grad.dtype == z.dtype and weight.grad.dtype == weight.dtype
    return loss.detach(), z.grad, weight.grad


def assert_exact(case: Case, backend: str) -> None:
    """Assert that a backend is as exact as eager PyTorch on the same inputs, with float64 as the truth."""
    dtype = case.student_z.dtype
    interpreted = backend == "triton" and INTERPRETED
    if interpreted and dtype == torch.float32:
        case = on_grid(case)  # numpy, unlike a GPU, sums the products of a transposed matrix in another order
    truth = loss_and_gradients(Case(*(tensor.double() for tensor in case[:5]), *case[5:]), "reference")
    got, eager = loss_and_gradients(case, backend), loss_and_gradients(case, "reference")
    if interpreted and dtype == torch.bfloat16:  # it truncates where a GPU rounds: take the middle of the interval
        middle = (got[2].float().view(torch.int32) | 0x8000).view(torch.float32)
        got, eager = (*got[:2], middle), (*eager[:2], eager[2].float())
    caps = (LOSS_CAP[dtype], GRADIENT_CAP[dtype], GRADIENT_CAP[dtype])
    if backend == "triton" and not interpreted and dtype in TENSOR_CORE_CAP:
        caps = (TENSOR_CORE_CAP[dtype],) * 3
    assert_as_exact_as_eager(got, eager, truth, caps, FLOOR[dtype])


def by_scipy(case: Case) -> np.ndarray:
    z, weight, teacher_z, teacher_weight, center, teacher_rows, student_rows = (t.double().numpy() for t in case[:7])
    teacher_rows, student_rows = teacher_rows.astype(int), student_rows.astype(int)
    target = softmax((teacher_z @ teacher_weight.T - center) / case.teacher_temp, axis=-1)
    log_prediction = log_softmax(z @ weight.T / case.student_temp, axis=-1)
    return -np.einsum("pk,pk->p", target[teacher_rows], log_prediction[student_rows])


# --- values


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize(
    ("students", "teachers", "width", "prototypes", "pairs"), [(9, 5, 16, 31, 40), (1, 1, 1, 1, 1), (7, 3, 13, 3000, 9)]
)
def test_equals_scipy(students: int, teachers: int, width: int, prototypes: int, pairs: int, backend: str) -> None:
    case = make_case(students, teachers, width, prototypes, pairs)
    loss = ops.linear_dino_loss(*case, backend=backend)
    np.testing.assert_allclose(loss.numpy(), by_scipy(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_equals_dino_loss_of_the_stored_logits(backend: str) -> None:
    case = make_case(9, 5, 16, 31, 20)
    stored = ops.dino_loss(case.student_z @ case.student_W.T, case.teacher_z @ case.teacher_W.T, *case[4:])
    torch.testing.assert_close(ops.linear_dino_loss(*case, backend=backend), stored, rtol=1e-12, atol=1e-12)


def test_bfloat16_keeps_the_softmax_of_the_reference_in_float32() -> None:
    """Only the logits are rounded to bfloat16: 2^-9 of 1 at a temperature of 0.04 changes no loss by a hundredth."""
    case = make_case(40, 20, 64, 512, 60, torch.bfloat16)
    loss = ops.linear_dino_loss(*case, backend="reference")
    truth = torch.from_numpy(by_scipy(case))
    assert loss.dtype == torch.float32
    assert (loss - truth).norm() <= 5e-3 * truth.norm()


SIZES = {  # students, teachers, width, prototypes, pairs
    "odd": (9, 5, 15, 131, 21),
    "wide": (5, 3, 256, 64, 9),
    "two_blocks_of_rows": (37, 34, 24, 40, 50),
    "rows_without_a_pair": (19, 17, 16, 97, 2),
    "one_pair": (1, 1, 17, 60, 1),
    "two_prototypes": (7, 4, 32, 2, 12),
}


@fast_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_as_exact_as_eager(size: str, dtype: str, backend: str) -> None:
    assert_exact(make_case(*SIZES[size], DTYPES[dtype], device_of(backend)), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_are_as_exact_as_eager(dtype: str) -> None:
    """More rows and prototypes than in a tile of the blocked backend, and not multiples of its size."""
    assert_exact(make_case(1100, 530, 16, 2500, 1300, DTYPES[dtype]), "blocked")


@needs_triton
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_splits_are_as_exact_as_eager(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs share the prototypes of a row, so the last has fewer, and summing over them needs two steps."""
    monkeypatch.setattr(module_of("triton"), "num_multiprocessors", lambda device: 11)
    assert_exact(make_case(6, 5, 16, 690 if dtype == "bf16" else 170, 9, DTYPES[dtype], device_of("triton")), "triton")


@needs_triton
def test_splits_fill_the_device() -> None:
    choose_split = module_of("triton").choose_split
    assert choose_split(4, 1024, 132) == 32  # 32 splits of 32 tiles: 128 of 132 programs
    assert choose_split(132, 1024, 132) == 1024  # enough blocks of rows
    assert choose_split(1, 3, 132) == 1  # no more splits than tiles
    for row_blocks in (1, 5, 16, 63, 79, 133, 1000):
        split = choose_split(row_blocks, 1024, 132)
        waves = -(-row_blocks * -(-1024 // split) // 132)
        assert waves * split * 132 <= 1.35 * row_blocks * 1024 + 132 * split


@fast_backends
def test_rows_and_prototypes_of_any_length(backend: str) -> None:
    """Logits are in the hundreds, the largest in the last block, so the running maximum changes."""
    prototypes = 2100 if backend == "blocked" else 150
    case = make_case(5, 4, 16, prototypes, 9, torch.float32, device_of(backend))
    lengths = torch.linspace(0.1, 20, prototypes, device=device_of(backend)).unsqueeze(1)
    case = case._replace(
        student_z=case.student_z * 3, student_W=case.student_W * lengths, teacher_W=case.teacher_W * lengths
    )
    assert_exact(on_grid(case), backend)


@fast_backends
def test_a_shift_of_the_centre_changes_nothing(backend: str) -> None:
    """Shifted by 2^9 = 512, which is exact in float32 for logits that are multiples of 2^-12."""
    case = on_grid(make_case(8, 6, 16, 100, 20, torch.float32, device_of(backend)))
    case = case._replace(center=(case.center * 64).round() / 64)
    expected = loss_and_gradients(case, backend)
    shifted = loss_and_gradients(case._replace(center=case.center + 512), backend)
    assert all(map(torch.equal, shifted, expected))


@fast_backends
def test_one_prototype_has_zero_loss_and_gradient(backend: str) -> None:
    loss, z_gradient, weight_gradient = loss_and_gradients(
        make_case(3, 2, 8, 1, 5, torch.float32, device_of(backend)), backend
    )
    for tensor in (loss, z_gradient, weight_gradient):
        assert tensor.abs().max() <= 1e-5  # sums of terms as large as 1.5 / 0.1


# --- pairs


@every_backend
def test_gradient_flows_only_to_the_student(backend: str) -> None:
    case = make_case(4, 3, 8, 10, 6, torch.float32, device_of(backend))
    leaves = [tensor.clone().requires_grad_() for tensor in case[:5]]
    ops.linear_dino_loss(*leaves, *case[5:], backend=backend).sum().backward()
    has_gradient = [leaf.grad is not None and leaf.grad.abs().sum().item() > 0 for leaf in leaves]
    assert has_gradient == [True, True, False, False, False]


@every_backend
@pytest.mark.parametrize(("students", "teachers", "pairs"), [(4, 3, 0), (0, 0, 0), (0, 3, 2), (4, 0, 2), (4, 3, 2)])
def test_only_padding_is_a_finite_zero_with_a_gradient(students: int, teachers: int, pairs: int, backend: str) -> None:
    case = make_case(max(1, students), max(1, teachers), 8, 10, pairs, torch.float32, device_of(backend))
    padding = torch.full_like(case.student_rows, -1)
    case = case._replace(
        student_z=case.student_z[:students],
        teacher_z=case.teacher_z[:teachers],
        teacher_rows=padding,
        student_rows=padding,
    )
    loss, z_gradient, weight_gradient = loss_and_gradients(case, backend)
    assert loss.shape == (pairs,)
    assert loss.count_nonzero() == z_gradient.count_nonzero() == weight_gradient.count_nonzero() == 0


@every_backend
def test_padding_changes_nothing(backend: str) -> None:
    case = make_case(6, 4, 8, 20, 7, torch.float32, device_of(backend))
    z, weight = (tensor.requires_grad_() for tensor in case[:2])
    expected = ops.linear_dino_loss(z, weight, *case[2:], backend=backend)
    expected_gradients = torch.autograd.grad(expected.sum(), (z, weight))

    def padded(rows: Tensor, first: int, last: int) -> Tensor:
        ends = [torch.full((2,), number, device=rows.device) for number in (first, last)]
        return torch.cat([ends[0], rows, ends[1]])

    teacher_rows, student_rows = padded(case.teacher_rows, -1, 2), padded(case.student_rows, 1, -5)
    loss = ops.linear_dino_loss(z, weight, *case[2:5], teacher_rows, student_rows, backend=backend, **temps(case))
    gradients = torch.autograd.grad(loss.sum(), (z, weight))
    torch.testing.assert_close(loss, F.pad(expected, (2, 2)), rtol=0, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=0)


def temps(case: Case) -> dict[str, float]:
    return {"student_temp": case.student_temp, "teacher_temp": case.teacher_temp}


# --- determinism, layout, size


@fast_backends
def test_is_deterministic_and_accepts_strided_inputs(backend: str) -> None:
    case = make_case(6, 4, 24, 100, 20, torch.float32, device_of(backend))
    first = loss_and_gradients(case, backend)
    assert all(map(torch.equal, first, loss_and_gradients(case, backend)))
    apart = case._replace(
        student_z=case.student_z.T.contiguous().T,
        student_W=torch.stack([case.student_W, case.student_W], 2)[:, :, 0],
        teacher_W=torch.stack([case.teacher_W, case.teacher_W], 1)[:, 0],
        center=torch.stack([case.center, case.center], 1)[:, 0],
        teacher_rows=torch.stack([case.teacher_rows, case.teacher_rows], 1)[:, 0],
    )
    for got, expected in zip(loss_and_gradients(apart, backend), first, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_blocked_stores_no_logits() -> None:
    """600 x 6000 logits need 14 MB; two tiles of 512 x 1024, the gradient of W and a few rows are allowed."""
    case = make_case(600, 500, 32, 6000, 700, torch.float32)
    loss_and_gradients(case, "blocked")  # one-time allocations
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        loss_and_gradients(case, "blocked")
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    tile, weight_gradient = 4 * 512 * 1024, 4 * 6000 * 32
    assert max(event.nbytes() for event in events) <= tile
    assert held.max() <= 2.5 * tile + weight_gradient


def test_blocked_with_65536_rows_in_each_of_four_views() -> None:
    case = make_case(4 * 65_536, 2 * 65_536, 4, 12, 6 * 65_536, torch.float32)
    student_z = F.normalize(case.student_z + 0.5 * case.student_W[0], dim=1)  # so that gradients do not cancel
    assert_exact(case._replace(student_z=student_z), "blocked")


# --- torch.library, compilation, autocast


@fast_backends
def test_opcheck(backend: str) -> None:
    case = make_case(4, 3, 8, 40, 6, torch.float32, device_of(backend))
    forward, backward = ops_of(backend)
    z, weight = (tensor.clone().requires_grad_() for tensor in case[:2])
    torch.library.opcheck(forward, (z, weight, *case[2:]))
    _, *saved = forward(*case)
    strided_gradient = torch.ones(1, device=device_of(backend)).expand(6)
    torch.library.opcheck(backward, (strided_gradient, *saved, *case))


def ops_of(backend: str) -> tuple[Any, Any]:
    module = module_of(backend)
    return module.linear_dino_loss_fwd, module.linear_dino_loss_bwd


@every_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool, backend: str) -> None:
    def step(*arguments: Any) -> Tensor:
        return ops.linear_dino_loss(*arguments, backend=backend).sum()

    torch.compiler.reset()  # forget the functions compiled for other parameters
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for students, pairs in ((6, 5), (7, 12)):
        case = make_case(students, 4, 8, 33, pairs, torch.float32, device_of(backend))
        z, weight = (tensor.requires_grad_() for tensor in case[:2])
        expected = torch.autograd.grad(step(z, weight, *case[2:]), (z, weight))
        got = torch.autograd.grad(compiled(z, weight, *case[2:]), (z, weight))
        torch.testing.assert_close(got, expected)


def test_blocked_gradcheck() -> None:
    case = make_case(5, 4, 3, 11, 8)
    case = case._replace(teacher_rows=case.teacher_rows.index_fill(0, torch.tensor([3]), -1))
    z, weight = (tensor.requires_grad_() for tensor in case[:2])
    assert torch.autograd.gradcheck(lambda z, weight: ops.linear_dino_loss(z, weight, *case[2:]), (z, weight))


@every_backend
def test_autocast_casts_features_and_not_the_centre(backend: str) -> None:
    device = device_of(backend)
    case = make_case(6, 4, 16, 40, 9, torch.float32, device)
    z, weight = (tensor.requires_grad_() for tensor in case[:2])
    with torch.autocast(device, torch.bfloat16):
        loss = ops.linear_dino_loss(z, weight, *case[2:], backend=backend)
        gradients = torch.autograd.grad(loss.sum(), (z, weight))  # autocast must not apply in the backward either
    rounded = [tensor.detach().bfloat16() for tensor in case[:4]]
    leaves = [tensor.requires_grad_() for tensor in rounded[:2]]
    expected = ops.linear_dino_loss(*rounded, *case[4:], backend=backend)
    assert torch.equal(loss, expected)
    for got, leaf in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, leaf.float())


def test_autocast_compiles() -> None:
    case = make_case(6, 4, 16, 40, 9, torch.float32)

    def step(*arguments: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ops.linear_dino_loss(*arguments)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case), step(*case))


# --- choice and errors


def test_float64_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    assert backends.choose("linear_dino_loss", "cpu", None, torch.float64) == "blocked"
    assert backends.choose("linear_dino_loss", "cuda", None, torch.float64) == "blocked"


@needs_triton
def test_triton_passes_wide_features_to_blocked() -> None:
    case = make_case(3, 2, 257, 20, 4, torch.float32, device_of("triton"))
    wide = loss_and_gradients(case, "triton")
    assert all(map(torch.equal, wide, loss_and_gradients(case, "blocked")))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("who", ["teacher_rows", "student_rows"])
def test_rows_out_of_range_raise_on_the_cpu(who: str, backend: str) -> None:
    case = make_case(4, 3, 8, 10, 6, torch.float32)
    with pytest.raises(IndexError):
        ops.linear_dino_loss(*case._replace(**{who: torch.full((6,), 4)}), backend=backend)


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
        ({"backend": "cpp"}, "no cpp implementation"),
        ({"backend": "triton"}, "it computes in float32" if INTERPRETED else "it takes CUDA tensors"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = make_case(4, 3, 8, 10, 6)._asdict() | change
    with pytest.raises(ValueError, match=message):
        ops.linear_dino_loss(**arguments)
