"""`make lint` refuses an import against the layout, and two files that import each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint_imports(checkout: Path) -> tuple[int, str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [*command, "--no-cache"], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "muse_fast", tmp_path / "muse_fast", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_layout_is_kept(checkout: Path) -> None:
    code, said = lint_imports(checkout)
    assert code == 0, said


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("images/slide.py", "from muse_fast.sources.base import Source", "muse_fast.images is not allowed to import"),
        ("errors.py", "from muse_fast import batch", "muse_fast.errors is not allowed to import muse_fast.batch"),
        ("runtime/atomic.py", "from muse_fast.runtime import checkpoint", "could be made acyclic"),
    ],
    ids=["upwards", "in the vocabulary", "each other"],
)
def test_a_planted_import_is_refused(checkout: Path, file: str, line: str, reason: str) -> None:
    with open(checkout / "muse_fast" / file, "a") as source:
        source.write(f"\n{line}\n")
    code, said = lint_imports(checkout)
    assert code != 0
    assert reason in said


@pytest.mark.parametrize("folder", sorted({p.parent for p in (ROOT / "muse_fast").rglob("*.py")}), ids=lambda p: p.name)
def test_a_folder_can_be_surveyed(folder: Path) -> None:
    files = list(folder.glob("*.py"))
    assert len(files) <= 18
    assert sum(len(path.read_text().splitlines()) for path in files) <= 2_750
