"""``python -m bench data``: its report, the check of pixels and views, and the placement that it compares with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.__main__ import main
from bench.data import command as data_command
from bench.data import timing
from muse_fast.images.synthetic import synthetic_image
from muse_fast.roiset.records import Roi
from muse_fast.roiset.roiset import RoiSet
from muse_fast.views.plan import draw_plan
from muse_fast.views.renderers import why_not


@pytest.fixture(scope="module")
def roiset(tmp_path_factory: pytest.TempPathFactory) -> RoiSet:
    rois = [synthetic_image(seed, 640, timing.MPP)[:2] for seed in range(2)]
    return timing.write_set(tmp_path_factory.mktemp("bench") / "set", rois, "q80 4:2:0")


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With given images: rows for all stages and both placements, with consistent numbers."""
    (tmp_path / "images").mkdir()
    Image.fromarray(synthetic_image(0, 700, timing.MPP)[0]).save(tmp_path / "images" / "0.png")
    arguments = ["--device", "cpu", "--rois", "1", "--side", "640", "--size", "224", "--rounds", "2"]
    out = tmp_path / "out.json"
    assert main(["data", *arguments, "--images", str(tmp_path / "images"), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [case["encoding"] for case in report["results"]] == list(timing.ENCODINGS)
    assert report["rois"] == {"side": 640, "source": "images"}
    for case in report["results"]:
        rows = {row["version"]: row for row in case["results"]}
        assert {"read, check hash", timing.ALL, timing.SEEN, "crop and resize", "colours"} <= rows.keys()
        assert {f"loader {name}" for name in timing.loaders("cpu")} <= rows.keys()
        assert all(row["roi_per_s"] == pytest.approx(1e3 / row["median_ms"]) for row in rows.values())
        seen = rows[timing.SEEN]
        assert seen["speedup_all"] == pytest.approx(rows[timing.ALL]["median_ms"] / seen["median_ms"])
        assert seen["targets"][0]["met"] == (seen["speedup_all"] >= 3)
        assert 0 < case["anchored"]["rows"] < 1 and case["uniform"]["rows"] <= 1
        assert case["anchored"]["pairs"] > case["uniform"]["pairs"]
    shown = capsys.readouterr().out
    assert "pairs per ROI" in shown and "nvJPEG" not in shown


def test_a_loader_is_timed_without_its_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "spent_milliseconds", lambda call, on_gpu: call())
    assert timing.batch_milliseconds("dali", lambda count: 1000 + 3 * count, "cpu") == 3  # type: ignore[arg-type,return-value]
    assert timing.batch_milliseconds("cpu", lambda count: 3 * count, "cpu") == 3  # type: ignore[arg-type,return-value]


def test_loaders_are_those_that_run_here() -> None:
    found = timing.loaders("cpu")
    assert "cpu" in found and "cuda" not in found
    assert ("dali" in found) == (why_not("dali", torch.device("cpu")) is None)


def test_procedural_images_are_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next(iter(timing.ENCODINGS))
    monkeypatch.setattr(timing, "ENCODINGS", {first: timing.ENCODINGS[first]})
    arguments = ["--device", "cpu", "--rois", "1", "--side", "512", "--size", "224", "--rounds", "2"]
    assert main(["data", *arguments, "--images", str(tmp_path / "absent")]) == 0
    assert "procedural, because" in " ".join(capsys.readouterr().out.split())


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ((["--rounds", "1"], "--rounds 2 or more"), (["--images", str(tmp_path)], "no images in"))
    for arguments, message in cases:
        with pytest.raises(SystemExit):
            main(["data", "--device", "cpu", *arguments])
        assert message in capsys.readouterr().err


def test_wrong_pixels_are_not_timed(roiset: RoiSet, monkeypatch: pytest.MonkeyPatch) -> None:
    decode_rows = Roi.decode_rows

    def off_by_one(roi: Roi, top: int, bottom: int) -> tuple[np.ndarray, int]:
        pixels, first = decode_rows(roi, top, bottom)
        return pixels, first + 1

    monkeypatch.setattr(Roi, "decode_rows", off_by_one)
    case = timing.run_case(roiset, timing.SIZES[224], 1, "cpu")
    (row,) = case["results"]
    assert row["version"] == timing.SEEN and row["wrong"].startswith("ROI 0, epoch 0: pixels of rows")


def test_wrong_views_are_not_timed(roiset: RoiSet, monkeypatch: pytest.MonkeyPatch) -> None:
    render = timing.render
    monkeypatch.setattr(timing, "render", lambda plan, config: render(timing.spread(plan), config))
    plans = [draw_plan(roiset[0], 0, timing.SEED, timing.SIZES[224])]
    assert timing.first_difference(plans, timing.SIZES[224]) == "ROI 0, epoch 0: views differ"


def test_a_missed_target_is_reported() -> None:
    rows = [{"version": timing.SEEN, "speedup_all": 2.9}]
    data_command.add_target(rows, 224)
    assert rows[0]["targets"][0] | {"met": None} == {
        "figure": "speedup_all", "reached": 2.9, "at_least": 3.0, "met": None
    }  # fmt: skip
    assert not rows[0]["targets"][0]["met"]


def test_uniform_views_are_the_same_views_elsewhere(roiset: RoiSet) -> None:
    """Anywhere in the ROI: over many draws they reach its edges, where anchored views seldom are."""
    places = []
    for epoch in range(60):
        plan = draw_plan(roiset[0], epoch, timing.SEED, timing.SIZES[224])
        moved = timing.spread(plan)
        assert [(b.side, b.size, b.flip, b.turns) for b in moved.boxes] == [
            (b.side, b.size, b.flip, b.turns) for b in plan.boxes
        ]
        places += [(box.x / (640 - box.side), box.y / (640 - box.side)) for box in moved.boxes]
    assert 0 <= np.min(places) < 0.02 and 0.98 < np.max(places) <= 1
    np.testing.assert_allclose(np.mean(places, axis=0), 0.5, atol=0.05)
    np.testing.assert_allclose(np.std(places, axis=0), 12**-0.5, atol=0.03)
