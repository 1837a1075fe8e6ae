"""The CUDA kernels of match_nuclei and nulo_rows against their references, on the CPU and under sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from muse_fast.ops import reference
from tests.ops.test_match_nuclei import packed, random_images
from tests.support.agreement import FLOOR, LOSS_CAP, assert_as_exact_as_eager

ROOT = Path(__file__).parents[2]
GLOBAL_SIZE, LOCAL_SIZE = 96, 64
SIZES = {"globals": [(12, 12), (6, 6), (3, 5), (1, 1)], "locals": [(9, 7), (5, 3), (2, 2), (1, 1)]}
CHANNELS = (3, 40, 2, 1)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


class Case(NamedTuple):
    """One pack, and the grid that works on it."""

    images: list[list[int]]
    num_rois: int
    num_globals: int
    blocks: int = 1
    threads: int = 32
    capacity: tuple[int, int, int] | None = None


CASES = {
    "nothing": Case([[] for _ in range(6)], 2, 2),
    "one_nucleus": Case([[7], [7], [7]], 1, 2),
    "one_view": Case([[1, 2], [3]], 2, 1),
    "odd": Case(random_images(5 * 3, 9, 12), 3, 2),
    "all_globals": Case(random_images(3 * 2, 9, 12), 2, 3),
    "more_rows_than_a_block": Case(random_images(4 * 2, 70, 90), 2, 2),
    "several_warps_and_blocks": Case(random_images(5 * 3, 40, 50), 3, 2, blocks=3, threads=64),
    "more_blocks_than_rows": Case([[1], [1, 2], [2]], 1, 2, blocks=5),
    "too_small": Case(random_images(4 * 3, 20, 25), 3, 2, blocks=2, capacity=(11, 50, 90)),
    "no_room": Case(random_images(4, 9, 12), 1, 2, capacity=(0, 0, 0)),
}

RESULTS = {
    **dict.fromkeys(("match_teacher", "match_student", "match_count"), np.int64),
    **dict.fromkeys(("teacher", "student"), np.float32),
    **dict.fromkeys(("teacher_rows", "student_rows", "counts", "student_kept"), np.int64),
}


@pytest.fixture(scope="module", params=["address,undefined", pytest.param("thread", marks=pytest.mark.slow)])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/support/cuda_on_cpu.cpp, built with a sanitizer."""
    built = tmp_path_factory.mktemp("cuda_on_cpu") / "program"
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-pthread", f"-fsanitize={request.param}"]
    sources = [f"-I{ROOT / 'csrc'}", ROOT / "tests" / "support" / "cuda_on_cpu.cpp", "-o", built]
    subprocess.run(["g++", *flags, "-fno-sanitize-recover=all", *sources], check=True)
    return built


class Inputs(NamedTuple):
    teacher: list[Tensor]
    students: list[list[Tensor]]
    view_sizes: list[int]
    xy: Tensor
    index: Tensor
    offsets: Tensor
    num_rois: int
    num_globals: int


def make_inputs(case: Case) -> Inputs:
    index, offsets = packed(case.images)
    globals_ = case.num_globals * case.num_rois

    def levels(resolution: str, images: int) -> list[Tensor]:
        made = [torch.randn(images, c, *size) for c, size in zip(CHANNELS, SIZES[resolution], strict=True)]
        return [made[0].to(memory_format=torch.channels_last), *made[1:]]

    students = [levels("globals", globals_)]
    if len(case.images) > globals_:
        students.append(levels("locals", len(case.images) - globals_))
    xy = torch.rand(len(index), 2) * 110 - 10  # some outside
    sizes = [GLOBAL_SIZE, LOCAL_SIZE][: len(students)]
    return Inputs(levels("globals", globals_), students, sizes, xy, index, offsets, case.num_rois, case.num_globals)


def run(program: Path, folder: Path, case: Case, inputs: Inputs, capacity: tuple[int, int, int]) -> dict[str, Tensor]:
    """What the kernels make of the inputs."""

    def save(name: str, tensors: Sequence[Tensor]) -> None:
        (folder / name).write_bytes(b"".join(tensor.numpy().tobytes() for tensor in tensors))

    settings = [case.num_rois, case.num_globals, case.blocks, case.threads, *capacity, GLOBAL_SIZE, LOCAL_SIZE]
    save("settings", [torch.tensor(settings)])
    for name in ("xy", "index", "offsets"):
        save(name, [getattr(inputs, name)])
    locals_ = inputs.students[1] if len(inputs.students) > 1 else []
    for name, levels in (("teacher", inputs.teacher), ("globals", inputs.students[0]), ("locals", locals_)):
        save(f"{name}_numbers", [torch.tensor([*level.shape[1:], *level.stride()]) for level in levels])
        stored = [level.permute(0, 2, 3, 1) if level.stride(1) == 1 else level for level in levels]
        save(f"{name}_values", [level.contiguous() for level in stored])
    subprocess.run([program, folder], check=True, timeout=120)

    return {name: torch.from_numpy(np.fromfile(folder / name, dtype)) for name, dtype in RESULTS.items()}


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_references(name: str, program: Path, tmp_path: Path) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    rows = len(inputs.xy)
    capacity = case.capacity or (rows + 3, rows + 3, case.num_globals * rows + 3)
    got = run(program, tmp_path, case, inputs, capacity)

    pack = inputs[4:]
    teacher, student, count = reference.match_nuclei(*pack, capacity=capacity[2])
    assert torch.equal(got["match_teacher"], teacher)
    assert torch.equal(got["match_student"], student)
    assert got["match_count"] == count

    eager = reference.nulo_rows(*inputs, capacity=capacity)
    for field, expected in zip(("teacher_rows", "student_rows", "counts"), eager[2:], strict=True):
        assert torch.equal(got[field], expected)
    exact = inputs._replace(
        teacher=[level.double() for level in inputs.teacher],
        students=[[level.double() for level in levels] for levels in inputs.students],
    )
    truth = reference.nulo_rows(*exact, capacity=capacity)
    sampled = [got[side].view(-1, sum(CHANNELS)) for side in ("teacher", "student")]
    caps = [LOSS_CAP[torch.float32]] * 2
    assert_as_exact_as_eager(sampled, eager[:2], truth[:2], caps, FLOOR[torch.float32])

    kept = got["student_kept"]
    expected_kept = reference.match_nuclei(*pack)[1].unique()[: capacity[1]]
    assert torch.equal(kept[kept >= 0], expected_kept)
    assert (kept[len(expected_kept) :] == -1).all()


@pytest.mark.parametrize(
    ("index", "offsets"),
    [
        ([3, 2, 1, 2], [0, 2, 4]),
        ([2, 2, 1, 2], [0, 2, 4]),
        ([1, 2, 3, 4], [0, 2, 3]),
        ([1, 2, 3, 4], [1, 2, 4]),
        ([1, 2, 3, 4], [0, 5, 4]),
        ([1, 2, 3, 4], [0, -5, 4]),
    ],
)
def test_broken_packs_are_told(index: list[int], offsets: list[int], program: Path, tmp_path: Path) -> None:
    """By a negative count, and without a step beyond any array."""
    case = Case([[1, 2], [3, 4]], 1, 2, blocks=1)
    broken = {"index": torch.tensor(index).int(), "offsets": torch.tensor(offsets).int()}
    got = run(program, tmp_path, case, make_inputs(case)._replace(**broken), (4, 4, 8))
    assert got["match_count"] < 0
    assert (got["match_teacher"] == -1).all()
    assert got["counts"].tolist() == [-1, -1, -1]
