"""Triton kernels compiled ahead of time for A100 and H100, which needs no GPU: what the interpreter cannot show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from muse_fast.ops import backends

pytestmark = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))


def test_kernels_compile_for_sm80_and_sm90_without_spills() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    finished = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    rows = [json.loads(line) for line in finished.stdout.splitlines()]
    assert {row["arch"] for row in rows} == {80, 90}
    assert {row["kernel"] for row in rows} == {"row_stats_kernel", "pair_loss_kernel", "student_gradient_kernel"}
    assert [row for row in rows if row["spill_bytes"]] == []
    assert max(row["shared_bytes"] for row in rows) <= 48 * 1024
