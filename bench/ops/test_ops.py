"""The cases of ``python -m bench ops`` for pytest-benchmark, which compares commits.

    pytest bench/ --benchmark-only [-k "OP and VERSION"] [--benchmark-autosave] [--benchmark-compare]

A version is checked here too before it is timed. Versions are not interleaved: for ratios between them use
``python -m bench ops``.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.measure import evaluate, extra_memory
from bench.ops import timing
from bench.ops.cases import WORK, Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = [
    pytest.param(case, version, id=f"{case.op}-{case.name}-{version.name}".replace(" ", "_"))
    for case in timing.selected(DEVICE)
    for version in timing.versions_of(case.op, DEVICE)
]


@functools.lru_cache(maxsize=1)
def arguments_and_truth(case: Case) -> tuple[tuple[Any, ...], list[Tensor]]:
    torch.compiler.reset()
    arguments = timing.arguments_of(case, DEVICE)
    return arguments, timing.expected(case, arguments)


@pytest.mark.benchmark(min_rounds=3, warmup=False)  # the check was the warm-up
@pytest.mark.parametrize(("case", "version"), VERSIONS)
def test_op(case: Case, version: timing.Version, benchmark: BenchmarkFixture) -> None:
    arguments, truth = arguments_and_truth(case)
    verdict = timing.check(case.op, version, arguments, truth)
    if "skipped" in verdict:
        pytest.skip(verdict["skipped"])
    assert "wrong" not in verdict, verdict["wrong"]

    benchmark.group = f"{case.op}, {case.name}"
    benchmark.extra_info |= verdict | WORK[case.op](truth, *arguments)._asdict()
    benchmark.extra_info["extra_bytes"] = extra_memory(version.call, arguments, DEVICE)

    def run() -> None:
        evaluate(version.call, arguments)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
