"""One stem per op in every tree: reference, op, test, benchmark; and the folders that stand alone do."""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cases import CASES
from muse_fast import ops
from muse_fast.ops import backends, reference

ROOT = Path(__file__).parents[1]
PLUMBING = {"__init__", "backends", "reference"}


def test_every_file_of_ops_is_an_op() -> None:
    files = {path.stem for path in (ROOT / "muse_fast" / "ops").glob("*.py")} - PLUMBING
    assert files == set(ops.__all__) == set(backends.HOMES) == {case.op for case in CASES}


@pytest.mark.parametrize("stem", ops.__all__)
def test_one_stem_in_every_tree(stem: str) -> None:
    op = getattr(ops, stem)
    assert op.__module__ == f"muse_fast.ops.{stem}"
    assert (ROOT / "tests" / f"test_{stem}.py").is_file()
    public = list(inspect.signature(op).parameters)
    assert public == [*inspect.signature(getattr(reference, stem)).parameters, "backend"]
    sources = {
        "cpp": ROOT / "csrc" / f"{stem}.cpp",
        "cuda": ROOT / "csrc" / f"{stem}.cu",
        "triton": ROOT / "kernels" / f"{stem}.py",
    }
    for backend, source in sources.items():
        assert source.is_file() == (backend in backends.HOMES[stem]), source


def test_references_share_nothing_with_the_fast_backends() -> None:
    imports = [line for line in inspect.getsource(reference).splitlines() if line.startswith(("import", "from"))]
    assert not [line for line in imports if "muse_fast" in line or "kernels" in line]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_run_from_a_bare_copy(tmp_path: Path) -> None:
    """In a folder that holds nothing else, with no way back to the checkout."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["TRITON_INTERPRET"] = "1"
    code = """
import sys, torch
from kernels.dino_loss import dino_loss
rows = torch.arange(2)
loss = dino_loss(torch.zeros(2, 8), torch.randn(2, 8), torch.zeros(8), rows, rows, 0.1, 0.04)
torch.testing.assert_close(loss, torch.full((2,), 8.0).log())
assert "muse_fast" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
