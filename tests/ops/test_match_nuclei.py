"""match_nuclei against set intersection in plain Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast import ops
from muse_fast.ops import backends

pytestmark = pytest.mark.usefixtures("deterministic")

needs_library = pytest.mark.skipif(backends.library_error() is not None, reason=str(backends.library_error()))
cuda_error = backends.cuda_error("match_nuclei")
GPU = (pytest.mark.gpu, pytest.mark.skipif(cuda_error is not None, reason=str(cuda_error)))
every_backend = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpp", marks=needs_library), pytest.param("cuda", marks=GPU)]
)
every_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_library), pytest.param("cuda", marks=GPU)]
)


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test of the CUDA backend."""
    for mark in GPU:
        test = mark(test)
    return test


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def packed(images: list[list[int]], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return index and offsets of images, given as lists of nucleus indices."""
    index = torch.tensor([nucleus for image in images for nucleus in image], dtype=torch.int32)
    offsets = torch.tensor([0, *(len(image) for image in images)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return index.to(device), offsets.to(device)


def brute_force(images: list[list[int]], num_rois: int, num_globals: int) -> list[tuple[int, int]]:
    """Find pairs literally as defined."""
    row_of, row = [], 0
    for image in images:
        row_of.append({nucleus: row + position for position, nucleus in enumerate(image)})
        row += len(image)
    pairs = []
    for g in range(num_globals):
        for v in range(len(images) // num_rois):
            for b in range(num_rois):
                teacher, student = row_of[g * num_rois + b], row_of[v * num_rois + b]
                shared = sorted(set(teacher) & set(student)) if v != g else []
                pairs += [(teacher[nucleus], student[nucleus]) for nucleus in shared]
    return pairs


def random_images(num_images: int, most: int, universe: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(num_images + most)
    counts = torch.randint(0, most + 1, (num_images,), generator=random).tolist()
    return [sorted(torch.randperm(universe, generator=random)[:count].tolist()) for count in counts]


CASES = {
    "random": (random_images(6 * 5, 40, 60), 5, 2),
    "one_global": (random_images(3 * 4, 9, 12), 4, 1),
    "all_globals": (random_images(3 * 7, 9, 12), 7, 3),
    "one_view": ([[1, 2, 3], [4, 5]], 2, 1),
    "no_nuclei": ([[] for _ in range(12)], 3, 2),
    "no_common_nucleus": ([[1, 3], [2, 4]], 1, 2),
    "one_nucleus": ([[], [7], [7], []], 1, 2),
    "same_index_in_other_roi": ([[5], [], [], [5]], 2, 2),
    "negative_and_extreme": ([[-(2**31), -1, 2**31 - 1], [-(2**31), 0, 2**31 - 1], [-1], [-1]], 2, 2),
}


@every_backend
@pytest.mark.parametrize("case", CASES)
def test_equals_set_intersection(case: str, backend: str) -> None:
    images, num_rois, num_globals = CASES[case]
    teacher, student = ops.match_nuclei(*packed(images, device_of(backend)), num_rois, num_globals, backend=backend)
    assert teacher.dtype == student.dtype == torch.int64
    assert list(zip(teacher.tolist(), student.tolist(), strict=True)) == brute_force(images, num_rois, num_globals)


@every_backend
@pytest.mark.parametrize("case", CASES)
def test_with_a_capacity(case: str, backend: str) -> None:
    """Too short, exact, and the length that is always enough: the same pairs, truncated or padded with -1."""
    images, num_rois, num_globals = CASES[case]
    index, offsets = packed(images, device_of(backend))
    expected = torch.tensor(brute_force(images, num_rois, num_globals), dtype=torch.int64).view(-1, 2)
    num_pairs, enough = len(expected), num_globals * len(index)
    assert num_pairs <= enough
    for capacity in {0, num_pairs // 2, num_pairs, enough, enough + 1}:
        teacher, student, count = ops.match_nuclei(
            index, offsets, num_rois, num_globals, capacity=capacity, backend=backend
        )
        assert teacher.dtype == student.dtype == count.dtype == torch.int64
        assert count.shape == ()
        assert count == num_pairs
        padded = F.pad(expected, (0, 0, 0, capacity - num_pairs), value=-1)
        assert torch.equal(torch.stack([teacher, student], dim=1).cpu(), padded)


@every_backend
def test_huge(backend: str) -> None:
    """65,536 nuclei in each of four views: even numbers, multiples of three, and a copy of each."""
    n = 65536
    views = [torch.arange(n) * 2, torch.arange(n) * 3, torch.arange(n) * 2, torch.arange(n) * 3]
    index = torch.cat(views).int()
    offsets = torch.arange(0, 4 * n + 1, n, dtype=torch.int32)
    pack = (index.to(device_of(backend)), offsets.to(device_of(backend)))
    teacher, student = (rows.cpu() for rows in ops.match_nuclei(*pack, 1, 2, backend=backend))
    sixes = n // 3 + 1  # 0, 6, ..., below 2 n
    assert teacher.numel() == 2 * (n + 2 * sixes)
    assert torch.equal(index[teacher], index[student])
    assert torch.equal(teacher[sixes : sixes + n], torch.arange(n))  # g = 0, v = 2: the copy
    assert torch.equal(student[sixes : sixes + n], torch.arange(2 * n, 3 * n))


@every_backend
def test_accepts_strided_inputs(backend: str) -> None:
    images, num_rois, num_globals = CASES["random"]
    index, offsets = packed(images, device_of(backend))
    apart = torch.stack([index, index], dim=1)[:, 0]
    assert not apart.is_contiguous()
    expected = ops.match_nuclei(index, offsets, num_rois, num_globals, backend=backend)
    got = ops.match_nuclei(apart, offsets, num_rois, num_globals, backend=backend)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@every_backend
@pytest.mark.parametrize(
    ("index", "offsets", "message"),
    [
        ([3, 2, 1, 2], [0, 2, 4], "sorted"),
        ([2, 2, 1, 2], [0, 2, 4], "sorted"),
        ([1, 2, 3, 4], [0, 2, 3], "offsets must rise from 0 to N = 4"),
        ([1, 2, 3, 4], [1, 2, 4], "offsets must rise from 0 to N = 4"),
        ([1, 2, 3, 4], [0, 5, 4], "offsets must rise from 0 to N = 4"),
        ([1, 2, 3, 4], [0, -5, 4], "offsets must rise from 0 to N = 4"),
    ],
)
def test_rejects_invalid_packs(backend: str, index: list[int], offsets: list[int], message: str) -> None:
    pack = [torch.tensor(rows, dtype=torch.int32, device=device_of(backend)) for rows in (index, offsets)]
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.match_nuclei(*pack, 1, 2, backend=backend)
    if backend == "cuda":  # the op reports it by the count; the assertion in ops.match_nuclei would lose the device
        assert torch.ops.muse_fast.match_nuclei_padded(*pack, 1, 2, 8)[2] < 0
        return
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.match_nuclei(*pack, 1, 2, capacity=8, backend=backend)


@gpu
def test_cuda_asserts_that_a_pack_is_valid() -> None:
    """In a separate process, because a device-side assertion ends it."""
    code = """
import torch
from muse_fast import ops
pack = [torch.tensor(rows, dtype=torch.int32, device="cuda") for rows in ([3, 2, 1, 2], [0, 2, 4])]
ops.match_nuclei(*pack, 1, 2, capacity=8)
torch.cuda.synchronize()
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode != 0
    assert "must be sorted by nucleus index" in finished.stderr + finished.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.zeros(3, dtype=torch.int64)}, "index must be 1-D int32"),
        ({"offsets": torch.zeros(2, 2, dtype=torch.int32)}, "offsets must be 1-D int32"),
        ({"num_rois": 3}, r"V \* 3 \+ 1 entries"),
        ({"num_rois": 0}, r"V \* 0 \+ 1 entries"),
        ({"num_globals": 3}, "1..2"),
        ({"num_globals": 0}, "1..2"),
        ({"capacity": -1}, "capacity must not be negative, got -1"),
        ({"backend": "cuda"}, "it takes CUDA tensors"),
        ({"backend": "fast"}, "unknown backend 'fast'"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    index, offsets = packed([[1], [1], [1], [1]])
    arguments = {"index": index, "offsets": offsets, "num_rois": 2, "num_globals": 2} | change
    with pytest.raises(ValueError, match=message):
        ops.match_nuclei(**arguments)  # type: ignore[arg-type]


@gpu
@pytest.mark.parametrize("most", [1, 60, 300, 1500])
def test_cuda_equals_cpp(most: int) -> None:
    """Views of one nucleus, and of more nuclei than a block has threads; twice, to check for nondeterminism."""
    pack, num_rois, num_globals = packed(random_images(10 * 16, most, 2 * most)), 16, 2
    on_device = [tensor.cuda() for tensor in pack]
    expected = ops.match_nuclei(*pack, num_rois, num_globals, backend="cpp")
    assert expected[0].numel() > 0
    for _ in range(2):
        got = ops.match_nuclei(*on_device, num_rois, num_globals, backend="cuda")
        padded = ops.match_nuclei(*on_device, num_rois, num_globals, capacity=len(expected[0]), backend="cuda")
        for ours, theirs in zip((*got, *padded[:2]), (*expected, *expected), strict=True):
            assert torch.equal(ours.cpu(), theirs)


@gpu
def test_cuda_more_pairs_than_rows() -> None:
    """Every view has every nucleus: 20 views, 10 of them global, 190 segments of 20,000 pairs."""
    n = 20000
    index = torch.arange(n, dtype=torch.int32, device="cuda").repeat(20)
    offsets = torch.arange(0, 20 * n + 1, n, dtype=torch.int32, device="cuda")
    teacher, student = ops.match_nuclei(index, offsets, 1, 10, backend="cuda")
    views = torch.tensor([(g, v) for g in range(10) for v in range(20) if v != g], device="cuda") * n
    rows = views[:, :, None] + torch.arange(n, device="cuda")
    assert torch.equal(teacher, rows[:, 0].flatten())
    assert torch.equal(student, rows[:, 1].flatten())


@gpu
def test_cuda_runs_on_the_current_stream_and_synchronises_once(capfd: pytest.CaptureFixture[str]) -> None:
    """After 50 ms of work that produces the inputs; any other stream would read them too early."""
    index, offsets = (tensor.pin_memory() for tensor in packed(CASES["random"][0]))
    expected = ops.match_nuclei(index, offsets, *CASES["random"][1:])
    with torch.cuda.stream(torch.cuda.Stream()):
        on_device = torch.empty_like(index, device="cuda"), torch.empty_like(offsets, device="cuda")
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)
        for target, source in zip(on_device, (index, offsets), strict=True):
            target.copy_(source, non_blocking=True)
        torch.cuda.set_sync_debug_mode("warn")  # warnings of ops called from Python go to stderr
        try:
            got = ops.match_nuclei(*on_device, *CASES["random"][1:], backend="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got[0].cpu(), expected[0])
        assert torch.equal(got[1].cpu(), expected[1])
    assert capfd.readouterr().err.count("called a synchronizing CUDA operation") == 1


@gpu
def test_cuda_does_not_synchronise_with_a_capacity() -> None:
    index, offsets = packed(CASES["random"][0], "cuda")
    expected = ops.match_nuclei(index, offsets, *CASES["random"][1:])[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher, _, _ = ops.match_nuclei(index, offsets, *CASES["random"][1:], capacity=len(expected), backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(teacher, expected)


@every_device
def test_opcheck(device: str) -> None:
    for case in ("random", "no_nuclei"):
        images, num_rois, num_globals = CASES[case]
        arguments = (*packed(images, device), num_rois, num_globals)
        torch.library.opcheck(torch.ops.muse_fast.match_nuclei.default, arguments)
        torch.library.opcheck(torch.ops.muse_fast.match_nuclei_padded.default, (*arguments, 50))


@every_device
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_without_a_graph_break(device: str) -> None:
    compiled = torch.compile(
        lambda index, offsets: ops.match_nuclei(index, offsets, 2, 2), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for most in (4, 9):
        images = random_images(8, most, 12)
        got = compiled(*packed(images, device))
        assert list(zip(got[0].tolist(), got[1].tolist(), strict=True)) == brute_force(images, 2, 2)


@every_device
def test_compiles_without_a_graph_break_with_a_capacity(device: str) -> None:
    def padded(index: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.match_nuclei(index, offsets, 2, 2, capacity=2 * len(index))

    compiled = torch.compile(padded, fullgraph=True, dynamic=True, backend="aot_eager")
    for most in (4, 9):
        pack = packed(random_images(8, most, 12), device)
        for got, expected in zip(compiled(*pack), padded(*pack), strict=True):
            assert torch.equal(got, expected)
