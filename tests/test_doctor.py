"""The doctor reports versions, the backend of each op, and problems of ROI sets and runs."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from muse_fast import doctor
from muse_fast.errors import UserError
from muse_fast.ops import backends
from muse_fast.roiset.roiset import RoiSetWriter
from muse_fast.runtime import checkpoint
from torture.rows.checkpoints import save


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


def test_intact_roiset(roiset: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.filterwarnings("ignore:'muse_fast.doctor' found in sys.modules")
def test_runs_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("muse_fast.doctor", run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "nowhere" in said and "Traceback" not in said


# ----------------------------------------------------------------------------------------------------------------- deep


def finished_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step in (1, 2):
        save(folder, step)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    return folder


def test_an_intact_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--deep", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "run with 2 checkpoints, 2 intact" in shown and "no problems" in shown


def test_leftovers_of_killed_runs_are_removed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone, here, host = finished_pid(), os.getppid(), socket.gethostname()
    left = [
        run / "checkpoints" / f".tmp-step-00000003-{host}-{gone}",
        run / f".tmp-summary-{host}-{gone}.json",
        run / f".tmp-metrics-{host}-{gone}.jsonl",
    ]
    kept = run / "checkpoints" / f".tmp-step-00000004-{host}-{here}"
    elsewhere = run / "checkpoints" / f".tmp-step-00000004-another-node-{gone}"
    for path in (left[0], kept, elsewhere):
        path.mkdir()
    for path in left[1:]:
        path.touch()
        os.utime(path, (0, 0))
    others = [run / f".tmp-summary-{host}-{gone}.yaml", run / ".gitignore"]  # too young, and not ours
    for path in others:
        path.touch()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert doctor.main(["--deep", str(run)]) == 0
    shown = capsys.readouterr().out
    assert not any(path.exists() for path in left) and kept.exists() and elsewhere.exists()
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert "7 problems, 7 repaired or left alone" in shown and all(path.exists() for path in others)
    for path in (kept, elsewhere):
        path.rmdir()
    others[0].unlink()
    assert doctor.main(["--deep", str(run)]) == 0 and "no problems" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_reported_and_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint.folder_of(run, 2) / "teacher.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (run / "metrics.jsonl").write_text("no row\n")
    assert doctor.main(["--deep", str(run)]) == 1
    shown = capsys.readouterr().out
    assert "1 intact" in shown and str(file) in shown and "row 1 is not valid JSON" in shown
    assert "2 problems, 0 repaired or left alone" in shown and file.exists()
    checkpoint.folder_of(run, 1).rename(checkpoint.folder_of(run, 7))
    assert doctor.main(["--deep", str(run)]) == 1
    shown = capsys.readouterr().out
    assert "contains step 1" in shown and "no checkpoint is intact" in shown


def test_a_deep_check_of_a_roiset(roiset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--deep", str(roiset)]) == 0
    assert "ROI set of 2 ROIs and 2 nuclei" in capsys.readouterr().out
    left = roiset.parent / f".tmp-{roiset.name}-{socket.gethostname()}-{finished_pid()}"
    left.mkdir()
    (roiset / "shard-00009.bin").touch()
    shard = roiset / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 0xFF
    shard.write_bytes(content)
    assert doctor.main(["--deep", str(roiset)]) == 1
    shown = capsys.readouterr().out
    assert "ROI 1" in shown and "cannot be repaired" in shown and "shard-00009.bin: not a part of the set" in shown
    assert "3 problems, 1 repaired or left alone" in shown and not left.exists()


@pytest.mark.parametrize(("argv", "said"), [(["--deep"], "needs the folder"), (["--deep", "."], "neither a run")])
def test_deep_needs_a_run_or_a_roiset(argv: list[str], said: str, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        doctor.main(argv)
