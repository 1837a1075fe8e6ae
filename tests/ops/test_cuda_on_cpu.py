"""The CUDA kernels of match_nuclei against its reference, on the CPU and under sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from muse_fast.ops import reference
from tests.ops.test_match_nuclei import packed, random_images

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


class Case(NamedTuple):
    """A pack and a launch grid."""

    images: list[list[int]]
    num_rois: int
    num_globals: int
    blocks: int = 1
    threads: int = 32
    capacity: int | None = None


CASES = {
    "nothing": Case([[] for _ in range(6)], 2, 2),
    "one_nucleus": Case([[7], [7], [7]], 1, 2),
    "one_view": Case([[1, 2], [3]], 2, 1),
    "odd": Case(random_images(5 * 3, 9, 12), 3, 2),
    "all_globals": Case(random_images(3 * 2, 9, 12), 2, 3),
    "more_rows_than_a_block": Case(random_images(4 * 2, 70, 90), 2, 2),
    "several_warps_and_blocks": Case(random_images(5 * 3, 40, 50), 3, 2, blocks=3, threads=64),
    "more_blocks_than_rows": Case([[1], [1, 2], [2]], 1, 2, blocks=5),
    "too_small": Case(random_images(4 * 3, 20, 25), 3, 2, blocks=2, capacity=90),
    "no_room": Case(random_images(4, 9, 12), 1, 2, capacity=0),
}


@pytest.fixture(scope="module", params=["address,undefined", pytest.param("thread", marks=pytest.mark.heavy)])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build tests/support/cuda_on_cpu.cpp with a sanitizer."""
    built = tmp_path_factory.mktemp("cuda_on_cpu") / "program"
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-pthread", f"-fsanitize={request.param}"]
    sources = [f"-I{ROOT / 'csrc'}", ROOT / "tests" / "support" / "cuda_on_cpu.cpp", "-o", built]
    subprocess.run(["g++", *flags, "-fno-sanitize-recover=all", *sources], check=True)
    return built


def run(
    program: Path,
    folder: Path,
    index: Tensor,
    offsets: Tensor,
    num_rois: int,
    num_globals: int,
    capacity: int,
    blocks: int = 1,
    threads: int = 32,
) -> list[Tensor]:
    """Run the kernels on a pack; return teacher rows, student rows and their count."""
    settings = torch.tensor([num_rois, num_globals, blocks, threads, capacity])
    for name, tensor in (("settings", settings), ("index", index), ("offsets", offsets)):
        (folder / name).write_bytes(tensor.numpy().tobytes())
    subprocess.run([program, folder], check=True, timeout=600)
    return [torch.from_numpy(np.fromfile(folder / name, np.int64)) for name in ("teacher", "student", "count")]


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_reference(name: str, program: Path, tmp_path: Path) -> None:
    case = CASES[name]
    index, offsets = packed(case.images)
    capacity = case.num_globals * len(index) + 3 if case.capacity is None else case.capacity
    pack = index, offsets, case.num_rois, case.num_globals
    got = run(program, tmp_path, *pack, capacity, case.blocks, case.threads)
    for ours, expected in zip(got, reference.match_nuclei(*pack, capacity=capacity), strict=True):
        assert torch.equal(ours.view_as(expected), expected)


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
def test_invalid_packs_are_reported(index: list[int], offsets: list[int], program: Path, tmp_path: Path) -> None:
    """By a negative count, without reading or writing outside any array."""
    teacher, student, count = run(program, tmp_path, torch.tensor(index).int(), torch.tensor(offsets).int(), 1, 2, 8)
    assert count < 0
    assert (teacher == -1).all()
    assert (student == -1).all()
