"""The predict command: positions of nuclei, seams, memory, kills, and unusable slides."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muse_fast import evaluate
from muse_fast.finders.classical import detect_nuclei
from muse_fast.images.points import Points
from muse_fast.images.points_csv import write_points
from muse_fast.predict import main as predict_main
from muse_fast.predicting import run as predicting
from muse_fast.runtime.cli import run
from tests.support.dicom import write_series
from tests.support.planted import DotDetector, assert_same_places, page_of_dots, scattered, write_pyramid
from tests.support.small_slides import damage, page_with_tissue, tifffile, write_slide

main = partial(run, predict_main)


def positions(folder: Path) -> np.ndarray:
    """Return the positions ``[n, 2]`` in a finished folder, which table and GeoJSON must agree on."""
    rows = [line.split(",") for line in (folder / "cells.csv").read_text().splitlines()[1:]]
    xy = np.array([(float(row[0]), float(row[1])) for row in rows]).reshape(-1, 2)
    features = json.loads((folder / "cells.geojson").read_text())["features"]
    assert [feature["geometry"]["coordinates"] for feature in features] == xy.tolist()
    return xy


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def refused(out: Path) -> dict[str, str]:
    """Why inputs could not be used, by their names."""
    return {Path(path).name: reason for path, reason in summary(out)["refused"].items()}


def as_set(xy: np.ndarray) -> set[tuple[float, float]]:
    return {tuple(p) for p in xy.tolist()}


def classical(*words: object) -> int:
    return main(["--weights", "classical", *map(str, words)])


@pytest.fixture
def dots(monkeypatch: pytest.MonkeyPatch) -> dict[str, DotDetector]:
    """Let weights ``dots:MPP`` mean a detector of dots; return the detectors that were opened."""
    opened: dict[str, DotDetector] = {}

    def open_dots(weights: str, device: object) -> DotDetector:
        return opened.setdefault(weights, DotDetector(float(weights.removeprefix("dots:"))))

    monkeypatch.setattr(predicting, "open_detector", open_dots)
    return opened


# ------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("mpp", "factors", "detector_mpp"),
    [(0.25, (4,), 0.25), (0.25, (2, 4), 0.5), (0.25, (4,), 0.6), (0.5, (), 0.3), (0.2, (4,), 1.0)],
)
def test_dots_are_found_in_level_0_pixels(
    tmp_path: Path, dots: dict, mpp: float, factors: tuple[int, ...], detector_mpp: float
) -> None:
    width, height = 1403, 1001
    planted = scattered(width, height, 15 / mpp)
    slide = write_pyramid(tmp_path / "s.tif", page_of_dots(width, height, planted, 1.2 / mpp), mpp, factors)
    out = tmp_path / "out"
    assert main(["--weights", f"dots:{detector_mpp}", "--out", str(out), str(slide), "tissue=false", "tile=192"]) == 0
    assert_same_places(positions(out / "s"), planted, 0.5)
    found = summary(out / "s")
    assert found["nuclei"] == len(planted) == sum(found["nuclei_per_class"].values())
    assert found["area_mm2"] == pytest.approx(width * height * mpp**2 / 1e6, rel=1e-4)
    assert found["nuclei_per_mm2"] == pytest.approx(found["nuclei"] / found["area_mm2"], rel=1e-3)
    assert 0 < found["detector_busy"] <= 1
    shapes = {shape[2:] for shape in dots[f"dots:{detector_mpp}"].shapes}
    assert len(shapes) <= 4 and found["tiles"] >= 4  # whole tiles, and smaller ones at the far sides


def test_images_with_a_table(tmp_path: Path, dots: dict) -> None:
    planted = scattered(300, 200, 30)
    for name in ("a.png", "b.tif"):
        Image.fromarray(page_of_dots(300, 200, planted, 2.5)).save(tmp_path / name)
    (tmp_path / "mpp.csv").write_text("image,mpp\na.png,0.5\n")
    out = tmp_path / "out"
    assert main(["--weights", "dots:0.5", "--out", str(out), str(tmp_path), "tissue=false"]) == 2  # b has no mpp
    assert_same_places(positions(out / "a"), planted, 0.1)
    assert list(refused(out)) == ["b.tif"]
    assert "does not give um per pixel" in refused(out)["b.tif"]
    assert not (out / "b").exists()


# ----------------------------------------------------------------------------------------------------------- seams


def test_seams_do_not_show(tmp_path: Path) -> None:
    """Whatever the tiles, the nuclei are those of one detection on the whole page."""
    image = page_with_tissue()[:600, 200:1000]
    slide = write_slide(tmp_path / "s.tif", image)
    whole, _ = detect_nuclei(image, 0.5)
    assert len(whole) > 300
    for tile, extra in ((160, "batch=3"), (256, "readers=1"), (500, "readers=3"), (1024, "batch=1")):
        out = tmp_path / str(tile)
        assert classical("--out", out, slide, f"tile={tile}", "tissue=false", extra) == 0
        assert as_set(positions(out / "s")) == as_set(whole.round(2).astype(float))


def test_a_nucleus_that_tiles_place_differently_is_counted_once(
    tmp_path: Path, dots: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tile errs by up to a pixel, so that at seams two tiles claim a nucleus, or none does."""
    planted = scattered(900, 700, 16)
    slide = write_slide(tmp_path / "s.tif", page_of_dots(900, 700, planted, 1.5))
    detect, rng = DotDetector._detect, np.random.default_rng(0)

    def erring(self: DotDetector, dark: np.ndarray) -> Points:
        points = detect(self, dark)
        error = rng.uniform(-1, 1, 2).astype(np.float32)
        return Points(points.xy + error, points.label, points.score)

    monkeypatch.setattr(DotDetector, "_detect", erring)
    assert main(["--weights", "dots:0.5", "--out", str(tmp_path / "out"), str(slide), "tissue=false", "tile=96"]) == 0
    assert_same_places(positions(tmp_path / "out" / "s"), planted, 1.6)


def test_skipping_glass_does_not_change_the_nuclei(tmp_path: Path) -> None:
    image = np.full((700, 1600, 3), 245, np.uint8)
    image[:, 400:1200] = page_with_tissue(side=512, height=700, width=800)
    slide = write_slide(tmp_path / "s.tif", image)
    results = {}
    for tile in (160, 512):
        assert classical("--out", tmp_path / str(tile), slide, f"tile={tile}") == 0
        results[tile] = as_set(positions(tmp_path / str(tile) / "s"))
    assert results[160] == results[512] and len(results[160]) > 200
    found = summary(tmp_path / "160" / "s")
    assert found["tiles"] < 0.5 * 24 * 10  # a stride of 64
    assert found["area_mm2"] == pytest.approx((512 * 0.5e-3) ** 2, rel=0.15)


# ----------------------------------------------------------------------------------------------- unusual and bad input


@pytest.mark.parametrize("extra", ["tissue=true", "tissue=false"])
def test_an_empty_slide_has_no_nuclei(tmp_path: Path, extra: str) -> None:
    slide = write_slide(tmp_path / "s.tif", np.full((600, 700, 3), 245, np.uint8))
    assert classical("--out", tmp_path / "out", slide, extra) == 0
    assert len(positions(tmp_path / "out" / "s")) == 0
    found = summary(tmp_path / "out" / "s")
    assert found["nuclei"] == found["nuclei_per_mm2"] == 0
    assert (found["tiles"] == 0) == (extra == "tissue=true")


def test_predictions_can_be_scored(tmp_path: Path, dots: dict) -> None:
    """`evaluate points` reads the output folder as it is, including the class names."""
    out, truth, report = tmp_path / "out", tmp_path / "truth", tmp_path / "scores.json"
    (tmp_path / "in").mkdir()
    planted = {"a": scattered(300, 260, 24.0), "b": scattered(200, 220, 24.0, seed=4)}
    for name, xy in planted.items():
        Image.fromarray(page_of_dots(300, 260, xy, 2.5)).save(tmp_path / "in" / f"{name}.png")
    words = ["--weights", "dots:0.5", "--out", str(out), str(tmp_path / "in"), "tissue=false", "mpp=0.5"]
    assert main(words) == 0
    for name, xy in planted.items():
        known = np.vstack([xy, [[297.0, 257.0]]]) if name == "a" else xy  # one that is not found
        write_points(truth / f"{name}.csv", known, np.ones(len(known), int), np.ones(len(known)))
    folders = ["--predictions", str(out), "--truth", str(truth)]
    assert evaluate.main(["points", *folders, "--mpp", "0.5", "--draws", "9", "--json", str(report)]) == 0
    scores = json.loads(report.read_text())
    assert scores["classes"] == ["even, first", 'odd "second"']
    count = sum(map(len, planted.values()))
    for name, one in scores["protocols"].items():
        assert [one["detection"][key] for key in ("tp", "fp", "fn")] == [count, 0, 1], name


def test_one_nucleus(tmp_path: Path, dots: dict) -> None:
    image = page_of_dots(500, 400, np.array([[250.3, 99.9]]), 3.0)
    slide = write_slide(tmp_path / "s.tif", image)
    assert main(["--weights", "dots:0.5", "--out", str(tmp_path / "out"), str(slide), "tissue=false"]) == 0
    assert np.abs(positions(tmp_path / "out" / "s") - [[250.3, 99.9]]).max() < 0.1


def test_bad_slides_are_named_and_the_others_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [
        write_slide(tmp_path / "in" / f"{name}.tif", page_with_tissue(seed)[:300, :500])
        for seed, name in ((0, "a"), (1, "z"))
    ]
    (tmp_path / "in" / "broken.svs").write_bytes(b"no slide")
    write_slide(tmp_path / "in" / "scaleless.tif", page_with_tissue()[:300, :300], None)
    write_slide(tmp_path / "in" / "more" / "a.tif", page_with_tissue()[:300, :300])
    damaged = write_slide(tmp_path / "in" / "damaged.tif", page_with_tissue(), compression="zlib")
    damage(damaged, 7, 8, 9)
    out = tmp_path / "out"
    assert classical("--out", out, tmp_path / "in", "tissue=false", "tile=256") == 2
    reasons = refused(out)
    assert sorted(reasons) == ["a.tif", "broken.svs", "damaged.tif", "scaleless.tif"]
    assert str(tmp_path / "in" / "more" / "a.tif") in summary(out)["refused"]
    assert "has the same name" in reasons["a.tif"]
    assert "OpenSlide cannot read it" in reasons["broken.svs"]
    assert "more than max_unreadable=0.05 of the slide cannot be read" in reasons["damaged.tif"]
    assert "header does not give um per pixel" in reasons["scaleless.tif"]
    assert {path.name for path in out.iterdir()} == {"a", "z", "summary.json", "predict.json"}
    assert all(len(positions(out / path.stem)) for path in good)
    error = capsys.readouterr().err
    assert "4 of 6 inputs could not be used" in error and "broken.svs" in error


def test_damage_within_the_limit_is_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The damaged part lies in several tiles."""
    slide = write_slide(tmp_path / "s.tif", page_with_tissue(), compression="zlib")
    damage(slide, 8)  # of 256 px, at 512, 256
    assert classical("--out", tmp_path / "out", slide, "tile=256", "max_unreadable=0.1") == 0
    found = summary(tmp_path / "out" / "s")
    assert found["unreadable_mm2"] == summary(tmp_path / "out")["unreadable_mm2"] == 0.016384  # 128 um a side
    assert found["nuclei"] > 300
    assert "1/1 s.tif: 0.0164 mm2 unreadable" in (said := capsys.readouterr().out)
    assert "0.0164 mm2 of 1 inputs cannot be read: s.tif" in said


@pytest.mark.parametrize("field", ["score", "xy"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_detections_are_refused(
    tmp_path: Path,
    dots: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    field: str,
    value: float,
) -> None:
    detect = DotDetector._detect

    def broken(self: DotDetector, dark: np.ndarray) -> Points:
        points = detect(self, dark)
        getattr(points, field)[-1:] = value
        return points

    monkeypatch.setattr(DotDetector, "_detect", broken)
    slide = write_slide(tmp_path / "s.tif", page_of_dots(300, 300, scattered(300, 300, 30), 3.0))
    assert main(["--weights", "dots:0.5", "--out", str(tmp_path / "out"), str(slide), "tissue=false"]) == 2
    assert "positions or scores that are not finite" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.json", "predict.json"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tile=60"], "tile=60: expected 64 to 8192"),
        (["tile=64"], "tile=64: expected at least 112, as 40 px"),
        (["batches=2"], "no setting 'batches'; did you mean 'batch'?"),
        (["mpp=40"], "mpp=40.0: expected 0.05 to 5.0 um per pixel"),
        (["mpp=1.5"], "1.5 um/px is too coarse for a network that works at 0.5, expected at most 1"),
        (["absent.svs"], "absent.svs: no such file or folder"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    slide = write_slide(tmp_path / "s.tif", page_with_tissue()[:200, :200])
    assert classical("--out", tmp_path / "out", slide, *words) == 2
    assert message in capsys.readouterr().err
    assert classical("--out", tmp_path / "out", slide) == 0  # the failed command left nothing that prevents this


@pytest.mark.parametrize(("given", "said"), [(0.25, "0.25 um/px as given, though the header says 0.5"), (0.55, "")])
def test_um_per_pixel_unlike_the_header_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: float, said: str
) -> None:
    slide = write_slide(tmp_path / "s.tif", page_with_tissue()[:300, 300:700])
    assert classical("--out", tmp_path / "out", slide, f"mpp={given}") == 0
    assert summary(tmp_path / "out" / "s")["unlike_header"] == said
    assert summary(tmp_path / "out")["unlike_header"] == ({"s.tif": said} if said else {})
    assert ("though the header" in capsys.readouterr().out) == bool(said)
    png = tmp_path / "s.png"  # has no header
    Image.fromarray(page_with_tissue()[:300, 300:700]).save(png)
    assert classical("--out", tmp_path / "png", png, f"mpp={given}") == 0
    assert summary(tmp_path / "png" / "s")["unlike_header"] == ""


# --------------------------------------------------------------------------------------------------- repeated commands


def test_finished_slides_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (
        write_slide(tmp_path / f"{name}.tif", page_with_tissue(i)[:300, :500]) for i, name in enumerate("ab")
    )
    out = tmp_path / "out"
    assert classical("--out", out, first) == 0
    stamp = (out / "a" / "cells.csv").stat().st_mtime_ns
    assert classical("--out", out, first) == 2
    assert "already contains all predictions" in capsys.readouterr().err
    assert classical("--out", out, first, second, "tissue=false") == 2
    assert "made with settings {'tissue': True}, not {'tissue': False}; choose another --out" in capsys.readouterr().err
    record = json.loads((out / "predict.json").read_text())
    old = record["settings"] | {"max_unreadable_tiles": 20}
    del old["max_unreadable"]
    (out / "predict.json").write_text(json.dumps(record | {"settings": old}))
    assert classical("--out", out, first, second) == 2
    said = capsys.readouterr().err
    assert "made with settings {'max_unreadable_tiles': 20}, not {'max_unreadable': 0.05}; choose another --out" in said
    (out / "predict.json").write_text(json.dumps(record))
    assert classical("--out", out, first, second, "batch=1") == 0  # does not change the nuclei
    assert (out / "a" / "cells.csv").stat().st_mtime_ns == stamp
    assert summary(out)["inputs"] == 2
    assert summary(out)["nuclei"] == len(positions(out / "a")) + len(positions(out / "b"))
    (tmp_path / "other").mkdir()
    other = write_slide(tmp_path / "other" / "a.tif", page_with_tissue()[:400, :500])
    assert classical("--out", out, other) == 2
    assert "already exists and belongs to another file" in capsys.readouterr().err


def test_two_commands_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two commands for the same folder, the second to finish a slide takes the result of the first."""
    slides = [write_slide(tmp_path / f"{name}.tif", page_with_tissue(i)[:300, :500]) for i, name in enumerate("ab")]
    out, predict_page = tmp_path / "out", predicting._predict_page

    def while_another_runs(*arguments: Any) -> Any:
        monkeypatch.setattr(predicting, "_predict_page", predict_page)
        assert classical("--out", out, *slides) == 0
        return predict_page(*arguments)

    monkeypatch.setattr(predicting, "_predict_page", while_another_runs)
    assert classical("--out", out, *slides) == 0
    assert "1/2 a.tif: done by another command meanwhile" in capsys.readouterr().out
    assert summary(out)["inputs"] == 2
    assert summary(out)["nuclei"] == len(positions(out / "a")) + len(positions(out / "b")) > 100


def test_records_of_other_versions_and_damaged_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What another version, or a power cut, has left is compared with what is asked for, or named."""
    slide, out = write_slide(tmp_path / "a.tif", page_with_tissue()[:300, :500]), tmp_path / "out"
    assert classical("--out", out, slide) == 0
    record, done = ((path, path.read_text()) for path in (out / "predict.json", out / "a" / "summary.json"))

    def said_after(path: Path, text: str, *settings: str) -> str:
        record[0].write_text(record[1])
        done[0].write_text(done[1])
        path.write_text(text)
        capsys.readouterr()
        assert classical("--out", out, slide, *settings) == 2
        return capsys.readouterr().err

    known, summary = json.loads(record[1]), json.loads(done[1])
    assert "made with seed 1, not None; choose another --out" in said_after(record[0], json.dumps(known | {"seed": 1}))
    for damaged in ("", "null", "[]", record[1][:99]):  # each folder records the same
        assert "already contains all predictions" in said_after(record[0], damaged)
        assert "a already exists and was made with other settings" in said_after(record[0], damaged, "tissue=false")
        assert "a already exists and is not a finished prediction; remove it" in said_after(done[0], damaged)
    record[0].unlink()
    older = json.dumps(summary | {"weights": "nuclei"})
    assert "a already exists and was made with other weights; remove it" in said_after(done[0], older)


def test_the_files_of_a_series_and_copies_are_predicted_once(
    tmp_path: Path, dots: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """A series of three files, and a slide with a copy and a link; repeated, with another copy."""
    planted = [scattered(400, 300, 30, seed=seed) for seed in range(2)]
    pages = [page_of_dots(400, 300, xy, 3.0) for xy in planted]
    folder, out = tmp_path / "in", tmp_path / "out"
    series = write_series(folder, "s", pages[0], 0.5)
    slide = write_slide(folder / "b.tif", pages[1])
    (folder / "copy.tif").write_bytes(slide.read_bytes())
    (folder / "link.tif").symlink_to(slide)
    words = ["--weights", "dots:0.5", "--out", str(out), str(folder), "tissue=false"]
    assert main(words) == 0
    assert {path.name for path in out.iterdir()} == {"b", "s-0", "summary.json", "predict.json"}
    expected = {str(folder / f"{name}.tif"): f"the same slide as {slide}" for name in ("copy", "link")}
    expected |= {str(path): f"the same slide as {series[0]}" for path in series[1:]}
    assert summary(out)["repeated"] == expected and summary(out)["inputs"] == 2
    said = capsys.readouterr().out
    assert f"copy.tif: the same slide as {slide}" in said
    nuclei, before = sum(map(len, planted)), (out / "b" / "cells.csv").stat().st_mtime_ns
    (folder / "a.tif").write_bytes(slide.read_bytes())  # comes before b, which is done
    assert main(words) == 0
    assert summary(out)["repeated"] == expected | {str(folder / "a.tif"): f"the same slide as {slide}"}
    assert (out / "b" / "cells.csv").stat().st_mtime_ns == before and summary(out)["nuclei"] == nuclei
    (folder / "mpp.csv").write_text("image,mpp\nb,0.5\ncopy,0.25\n")
    assert main([*words[:3], str(tmp_path / "new"), *words[4:]]) == 2
    assert "copy.tif: the same slide as" in capsys.readouterr().err
    assert "mpp.csv gives it 0.25 um/px and that 0.5" in refused(tmp_path / "new")["copy.tif"]


def test_a_row_of_the_table_that_was_removed_is_not_ignored(
    tmp_path: Path, dots: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was predicted at the old scale is neither kept silently nor overwritten."""
    folder, out = tmp_path / "in", tmp_path / "out"
    for seed, name in enumerate("ab"):
        write_slide(folder / f"{name}.tif", page_of_dots(300, 300, scattered(300, 300, 40, seed=seed), 3.0))
    (folder / "mpp.csv").write_text("image,mpp\na,0.4\nabsent,0.3\n")
    words = ["--weights", "dots:0.5", "--out", str(out), str(folder), "tissue=false"]
    assert main(words) == 0
    assert summary(out / "a")["mpp"] == 0.4 and summary(out / "b")["mpp"] == pytest.approx(0.5)
    line = f"{folder / 'mpp.csv'}: 1 of 2 rows match no slide or image: absent (row 3)"
    assert f"no effect: {line}" in capsys.readouterr().out and summary(out)["without_effect"] == [line]
    for rows, now in (("a,0.41\n", "0.41 um/px"), ("", "the um/px of the header")):
        (folder / "mpp.csv").write_text(f"image,mpp\n{rows}")
        write_slide(folder / "c.tif", page_of_dots(300, 300, scattered(300, 300, 40, seed=len(rows) + 5), 3.0))
        assert main(words) == 2
        assert f"already exists and was made with 0.4 um/px, not {now}; remove it or" in capsys.readouterr().err
        assert "a.tif" in refused(out) and summary(out)["inputs"] == 2
        shutil.rmtree(out / "c")
    (folder / "mpp.csv").write_text("image,mpp\na,0.4\nb,0.5\n")  # b's header says the same
    (folder / "c.tif").unlink()
    assert main(words) == 2
    assert "b already exists and was made with the um/px of the header, not 0.5 um/px" in capsys.readouterr().err


def test_linked_folders_are_searched(tmp_path: Path, dots: dict) -> None:
    (tmp_path / "in").mkdir()
    write_slide(tmp_path / "batch" / "deep" / "b.tif", page_of_dots(300, 300, scattered(300, 300, 40), 3.0), None)
    (tmp_path / "batch" / "deep" / "mpp.csv").write_text("image,mpp\nb,0.5\n")
    (tmp_path / "batch" / "deep" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "batch")
    assert main(["--weights", "dots:0.5", "--out", str(tmp_path / "out"), str(tmp_path / "in"), "tissue=false"]) == 0
    assert summary(tmp_path / "out" / "b")["mpp"] == 0.5


def in_a_child(pause: float, *words: object, then: str = "") -> list[str]:
    """Return a command line that predicts with `planted.main` and then runs ``then``."""
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})"
    code = f"{path}; from tests.support import planted; code = planted.main({pause})"
    return [sys.executable, "-c", f"{code}; {then}", *map(str, words), "tissue=false"]


def test_a_kill_leaves_no_partial_folder_and_the_command_continues(tmp_path: Path, dots: dict) -> None:
    planted = scattered(1000, 800, 30)
    write_slide(tmp_path / "in" / "a.tif", page_of_dots(200, 200, planted[(planted < 180).all(axis=1)], 3.0))
    write_slide(tmp_path / "in" / "b.tif", page_of_dots(1000, 800, planted, 3.0))
    out = tmp_path / "out"
    words = in_a_child(0.2, "--weights", "dots:0.5", "--out", out, tmp_path / "in", "batch=1", "tile=256")
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not any(
        path.stat().st_size > 1000 for path in out.glob(".tmp-b-*/cells.geojson")
    ):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (out / "a").is_dir() and not (out / "b").exists()
    assert any(out.glob(".tmp-b-*"))
    stamp = (out / "a" / "summary.json").stat().st_mtime_ns
    assert main(["--weights", "dots:0.5", "--out", str(out), str(tmp_path / "in"), "tissue=false", "tile=256"]) == 0
    assert (out / "a" / "summary.json").stat().st_mtime_ns == stamp
    assert {path.name for path in out.iterdir()} == {"a", "b", "summary.json", "predict.json"}
    assert_same_places(positions(out / "b"), planted, 0.1)


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.heavy
def test_memory_does_not_grow_with_the_slide(tmp_path: Path) -> None:
    """The larger slide, read second, has four times the side; its pixels alone would be 113 MB."""
    tile = page_of_dots(256, 256, scattered(256, 256, 60), 4.0)
    words = {}
    for side in (6, 24):
        slide, encoded = tmp_path / f"{side}.tif", zlib.compress(tile.tobytes())
        tifffile.imwrite(
            slide, iter([encoded] * side**2), shape=(256 * side, 256 * side, 3), dtype="uint8", tile=(256, 256),
            photometric="rgb", compression="zlib", resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
        )  # fmt: skip
        out = ["--out", str(tmp_path / "out" / str(side)), str(slide)]
        words[side] = ["--weights", "dots:1.0", *out, "readers=2", "batch=2", "tile=512"]
    then = (
        "import resource; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; first = peak();"
        f"sys.argv[1:] = {[*words[24], 'tissue=false']}; code += planted.main(0.0); print('PEAKS', code, first, peak())"
    )
    done = subprocess.run(in_a_child(0.0, *words[6], then=then), capture_output=True, text=True, check=True)
    code, *peaks = map(int, done.stdout.split("PEAKS ")[1].split())
    assert code == 0, done.stdout
    dots = {side: summary(tmp_path / "out" / str(side) / str(side))["nuclei"] for side in words}
    assert dots[24] == 16 * dots[6] > 2000
    assert peaks[1] < 1.2 * peaks[0], peaks  # the larger fills OpenSlide's caches, 32 MB per handle


# -------------------------------------------------------------------------------------------------------- real data


def test_a_real_slide(shared_data: Path, tmp_path: Path) -> None:
    slide = shared_data / "wsi" / "cmu-1-small-region.svs"
    assert classical("--out", tmp_path, slide, "gzip=true", "tile=512", "batch=2") == 0
    found = summary(tmp_path / slide.stem)
    assert 1500 < found["nuclei"] < 5000
    assert 0.5 < found["area_mm2"] < 0.8
    assert (tmp_path / slide.stem / "cells.geojson.gz").stat().st_size > 10_000
