"""Slides that QuPath crops: what it shows us and what we show it are in the same place, in every command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast import evaluate, prepare
from muse_fast.images.points_csv import write_points
from muse_fast.images.slide import Frame, open_slide
from muse_fast.predict import main as predict
from muse_fast.predicting import run as predicting
from muse_fast.sources import open_source
from tests.support.planted import DotDetector, page_of_dots, scattered
from tests.support.small_slides import write_scn, write_slide

CORNER, SIZE = (310, 205), (1100, 900)  # of the scanned part, and of the slide
WIDTH, HEIGHT = 640, 520
EVERYTHING = {"roi_um": 100, "min_tissue": 0, "min_nuclei": 0, "max_unscanned": 1}


@pytest.fixture
def dots() -> np.ndarray:
    """Positions in the scanned part, where QuPath shows them."""
    return scattered(WIDTH, HEIGHT, 30.0)


@pytest.fixture
def slide(tmp_path: Path, dots: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(predicting, "open_detector", lambda weights, device: DotDetector(0.5))
    return write_scn(tmp_path / "slides" / "s.scn", page_of_dots(WIDTH, HEIGHT, dots, 2.5), CORNER, SIZE)


def geojson(path: Path, xy: np.ndarray, **record: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": one},
            "properties": {"objectType": "detection"},
        }
        for one in xy.tolist()
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features} | record))
    return path


def nuclei(slide: Path, folder: Path, **options: object) -> np.ndarray:
    """Nuclei of all ROIs in level-0 pixels, sorted."""
    source = open_source(f"wsi:{slide}", **EVERYTHING, nuclei=str(folder), **options)
    found = [item.xy.astype(np.float64) + item.origin for item in source]
    assert not source.refused, source.refused  # type: ignore[attr-defined]
    return by_place(np.concatenate(found))


def by_place(xy: np.ndarray) -> np.ndarray:
    return xy[np.lexsort(xy.round(1).T)]


def test_the_frame_is_that_of_qupath(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of QuPath's OpenslideImageServer: the bounds, if all four are whole numbers; else all of the slide."""
    whole = Frame(0, 0, *SIZE)
    opened = open_slide(slide)
    assert opened.qupath_frame == Frame(*CORNER, WIDTH, HEIGHT) and opened.frame("level0") == whole
    assert opened.frame("qupath").box == (310, 205, 950, 725)
    given = dict(opened._handle.properties)  # type: ignore[attr-defined]
    for changes in ({"openslide.bounds-x": "310.5"}, {"openslide.bounds-height": ""}, {"openslide.bounds-y": None}):
        properties = {key: value for key, value in (given | changes).items() if value is not None}
        monkeypatch.setattr(opened, "_handle", type("Handle", (), {"properties": properties, "close": opened.close}))
        assert opened.qupath_frame == whole
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    plain = write_slide(tmp_path / "a.tif", np.zeros((20, 30, 3), np.uint8))
    for path in (tmp_path / "a.png", plain):
        assert open_slide(path, 0.5).qupath_frame == Frame(0, 0, 30, 20)


def test_predict(slide: Path, dots: np.ndarray, tmp_path: Path) -> None:
    """QuPath shows only the scanned part: the GeoJSON is that of an image of just this part."""
    write_slide(tmp_path / "crop" / "s.tif", page_of_dots(WIDTH, HEIGHT, dots, 2.5))
    found = {}
    for name, path in (("slide", slide), ("part", tmp_path / "crop")):
        assert predict(["--weights", "dots", "--out", str(tmp_path / name), str(path), "tissue=false"]) == 0
        content = json.loads((tmp_path / name / "s" / "cells.geojson").read_text())
        found[name] = np.array([one["geometry"]["coordinates"] for one in content["features"]])
        assert content["muse_fast"]["origin"] == (list(CORNER) if name == "slide" else [0, 0])
    assert len(dots) > 50
    np.testing.assert_allclose(by_place(found["slide"]), by_place(dots), atol=0.1)
    np.testing.assert_allclose(by_place(found["slide"]), by_place(found["part"]), atol=0.1)
    with open(tmp_path / "slide" / "s" / "cells.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([(float(row["x"]), float(row["y"])) for row in rows], found["slide"] + CORNER, atol=1e-9)
    np.testing.assert_allclose([(float(row["x_qupath"]), float(row["y_qupath"])) for row in rows], found["slide"])
    assert json.loads((tmp_path / "slide" / "s" / "summary.json").read_text())["qupath_frame"] == [
        *CORNER,
        WIDTH,
        HEIGHT,
    ]

    # What predict wrote is read back, by `nuclei=` in both formats, and by `evaluate points`.
    truth = dots + CORNER
    for name in ("cells.csv", "cells.geojson"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / f"s.{name.partition('.')[2]}").write_bytes((tmp_path / "slide" / "s" / name).read_bytes())
        np.testing.assert_allclose(nuclei(slide, folder), within_rois(truth), atol=0.1)
    write_points(tmp_path / "truth" / "s.csv", truth, np.arange(len(truth)) % 2, np.ones(len(truth)))
    words = ["--truth", str(tmp_path / "truth"), "--mpp", "0.5", "--ignore-labels", "--draws", "9"]
    report = tmp_path / "scores.json"
    assert evaluate.main(["points", "--predictions", str(tmp_path / "slide"), *words, "--json", str(report)]) == 0
    for one in json.loads(report.read_text())["protocols"].values():
        assert [one["detection"][key] for key in ("tp", "fp", "fn")] == [len(dots), 0, 0]


def within_rois(xy: np.ndarray) -> np.ndarray:
    """Those in whole squares of 200 px, sorted."""
    return by_place(xy[(xy < np.array(SIZE) // 200 * 200).all(axis=1)])


def test_nuclei_from_qupath(slide: Path, dots: np.ndarray, tmp_path: Path) -> None:
    expected = within_rois(dots + CORNER)
    geojson(tmp_path / "qupath" / "s.geojson", dots)
    geojson(tmp_path / "ours" / "s.geojson", dots, muse_fast={"frame": "qupath", "origin": CORNER})
    path = geojson(tmp_path / "level0" / "s.geojson", dots + CORNER)
    np.testing.assert_allclose(nuclei(slide, tmp_path / "qupath"), expected, atol=1e-3)
    for frame in ("qupath", "level0"):
        np.testing.assert_allclose(nuclei(slide, tmp_path / "ours", frame=frame), expected, atol=1e-3)
    np.testing.assert_allclose(nuclei(slide, path.parent, frame="level0"), expected, atol=1e-3)
    source = open_source(f"wsi:{slide}", nuclei=str(path.parent))
    assert list(source) == []
    assert "lie outside the part that QuPath shows" in source.refused[slide]  # type: ignore[attr-defined]
    assert "give frame=level0" in source.refused[slide]  # type: ignore[attr-defined]


def test_tissue_to_qupath_and_back(slide: Path, dots: np.ndarray, tmp_path: Path) -> None:
    """`prepare` writes outlines in QuPath's frame; with or without the record, they give the same ROIs again."""
    geojson(tmp_path / "cells" / "s.geojson", dots)
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[205:605, 310:810] = 255
    (tmp_path / "mask").mkdir()
    Image.fromarray(mask).save(tmp_path / "mask" / "s.png")

    def prepared(name: str, tissue: Path) -> Path:
        out = tmp_path / name
        words = ["roi_um=50", "min_tissue=0.9", "min_nuclei=1", f"nuclei={tmp_path / 'cells'}", "workers=0"]
        assert prepare.main([f"wsi:{slide}", str(out), *words, f"tissue={tissue}"]) == 0
        return out

    first = prepared("first", tmp_path / "mask")
    content = json.loads((first / "tissue" / "s.geojson").read_text())
    assert content["muse_fast"] == {"frame": "qupath", "origin": [*CORNER]}
    x, y = np.array(content["features"][0]["geometry"]["coordinates"][0]).T
    np.testing.assert_allclose((x.min(), x.max(), y.min(), y.max()), (0, 500, 0, 400), atol=16)  # a pixel of the mask
    with Image.open(first / "report" / "s.jpg") as picture:
        cyan = (np.abs(np.asarray(picture).astype(int) - (0, 190, 230)) < 60).all(axis=2)
        rows, columns = (cyan.any(axis=axis).nonzero()[0] * SIZE[0] / picture.width for axis in (1, 0))
    np.testing.assert_allclose((columns.min(), columns.max(), rows.min(), rows.max()), (310, 810, 205, 605), atol=20)

    again = prepared("again", first / "tissue")
    (tmp_path / "edited").mkdir()
    del content["muse_fast"]  # QuPath does not keep it
    (tmp_path / "edited" / "s.geojson").write_text(json.dumps(content))
    edited = prepared("edited_set", tmp_path / "edited")
    for name in ("index.bin", "nuclei.bin", "shard-00000.bin"):
        assert (first / name).read_bytes() == (again / name).read_bytes() == (edited / name).read_bytes()
