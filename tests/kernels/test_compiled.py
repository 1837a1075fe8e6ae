"""Triton kernels compiled ahead of time for A100 and H100, without a GPU: checks that the interpreter cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from muse_fast.ops import backends

pytestmark = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))

SHARED_BYTES_OF_A_BLOCK = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


@pytest.fixture(
    scope="module", params=["one of each form", pytest.param("all", marks=pytest.mark.heavy)], ids=lambda which: which
)
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return a row per kernel, dtype and architecture from compile_kernels.py, which checks that none is missing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    which = ["--all"] if request.param == "all" else []
    finished = subprocess.run([sys.executable, script, *which], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(compiled: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in compiled} == set(SHARED_BYTES_OF_A_BLOCK)
    assert [row for row in compiled if row["stack"]] == []


@pytest.mark.slow
def test_shared_memory_fits(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["shared_bytes"] > SHARED_BYTES_OF_A_BLOCK[row["arch"]]] == []


@pytest.mark.slow
def test_products_run_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    assert [row for row in compiled if row["wants_tensor_cores"] and not row["has_tensor_cores"]] == []
