"""GeoJSON that QuPath and GIS tools accept, the table and the picture."""

from __future__ import annotations

import csv
import gzip
import json
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapely.geometry
from PIL import Image

from muse_fast.images.drawing import PALETTE
from muse_fast.images.slide import Frame
from muse_fast.predicting.files import OVERLAY_SIDE, CellFiles, QuPathFile

NAMES = ("tumour", 'odd, "quoted"', "Zelle ä")
WIDTH, HEIGHT = 5000, 4000


def page(width: int = WIDTH, height: int = HEIGHT, corner: tuple[int, int] = (0, 0)) -> SimpleNamespace:
    def thumbnail(um: float) -> np.ndarray:
        return np.full((-int(-height * 0.25 // um), -int(-width * 0.25 // um), 3), 230, np.uint8)

    frame = Frame(*corner, width - corner[0], height - corner[1])
    return SimpleNamespace(width=width, height=height, mpp=0.25, thumbnail=thumbnail, qupath_frame=frame)


def cells(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    xy = rng.uniform(0, 1, (count, 2)) * np.nextafter([WIDTH, HEIGHT], 0)
    return xy, rng.integers(0, len(NAMES), count), rng.uniform(0, 1, count)


def write(folder: Path, parts: list[tuple[np.ndarray, ...]], compress: bool = False, name: str = "slide") -> Path:
    folder.mkdir(exist_ok=True)
    files = CellFiles(folder, page(), name, NAMES, compress)
    for part in parts:
        files.write(*part)
    files.finish()
    return folder


def strict(text: str) -> dict:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_thousand_cells(tmp_path: Path) -> None:
    xy, label, score = cells(1000)
    edge = np.array([[0.0, 0.0], [WIDTH - 1e-9, HEIGHT - 1e-9]])
    xy[:2] = edge
    write(tmp_path / "out", [(xy[:1], label[:1], score[:1]), (xy[1:], label[1:], score[1:])])
    content = strict((tmp_path / "out" / "cells.geojson").read_text("utf-8"))
    assert set(content) == {"type", "muse_fast", "features"} and content["type"] == "FeatureCollection"
    assert content["muse_fast"] == {"frame": "qupath", "origin": [0, 0]}
    features = content["features"]
    assert len(features) == 1000
    assert len({uuid.UUID(feature["id"]) for feature in features}) == 1000
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in features]
    assert {type(shape) for shape in shapes} == {shapely.Point} and all(shape.is_valid for shape in shapes)
    found = np.array([(shape.x, shape.y) for shape in shapes])
    assert (found >= 0).all() and (found < (WIDTH, HEIGHT)).all()
    np.testing.assert_allclose(found, xy, atol=0.0101)
    for feature, kind, value in zip(features, label.tolist(), score.tolist(), strict=True):
        assert set(feature) == {"type", "id", "geometry", "properties"} and feature["type"] == "Feature"
        assert feature["properties"] == {
            "objectType": "detection",
            "classification": {"name": NAMES[kind], "color": list(PALETTE[kind])},
            "measurements": {"score": pytest.approx(value, abs=5.1e-5)},
        }
    assert len(shapely.from_geojson(json.dumps(content)).geoms) == 1000


def test_the_table_agrees(tmp_path: Path) -> None:
    xy, label, score = cells(200)
    folder = write(tmp_path / "out", [(xy, label, score)])
    with open(folder / "cells.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["x", "y", "label", "class", "score"]
    np.testing.assert_allclose([(float(row["x"]), float(row["y"])) for row in rows], xy, atol=0.0051)
    assert [int(row["label"]) for row in rows] == label.tolist()
    assert [row["class"] for row in rows] == [NAMES[kind] for kind in label]
    np.testing.assert_allclose([float(row["score"]) for row in rows], score, atol=5.1e-5)


def test_a_page_that_qupath_crops(tmp_path: Path) -> None:
    """The GeoJSON counts from the corner of the crop, the table from both corners."""
    xy, label, score = cells(200)
    files = CellFiles(tmp_path, page(corner=(1200, 300)), "slide", NAMES, False)
    files.write(xy, label, score)
    files.finish()
    content = strict((tmp_path / "cells.geojson").read_text("utf-8"))
    assert content["muse_fast"] == {"frame": "qupath", "origin": [1200, 300]}
    found = np.array([feature["geometry"]["coordinates"] for feature in content["features"]])
    np.testing.assert_allclose(found, xy - (1200, 300), atol=0.0051)
    with open(tmp_path / "cells.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["x", "y", "label", "class", "score", "x_qupath", "y_qupath"]
    assert [[float(row["x_qupath"]), float(row["y_qupath"])] for row in rows] == found.tolist()
    np.testing.assert_allclose([(float(row["x"]), float(row["y"])) for row in rows], xy, atol=0.0051)


def test_bytes_depend_only_on_the_cells_and_the_name(tmp_path: Path) -> None:
    one, again = (write(tmp_path / name, [cells(50)], compress=True) for name in ("one", "again"))
    plain, other = write(tmp_path / "plain", [cells(50)]), write(tmp_path / "other", [cells(50)], name="slide2")
    zipped = (one / "cells.geojson.gz").read_bytes()
    assert zipped == (again / "cells.geojson.gz").read_bytes()
    assert gzip.decompress(zipped) == (plain / "cells.geojson").read_bytes()
    ids = [{f["id"] for f in strict((p / "cells.geojson").read_text("utf-8"))["features"]} for p in (plain, other)]
    assert not ids[0] & ids[1]


def test_measurements_of_any_size(tmp_path: Path) -> None:
    values = np.array([3e-6, 12345.75, -0.5, 1e30, np.nan, np.inf, 0.9877])
    with open(tmp_path / "a.geojson", "w") as text:
        file = QuPathFile(text, "slide", (0, 0), [], "depth")
        file.write(np.zeros((7, 2)), np.full(7, -1), values.astype(np.float32), range(7))
        file.finish()
    found = [one["properties"]["measurements"] for one in strict((tmp_path / "a.geojson").read_text())["features"]]
    assert found == [{"depth": value} if np.isfinite(value) else {} for value in values.tolist()]


@pytest.mark.parametrize("count", [0, 1])
def test_no_cells_and_one(tmp_path: Path, count: int) -> None:
    folder = write(tmp_path / "out", [cells(count)])
    assert len(strict((folder / "cells.geojson").read_text("utf-8"))["features"]) == count
    assert len((folder / "cells.csv").read_text("utf-8").splitlines()) == 1 + count


def test_the_picture(tmp_path: Path) -> None:
    xy = np.array([[2500.0, 2000.0], [1000.0, 3000.0]])
    folder = write(tmp_path / "out", [(xy, np.array([1, 2]), np.ones(2))])
    with Image.open(folder / "overlay.png") as picture:
        width, height = picture.size
        shrink = WIDTH / OVERLAY_SIDE
        assert width == OVERLAY_SIDE and HEIGHT / shrink < height < HEIGHT / shrink + 60
        for (x, y), kind in zip(xy, (1, 2), strict=True):
            assert picture.getpixel((round(x / shrink), round(y / shrink))) == PALETTE[kind]
        assert picture.getpixel((100, 100)) == (230, 230, 230)
