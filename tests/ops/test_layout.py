"""One stem per op in every tree: reference, op, test, benchmark; and the folders that stand alone do."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from bench.ops.cases import CASES
from bench.ops.tiny import CASES as TINY
from muse_fast import ops
from muse_fast.kernels import reference as kernels_reference
from muse_fast.ops import backends, reference

ROOT = Path(__file__).parents[2]
PLUMBING = {"__init__", "backends", "reference"}


def test_every_file_of_ops_is_an_op() -> None:
    files = {path.stem for path in (ROOT / "muse_fast" / "ops").glob("*.py")} - PLUMBING
    assert files == set(ops.__all__) == set(backends.HOMES) == {case.op for case in CASES} == {case.op for case in TINY}


@pytest.mark.parametrize("stem", ops.__all__)
def test_one_stem_in_every_tree(stem: str) -> None:
    op = getattr(ops, stem)
    assert op.__module__ == f"muse_fast.ops.{stem}"
    assert (ROOT / "tests" / "ops" / f"test_{stem}.py").is_file()
    public = list(inspect.signature(op).parameters)
    assert public == [*inspect.signature(getattr(reference, stem)).parameters, "backend"]
    sources = {
        "cpp": ROOT / "csrc" / f"{stem}.cpp",
        "cuda": ROOT / "csrc" / f"{stem}.cu",
        "triton": ROOT / "kernels" / "fused" / f"{stem}.py",
        "blocked": ROOT / "kernels" / "blocked" / f"{stem}.py",
    }
    for backend, source in sources.items():
        assert source.is_file() == (backend in backends.HOMES[stem]), source


def test_references_share_nothing_with_the_fast_backends() -> None:
    for module, allowed in ((reference, "muse_fast.kernels.reference"), (kernels_reference, None)):
        imports = [
            line.split()[1] for line in inspect.getsource(module).splitlines() if line.startswith(("import", "from"))
        ]
        ours = {name for name in imports if name.startswith((".", "muse_fast", "kernels"))}
        assert ours <= {allowed}
