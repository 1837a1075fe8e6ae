"""Every op has the same name in all folders and lists, and the references share no code with the fast backends."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path

import pytest

from bench.ops.baselines import EAGER, LITERAL
from bench.ops.cases import CASES, WORK
from bench.ops.tiny import CASES as TINY
from muse_fast import ops
from muse_fast.kernels import reference as kernels_reference
from muse_fast.kernels import registration
from muse_fast.ops import backends, reference

ROOT = Path(__file__).parents[2]
PLUMBING = {"__init__", "backends", "reference"}


LISTS = [
    ("muse_fast/ops/__init__.py", ops.__all__),
    ("muse_fast/ops/reference.py", reference.__all__),
    ("muse_fast/ops/backends.py", backends.HOMES),
    ("bench/ops/cases.py", {case.op for case in CASES}),
    ("bench/ops/cases.py", WORK),
    ("bench/ops/baselines.py", LITERAL),
    ("bench/ops/baselines.py", EAGER),
    ("bench/ops/tiny.py", {case.op for case in TINY}),
]


@pytest.mark.parametrize(("place", "names"), LISTS)
def test_every_list_has_every_op(place: str, names: Iterable[str]) -> None:
    """And CONTRIBUTING.md says to add a new op there."""
    assert set(names) == {path.stem for path in (ROOT / "muse_fast" / "ops").glob("*.py")} - PLUMBING
    recipe = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding an operator")[2].partition("\n## ")[0]
    assert f"`{place}`" in recipe


@pytest.mark.parametrize("stem", ops.__all__)
def test_every_op_has_one_name_in_all_folders(stem: str) -> None:
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
        text = source.read_text() if source.is_file() else ""
        if source.suffix in (".cpp", ".cu"):
            assert (f"csrc/{source.name}" in (ROOT / "CMakeLists.txt").read_text()) == source.is_file()
        elif f"def {stem}_bwd(" in text:
            assert f"register_{stem}({stem}_fwd, {stem}_bwd)" in text
            assert hasattr(registration, f"register_{stem}")


def test_references_share_nothing_with_the_fast_backends() -> None:
    for module, allowed in ((reference, "muse_fast.kernels.reference"), (kernels_reference, None)):
        imports = [
            line.split()[1] for line in inspect.getsource(module).splitlines() if line.startswith(("import", "from"))
        ]
        ours = {name for name in imports if name.startswith((".", "muse_fast", "kernels"))}
        assert ours <= {allowed}
