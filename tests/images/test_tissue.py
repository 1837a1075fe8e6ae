"""Tissue found by colour, read from PNG or GeoJSON, and written for QuPath."""

from __future__ import annotations

import gzip
import json
import math
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images.slide import Frame, open_slide
from muse_fast.images.tissue import MASK_UM, SUFFIXES, fill, read_tissue, tissue_mask, trace, write_tissue
from tests.support.small_slides import page_with_tissue, write_slide

WHOLE = Frame(0, 0, 100, 90)


def test_tissue_mask_finds_the_tissue(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "slide.tif", page_with_tissue())
    mask = tissue_mask(open_slide(path).thumbnail(MASK_UM), MASK_UM)
    assert mask.shape == (69, 94)  # ceil(1100 / 16), ceil(1500 / 16)
    true = np.zeros(mask.shape, bool)
    true[3:66, 19:83] = True
    assert (mask != true).mean() < 0.06  # the rim of one mask pixel is 4 %


def test_tissue_mask_of_extreme_slides() -> None:
    noise = np.random.default_rng(0).integers(-2, 3, (60, 60, 3))
    assert not tissue_mask((243 + noise).astype(np.uint8), 8.0).any()  # all glass
    assert not tissue_mask(np.full((60, 60, 3), 255, np.uint8), 8.0).any()
    assert not tissue_mask((4 + noise).astype(np.uint8), 8.0).any()  # black pen
    tissue = page_with_tissue()[40:1064, 300:1324]
    full = np.asarray(Image.fromarray(tissue).resize((64, 64), Image.Resampling.BOX))
    assert tissue_mask(full, 8.0).mean() > 0.95  # all tissue
    speck = np.full((60, 60, 3), 250, np.uint8)
    speck[10:13, 10:13] = (200, 90, 150)
    assert not tissue_mask(speck, 8.0).any()


# ------------------------------------------------------------------------------------------------------- outlines


masks = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1), st.floats(0, 1)).map(
    lambda v: np.random.default_rng(v[2]).random(v[:2]) < v[3]
)


@given(masks)
def test_fill_inverts_trace(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(fill(trace(mask), mask.shape), mask)


@settings(max_examples=settings.default.max_examples // 10)
@given(masks.filter(np.any), st.floats(2.0, 160.0))
def test_a_written_mask_is_read_back(tmp_path_factory: pytest.TempPathFactory, mask: np.ndarray, step: float) -> None:
    path = tmp_path_factory.getbasetemp() / "tissue.geojson"
    write_tissue(path, mask, step, (37, 11))
    whole = Frame(0, 0, *(math.ceil(side * step) for side in mask.shape[::-1]))
    np.testing.assert_array_equal(read_tissue(path, mask.shape, step, whole), mask)


def test_qupath_can_load_the_file(tmp_path: Path) -> None:
    mask = np.zeros((30, 40), bool)
    mask[2:20, 3:30] = True
    mask[8:12, 10:20] = False  # a hole
    mask[25:28, 35:38] = True
    write_tissue(tmp_path / "a.geojson", mask, 16.0)
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    assert [len(feature["geometry"]["coordinates"]) for feature in content["features"]] == [2, 1]  # rings
    for feature in content["features"]:
        assert feature["type"] == "Feature" and uuid.UUID(feature["id"])
        assert feature["geometry"]["type"] == "Polygon"
        assert feature["properties"]["objectType"] == "annotation"
        assert feature["properties"]["classification"]["name"] == "Tissue"
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1] and len(ring) >= 4
    assert len({feature["id"] for feature in content["features"]}) == 2
    x, y = np.array(content["features"][0]["geometry"]["coordinates"][0]).T
    assert (x.min(), x.max(), y.min(), y.max()) == (48, 480, 32, 320)  # level-0 pixels
    write_tissue(tmp_path / "b" / "a.geojson", mask, 16.0)
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "b" / "a.geojson").read_bytes()


def test_edited_outlines_are_read(tmp_path: Path) -> None:
    """A triangle in either orientation, two overlapping polygons, and one larger than the slide."""
    path = tmp_path / "a.geojson"
    triangle = [[0, 0], [80, 0], [0, 80], [0, 0]]
    for ring in (triangle, triangle[::-1]):
        path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
        np.testing.assert_array_equal(
            read_tissue(path, (9, 10), 10.0, WHOLE)[:8, :8], np.tri(8, k=-1, dtype=bool)[::-1]
        )
    squares = [[[[0, 0], [30, 0], [30, 30], [0, 30]]], [[[20, 20], [60, 20], [60, 60], [20, 60]]]]
    path.write_text(json.dumps([{"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": squares}}]))
    expected = np.zeros((9, 10), bool)
    expected[:3, :3] = expected[2:6, 2:6] = True
    np.testing.assert_array_equal(read_tissue(path, (9, 10), 10.0, WHOLE), expected)
    beyond = [[[-1000, -1000], [1e6, -1000], [1e6, 1e6], [-1000, 1e6]]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": beyond}))
    assert read_tissue(path, (9, 10), 10.0, WHOLE).all()


def test_png_masks(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((20, 30)) < 0.5
    fine = mask.repeat(4, axis=0).repeat(4, axis=1)
    path = tmp_path / "a.png"
    for image in (Image.fromarray(fine), Image.fromarray(fine.astype(np.uint8)), Image.fromarray(mask)):  # 1 is tissue
        image.save(path)
        np.testing.assert_array_equal(read_tissue(path, mask.shape, 16.0, WHOLE), mask)
    Image.fromarray(fine.T).save(path)
    with pytest.raises(UserError, match=r"a.png: 80 x 120 px, expected the shape of the whole slide"):
        read_tissue(path, mask.shape, 16.0, WHOLE)
    Image.fromarray(np.zeros((20, 30, 4), np.uint8)).save(path)
    with pytest.raises(UserError, match=r"a.png: RGBA, expected a grey or indexed mask"):
        read_tissue(path, mask.shape, 16.0, WHOLE)
    path.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"a.png: not a readable image"):
        read_tissue(path, mask.shape, 16.0, WHOLE)


def square(left: float, right: float, name: str, kind: str) -> dict:
    outline = [[left, 0], [right, 0], [right, 90], [left, 90], [left, 0]]
    properties = {"objectType": kind, "classification": {"name": name}} if name else {"objectType": kind}
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [outline]},
        "properties": properties,
    }


def test_which_objects_are_tissue(tmp_path: Path) -> None:
    """Annotations; neither TMA cores nor detections. What is marked ``Ignore*`` is not, even inside tissue."""
    path = tmp_path / "a.geojson.gz"
    others = [square(60, 100, "", "tmaCore"), square(60, 100, "Tumor", "detection"), square(60, 100, "Tumor", "cell")]
    left = square(0, 50, "Tissue", "annotation")
    for ignored, columns in (((), range(5)), ((square(50, 100, "Ignore*", "annotation"),), range(5))):
        path.write_bytes(gzip.compress(json.dumps([left, *others, *ignored]).encode()))
        mask = read_tissue(path, (9, 10), 10.0, WHOLE)
        assert mask.any(axis=0).nonzero()[0].tolist() == [*columns] and mask[:, columns].all()
    path.write_bytes(gzip.compress(json.dumps([square(20, 40, "Region*", "annotation"), left]).encode()))
    assert read_tissue(path, (9, 10), 10.0, WHOLE)[4].tolist() == [True, True, False, False, True] + [False] * 5
    path.write_bytes(gzip.compress(json.dumps([*others, square(0, 50, "Ignore*", "annotation")]).encode()))
    with pytest.raises(UserError, match=r"a.geojson.gz: no polygons, expected outlines of tissue: annotations"):
        read_tissue(path, (9, 10), 10.0, WHOLE)
    assert ".geojson.gz" in SUFFIXES


def test_outlines_count_from_the_corner_that_qupath_shows(tmp_path: Path) -> None:
    frame = Frame(40, 20, 60, 70)
    mask = np.zeros((9, 10), bool)
    mask[3:6, 5:9] = True
    path = tmp_path / "a.geojson"
    write_tissue(path, mask, 10.0, frame.origin)
    content = json.loads(path.read_text())
    x, y = np.array(content["features"][0]["geometry"]["coordinates"][0]).T
    assert (x.min(), x.max(), y.min(), y.max()) == (10, 50, 10, 40)
    assert content["muse_fast"] == {"frame": "qupath", "origin": [40, 20]}
    for one in (frame, WHOLE):
        np.testing.assert_array_equal(read_tissue(path, mask.shape, 10.0, one), mask)
    del content["muse_fast"]  # as QuPath writes it
    path.write_text(json.dumps(content))
    np.testing.assert_array_equal(read_tissue(path, mask.shape, 10.0, frame), mask)
    path.write_text(json.dumps([square(61, 100, "Tissue", "annotation")]))
    with pytest.raises(
        UserError, match=r"a.geojson: 100 % of the tissue lies outside the part that QuPath shows, 60 x"
    ):
        read_tissue(path, mask.shape, 10.0, frame)
    Image.fromarray(np.ones((70, 60), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(
        UserError, match=r"expected the shape of the whole slide, not only of the part that QuPath shows"
    ):
        read_tissue(tmp_path / "a.png", (9, 18), 10.0, frame)


def test_outlines_without_polygons_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    path.write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(UserError, match=r"a.geojson: no polygons"):
        read_tissue(path, (9, 10), 10.0, WHOLE)
