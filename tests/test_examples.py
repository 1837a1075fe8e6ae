"""The examples run from a checkout as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_patch_dino_loss() -> None:
    """All three ways give the published loss: the script fails where one does not."""
    script = ROOT / "examples" / "patch_dino_loss.py"
    finished = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    losses = {line.split()[0]: line.split()[1] for line in finished.stdout.splitlines()[3:7]}
    assert list(losses) == ["as_published", "by_function", "by_module", "without_logits"]
    assert max(map(float, losses.values())) - min(map(float, losses.values())) < 1e-3
