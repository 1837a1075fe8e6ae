"""The doctor names what is installed, the backend of each op, and what is wrong with a ROI set."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from muse_fast import doctor
from muse_fast.data.roiset import RoiSetWriter
from muse_fast.errors import UserError
from muse_fast.ops import backends


@pytest.fixture
def roiset(tmp_path: Path) -> Path:
    out = tmp_path / "set"
    with RoiSetWriter(out, provenance={"source": "test"}) as writer:
        for slide in ("a", "b"):
            image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            writer.add(image, mpp=0.25, xy=np.array([[3.5, 4.5]], np.float32), slide=slide)
    return out


def test_prints_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"│ torch +│ {re.escape(torch.__version__.partition('+')[0])}", shown)
    assert re.search(r"│ CPU threads +│ \d+ usable", shown)
    for row in backends.table():
        assert re.search(rf"│ {row.op} +│ {row.device} +│ {row.backend} ", shown)


def test_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", {"xformers": ("no-such-distribution",)})
    monkeypatch.setattr(backends, "library_error", lambda: "it was not built")
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"│ xformers +│ not installed", shown)
    assert re.search(r"│ match_nuclei +│ cpu +│ reference +│ not cpp: it was not built", shown)


def test_sound_roiset(roiset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([str(roiset)]) == 0
    assert "2 ROIs" in capsys.readouterr().out


def test_damaged_roiset(roiset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    largest = max((path for path in roiset.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-100] ^= 0xFF  # inside the last JPEG
    largest.write_bytes(content)
    assert doctor.main([str(roiset)]) == 1
    shown = capsys.readouterr().out
    assert "1 problems" in shown
    assert str(roiset) in shown


def test_missing_roiset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        doctor.main([str(tmp_path / "nowhere")])


def test_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "muse_fast.doctor", str(tmp_path / "nowhere")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert finished.returncode == 2
    assert "nowhere" in finished.stderr
    assert "Traceback" not in finished.stderr
