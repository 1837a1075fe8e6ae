"""nulo_rows against match_nuclei followed by sample_nuclei of every packed row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast import ops
from muse_fast.ops import backends, reference
from tests.ops.test_match_nuclei import packed, random_images
from tests.support.agreement import FLOOR, GRADIENT_CAP, assert_as_exact_as_eager

pytestmark = pytest.mark.usefixtures("deterministic")

cuda_error = backends.cuda_error("nulo_rows") or backends.triton_error()
GPU = (pytest.mark.gpu, pytest.mark.skipif(cuda_error is not None, reason=str(cuda_error)))
every_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("cuda", marks=GPU)])
cpp_error = backends.library_error() or backends.triton_error()
needs_registration = pytest.mark.skipif(cpp_error is not None, reason=str(cpp_error))

CHANNELS = (3, 33, 2, 4)
SIZES = {96: [(12, 12), (6, 6), (3, 5), (1, 1)], 64: [(9, 7), (5, 3), (2, 2), (1, 2)]}


class Inputs(NamedTuple):
    """The arguments of nulo_rows, in its order."""

    teacher_levels: list[Tensor]
    student_levels: list[list[Tensor]]
    view_sizes: list[int]
    xy: Tensor
    index: Tensor
    offsets: Tensor
    num_rois: int
    num_globals: int

    def tensors(self) -> list[Tensor]:
        return [*self.teacher_levels, *(level for levels in self.student_levels for level in levels)]

    def with_levels(self, change: Any) -> Inputs:
        """Every level changed and made a leaf that asks for a gradient."""
        teacher, *student = (
            [change(level.detach()).requires_grad_() for level in levels]
            for levels in (self.teacher_levels, *self.student_levels)
        )
        return self._replace(teacher_levels=teacher, student_levels=student)

    def to(self, device: str) -> Inputs:
        moved = self.with_levels(lambda level: level.to(device))
        return moved._replace(**{name: getattr(self, name).to(device) for name in ("xy", "index", "offsets")})


def make_inputs(
    images: list[list[int]], num_rois: int, num_globals: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Inputs:
    index, offsets = packed(images)
    counts = [num_globals * num_rois, len(images) - num_globals * num_rois]
    view_sizes = [size for size, count in zip(SIZES, counts, strict=True) if count]
    teacher, *student = (
        [torch.randn(count, c, *size).to(dtype) for c, size in zip(CHANNELS, SIZES[view_size], strict=True)]
        for view_size, count in zip((96, *view_sizes), (counts[0], *counts), strict=False)
    )
    inputs = Inputs(teacher, student, view_sizes, torch.rand(len(index), 2) * 96, index, offsets, num_rois, num_globals)
    return inputs.to(device)


def make_case(name: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Inputs:
    return make_inputs(*CASES[name], dtype, device)


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def every_row(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What teacher and student have at every packed row (zeros where the teacher saw no such view)."""
    image = torch.repeat_interleave(inputs.offsets.diff().long())
    globals_ = inputs.num_globals * inputs.num_rois
    of_globals = torch.where(image < globals_, image, -1)
    teacher = ops.sample_nuclei(inputs.teacher_levels, inputs.xy, of_globals, 96, backend="reference").detach()
    student = ops.sample_nuclei(inputs.student_levels[0], inputs.xy, of_globals, 96, backend="reference")
    if len(inputs.student_levels) > 1:
        of_locals = torch.where(image >= globals_, image - globals_, -1)
        student = student + ops.sample_nuclei(inputs.student_levels[1], inputs.xy, of_locals, 64, backend="reference")
    return teacher, student


CASES = {
    "random": (random_images(6 * 5, 20, 30), 5, 2),
    "one_global": (random_images(3 * 4, 9, 12), 4, 1),
    "no_locals": (random_images(2 * 3, 9, 12), 3, 2),
    "one_view": ([[1, 2, 3], [4, 5]], 2, 1),
    "no_nuclei": ([[] for _ in range(12)], 3, 2),
    "no_common_nucleus": ([[1, 3], [2, 4]], 1, 2),
    "one_nucleus": ([[7], [], [7]], 1, 2),
}


@every_backend
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("name", CASES)
def test_equals_matching_then_sampling(name: str, spare: int, backend: str) -> None:
    dtype = torch.float32 if backend == "cuda" else torch.float64
    inputs = make_case(name, dtype, device_of(backend))
    teacher, student = (rows.cpu() for rows in ops.match_nuclei(*inputs[4:], backend="reference"))
    counts = [len(teacher.unique()), len(student.unique()), len(teacher)]
    got = ops.nulo_rows(*inputs, capacity=tuple(count + spare for count in counts), backend=backend)
    of_teacher, of_student = every_row(inputs)

    assert got.counts.tolist() == counts
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for rows, kept, expected in (
        (got.teacher, teacher.unique(), of_teacher),
        (got.student, student.unique(), of_student),
    ):
        assert rows.dtype == dtype
        expected = F.pad(expected.cpu()[kept], (0, 0, 0, spare))
        torch.testing.assert_close(rows.cpu(), expected, rtol=0, atol=tolerance)
        assert (rows[len(kept) :] == 0).all()
    for slots, rows in ((got.teacher_rows, teacher), (got.student_rows, student)):
        assert slots.dtype == torch.int64
        expected = F.pad(torch.searchsorted(rows.unique(), rows), (0, spare), value=-1)
        assert torch.equal(slots.cpu(), expected)


@every_backend
def test_default_capacity_holds_everything(backend: str) -> None:
    """Every view shows every nucleus."""
    inputs = make_inputs([list(range(9))] * 8, 2, 2, torch.float32, device_of(backend))
    got = ops.nulo_rows(*inputs, backend=backend)
    assert got.counts.tolist() == [36, 72, 2 * 3 * 18]
    assert [len(item) for item in got[:4]] == [72, 72, 144, 144]
    assert (got.teacher_rows >= 0).sum() == 2 * 3 * 18


@every_backend
def test_what_exceeds_the_capacity_is_left_out(backend: str) -> None:
    inputs = make_case("random", torch.float32, device_of(backend))
    whole = ops.nulo_rows(*inputs, backend=backend)
    teachers, students, pairs = (count // 2 for count in whole.counts.tolist())
    got = ops.nulo_rows(*inputs, capacity=(teachers, students, pairs), backend=backend)
    assert torch.equal(got.counts, whole.counts)
    assert torch.equal(got.teacher, whole.teacher[:teachers])
    assert torch.equal(got.student, whole.student[:students])
    left_out = (whole.teacher_rows >= teachers) | (whole.student_rows >= students)
    assert 0 < left_out[:pairs].sum() < pairs
    for slots, all_slots in ((got.teacher_rows, whole.teacher_rows), (got.student_rows, whole.student_rows)):
        assert torch.equal(slots, all_slots.masked_fill(left_out, -1)[:pairs])


@every_backend
def test_losses_are_those_of_the_packed_rows(backend: str) -> None:
    inputs = make_case("random", torch.float32, device_of(backend))
    pairs = ops.match_nuclei(*inputs[4:], backend="reference")
    center = torch.randn(sum(CHANNELS), device=inputs.xy.device)
    of_teacher, of_student = every_row(inputs)
    expected = ops.dino_loss(of_student, of_teacher, center, *pairs, 0.1, 0.04, backend="reference")
    got = ops.nulo_rows(*inputs, backend=backend)
    rows = got.student, got.teacher, center, got.teacher_rows, got.student_rows
    losses = ops.dino_loss(*rows, 0.1, 0.04, backend="reference")
    torch.testing.assert_close(losses[: len(expected)], expected, rtol=1e-4, atol=1e-4)
    assert (losses[len(expected) :] == 0).all()


def gradients(inputs: Inputs, student: Tensor) -> list[Tensor]:
    """Of the student's rows, each element with a weight of its own, for every student level."""
    student.backward(
        torch.linspace(0.5, 1.5, student.numel(), dtype=student.dtype, device=student.device).view_as(student)
    )
    assert all(level.grad is None for level in inputs.teacher_levels)
    found = [level.grad for levels in inputs.student_levels for level in levels]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def test_gradient_equals_that_of_sampling_the_packed_rows() -> None:
    inputs = make_case("random")
    got = ops.nulo_rows(*inputs, backend="reference")
    assert not got.teacher.requires_grad
    kept = ops.match_nuclei(*inputs[4:], backend="reference")[1].unique()
    twin = inputs.with_levels(torch.clone)
    expected = F.pad(every_row(twin)[1][kept], (0, 0, 0, len(got.student) - len(kept)))
    torch.testing.assert_close(gradients(inputs, got.student), gradients(twin, expected), rtol=0, atol=1e-12)


@every_backend
def test_huge(backend: str) -> None:
    """65,536 nuclei in each of four views: evens, multiples of three, and two copies."""
    n = 65536
    index = torch.cat([torch.arange(n) * step for step in (2, 3, 2, 3)]).int()
    offsets = torch.arange(0, 4 * n + 1, n, dtype=torch.int32)
    level = torch.arange(2 * 5 * 5, dtype=torch.float32).view(2, 1, 5, 5)
    inputs = Inputs([level], [[level], [level]], [5, 5], torch.rand(4 * n, 2) * 5, index, offsets, 1, 2)
    got = ops.nulo_rows(*inputs.to(device_of(backend)), backend=backend)
    expected = ops.match_nuclei(index, offsets, 1, 2, backend="reference")
    for slots, rows in zip((got.teacher_rows.cpu(), got.student_rows.cpu()), expected, strict=True):
        assert torch.equal(slots[: len(rows)], torch.searchsorted(rows.unique(), rows))
    assert got.counts.tolist() == [len(rows.unique()) for rows in expected] + [len(expected[0])]


def changed(**change: Any) -> Any:
    return lambda inputs: inputs._replace(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(xy=torch.zeros(3, 2)), r"xy must be float32 \[5, 2\]"),
        (changed(xy=torch.zeros(5, 2).double()), "xy must be float32"),
        (changed(index=torch.zeros(5)), "nulo_rows: index must be 1-D int32"),
        (changed(num_rois=2), "nulo_rows: offsets must hold"),
        (changed(num_globals=4), "nulo_rows: num_globals must be in 1..3"),
        (changed(teacher_levels=[]), "expected 1 to 4 teacher_levels, got 0"),
        (changed(view_sizes=[96]), "of 2 resolutions"),
        (changed(view_sizes=[96, 0]), "positive view_sizes"),
        (lambda inputs: inputs._replace(student_levels=inputs.student_levels[:1]), "of 2 resolutions"),
        (lambda inputs: inputs._replace(teacher_levels=inputs.teacher_levels[:2]), "the channels, dtypes and devices"),
        (lambda inputs: inputs.with_levels(lambda level: level[:0]), r"teacher_levels must be tensors \[2, c, h, w\]"),
        (lambda inputs: inputs._replace(teacher_levels=inputs.student_levels[1]), r"must be tensors \[2, c, h, w\]"),
        (lambda inputs: inputs.with_levels(lambda level: level.flip(0)[..., :0]), "none be empty"),
        (lambda inputs: inputs._replace(teacher_levels=inputs.teacher_levels[::-1]), "start with the finest"),
        (lambda inputs: inputs.to("meta")._replace(xy=inputs.xy, index=inputs.index), "on"),
    ],
)
def test_errors(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.nulo_rows(*change(make_inputs([[1, 2], [1], [1, 2]], 1, 2)))


def test_refuses_negative_capacities_and_backends_that_cannot_run() -> None:
    inputs = make_case("one_nucleus")
    with pytest.raises(ValueError, match="capacity must not be negative"):
        ops.nulo_rows(*inputs, capacity=(1, -1, 1))
    with pytest.raises(ValueError, match="it takes CUDA tensors"):
        ops.nulo_rows(*inputs, backend="cuda")
    with pytest.raises(ValueError, match="sorted"):
        ops.nulo_rows(*inputs._replace(index=torch.tensor([7, 7]).int(), offsets=torch.tensor([0, 2, 2, 2]).int()))


@pytest.fixture
def registration(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The op of the C++ library with its fake and its gradient, the reference standing in for its CUDA kernel."""

    def stand_in(
        teacher: list[Tensor], globals_: list[Tensor], locals_: list[Tensor], *rest: Any
    ) -> tuple[Tensor, ...]:
        global_size, local_size, xy, *pack = rest[:7]
        capacity = rest[7:]
        students, sizes = ([globals_, locals_], [global_size, local_size]) if locals_ else ([globals_], [global_size])
        rows = reference.nulo_rows(teacher, students, sizes, xy, *pack, capacity=capacity)
        kept = reference.match_nuclei(*pack)[1].unique()
        return *rows, F.pad(kept, (0, capacity[1] - len(kept)), value=-1)

    library = torch.library.Library("muse_fast", "IMPL")
    library.impl("nulo_rows", stand_in, "CPU")
    monkeypatch.setattr(backends, "choose", lambda *_: "cuda")
    yield
    library._destroy()


@needs_registration
@pytest.mark.usefixtures("registration")
@pytest.mark.parametrize("name", ["one_global", "no_locals", "no_nuclei"])
def test_gradient_of_the_registered_op(name: str) -> None:
    inputs = make_case(name, torch.float32)
    capacity = (5, 40, 90)  # in the first case there are more teacher rows
    found = gradients(inputs, ops.nulo_rows(*inputs, capacity=capacity).student)
    twin = inputs.with_levels(torch.clone)
    expected = gradients(twin, reference.nulo_rows(*twin, capacity=capacity)[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_registration
@pytest.mark.usefixtures("registration")
@pytest.mark.parametrize("name", ["one_nucleus", "no_common_nucleus", "no_nuclei"])
def test_opcheck(name: str) -> None:
    teacher, student, sizes, *pack = make_case(name, torch.float32)
    locals_ = student[1] if len(student) > 1 else []
    arguments = (teacher, student[0], locals_, sizes[0], sizes[-1], *pack, 3, 4, 5)
    torch.library.opcheck(torch.ops.muse_fast.nulo_rows.default, arguments)


@needs_registration
@pytest.mark.usefixtures("registration")
def test_compiles_without_a_graph_break() -> None:
    def step(teacher: list[Tensor], student: list[list[Tensor]], *pack: Tensor) -> ops.nulo_rows.NuloRows:
        return ops.nulo_rows(teacher, student, [96, 64], *pack, 1, 2)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for most in (4, 9):
        inputs = make_inputs(random_images(3, most, 12), 1, 2, torch.float32)
        twin = inputs.with_levels(torch.clone)
        got, expected = (f(x[0], x[1], *x[3:6]) for f, x in ((compiled, inputs), (step, twin)))
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(gradients(inputs, got.student), gradients(twin, expected.student), strict=True):
            assert torch.equal(ours, theirs)


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of the CUDA backend."""
    for mark in GPU:
        test = mark(test)
    return test


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_cuda_is_as_exact_as_eager(dtype: torch.dtype) -> None:
    """Rows and gradients; and the same bits in two runs, of contiguous and of channels-last levels."""
    inputs = make_case("random", dtype, "cuda")

    def rows_and_gradients(inputs: Inputs, backend: str) -> list[Tensor]:
        got = ops.nulo_rows(*inputs, backend=backend)
        return [got.teacher, got.student.detach(), *gradients(inputs, got.student)]

    truth = rows_and_gradients(inputs.with_levels(torch.Tensor.double), "reference")
    eager = rows_and_gradients(inputs.with_levels(torch.clone), "reference")
    first = rows_and_gradients(inputs.with_levels(torch.clone), "cuda")
    caps = [GRADIENT_CAP[dtype]] * len(truth)  # rows too come in the dtype of the levels
    assert_as_exact_as_eager(first, eager, truth, caps, FLOOR[dtype])
    for change in (torch.clone, lambda level: level.to(memory_format=torch.channels_last, copy=True)):
        for ours, theirs in zip(rows_and_gradients(inputs.with_levels(change), "cuda"), first, strict=True):
            assert torch.equal(ours, theirs)


@gpu
@pytest.mark.parametrize("most", [1, 60, 1500])
def test_cuda_pairs_are_those_of_the_reference(most: int) -> None:
    """Of one nucleus in a view, and of more than a block has threads."""
    inputs = make_inputs(random_images(10 * 16, most, 2 * most), 16, 2, torch.float32)
    got, expected = ops.nulo_rows(*inputs.to("cuda")), ops.nulo_rows(*inputs)
    for name in ("teacher_rows", "student_rows", "counts"):
        assert torch.equal(getattr(got, name).cpu(), getattr(expected, name))


@gpu
def test_cuda_does_not_wait() -> None:
    """Forward and backward, behind 50 ms of work that the inputs come out of."""
    inputs = make_case("random", torch.float32)
    expected = ops.nulo_rows(*inputs)
    on_device = inputs.with_levels(torch.zeros_like).to("cuda")
    gradients(on_device, ops.nulo_rows(*on_device, backend="cuda").student)  # compiles the Triton kernels
    for level in on_device.tensors():
        level.grad = None
    pinned = [level.detach().pin_memory() for level in inputs.tensors()]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(100_000_000)
            for target, source in zip(on_device.tensors(), pinned, strict=True):
                target.data.copy_(source, non_blocking=True)
            got = ops.nulo_rows(*on_device, backend="cuda")
            gradients(on_device, got.student)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)


@gpu
def test_cuda_tells_of_broken_packs() -> None:
    """The op by a count; with the assertion of ``ops.nulo_rows`` this process would lose its device."""
    teacher, (student,), (size,), xy, *pack = make_inputs([[1, 2], [1, 2]], 1, 2, torch.float32, "cuda")
    pack[0] = torch.tensor([2, 1, 1, 2], dtype=torch.int32, device="cuda")
    results = torch.ops.muse_fast.nulo_rows(teacher, student, [], size, size, xy, *pack, 4, 4, 8)
    assert results[4].tolist() == [-1, -1, -1]
