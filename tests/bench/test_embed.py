"""``python -m bench embed``: its report, and what it compares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import main
from bench.embed import command, timing
from tests.support.thin import thin_networks

SIDE, SQUARE_UM = 320, 60.0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small procedural image, and memory of this process."""
    monkeypatch.setenv("MUSE_FAST_DATA", str(tmp_path / "absent"))
    monkeypatch.setattr(timing, "_SYNTHETIC_SIDE", SIDE)
    monkeypatch.setattr(timing, "memory", timing._memory_here)


@pytest.mark.usefixtures("small")
def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A crop is a forward for each nucleus of the square, windows are few."""
    out = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--rounds", "2", "--square", str(SQUARE_UM), "--window", "128", "320"]
    with thin_networks():
        assert main(["embed", *arguments, "--weights", "random:vit_tiny", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    crop, *maps = report["results"]
    assert [row["version"] for row in report["results"]] == ["crop", "map 128", "map 320"]
    assert crop["forwards"] == crop["nuclei"] > 10 and "speedup" not in crop
    assert maps[0]["nuclei"] == maps[1]["nuclei"] > crop["nuclei"]
    assert maps[0]["nuclei"] > maps[0]["forwards"] > maps[1]["forwards"] == 1
    for row in report["results"]:
        assert row["nuclei_per_s"] == pytest.approx(row["nuclei"] / row["median_ms"] * 1e3)
        assert row["peak_mb"] >= row["loaded_mb"] > 50
    for row in maps:
        assert row["speedup"] == pytest.approx(row["nuclei_per_s"] / crop["nuclei_per_s"])
        assert row["targets"][0]["met"] == (row["speedup"] >= 10)
    shown = capsys.readouterr().out
    assert f"{maps[0]['nuclei']} nuclei, {crop['nuclei']} of them as crops" in shown and "target 10x" in shown


@pytest.mark.usefixtures("small")
def test_nuclei_of_a_square(tmp_path: Path) -> None:
    slide, xy = timing.find_slide(None, tmp_path), np.array([[160.0, 160], [101, 219], [99, 160], [160, 221]])
    assert timing.in_square(slide, xy, SQUARE_UM).tolist() == [True, True, False, False]  # 120 px


@pytest.mark.usefixtures("small")
def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["--rounds", "1"], "--rounds 2 or more"), (["--square", "0.01"], "no nuclei in a")):
        with pytest.raises(SystemExit):
            main(["embed", "--device", "cpu", *arguments])
        assert message in " ".join(capsys.readouterr().err.split())


def test_speedups_compare_with_crops() -> None:
    rows = [{"nuclei_per_s": 5.0}, {"nuclei_per_s": 49.0}, {"nuclei_per_s": 50.0}]
    command.add_speedups(rows)
    assert [row.get("speedup") for row in rows] == [None, 9.8, 10.0]
    assert [row["targets"][0]["met"] for row in rows[1:]] == [False, True]
