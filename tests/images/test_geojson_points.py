"""GeoJSON read as points: centroids in closed form, every form that programs write, and invalid files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.images.geojson import centroid_and_area, read_geojson_points, read_shapes

SQUARE = [[2, 3], [6, 3], [6, 7], [2, 7], [2, 3]]


def ring(*corners: tuple[float, float]) -> np.ndarray:
    return np.array(corners, np.float64)


def item(kind: str = "Point", coordinates: Any = (1.5, 2.5), **more: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": {}} | more


def written(tmp_path: Path, content: Any, name: str = "a.geojson") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ----------------------------------------------------------------------------------------------------------- centroids


def test_centroid_of_an_l() -> None:
    """Two rectangles, 4 x 1 and 1 x 2: (4 * (2, .5) + 2 * (.5, 2)) / 6."""
    outline = ring((0, 0), (4, 0), (4, 1), (1, 1), (1, 3), (0, 3), (0, 0))
    expected = np.array([4 * 2 + 2 * 0.5, 4 * 0.5 + 2 * 2]) / 6
    for turned in (outline, outline[::-1], outline[:-1], np.roll(outline[:-1], 2, axis=0)):
        centre, area = centroid_and_area([[turned]])
        assert area == pytest.approx(6)
        np.testing.assert_allclose(centre, expected, rtol=1e-12)


def test_holes_are_subtracted_and_parts_added() -> None:
    outer = ring((0, 0), (10, 0), (10, 10), (0, 10))
    hole = ring((6, 4), (8, 4), (8, 6), (6, 6))
    for one in (hole, hole[::-1]):
        centre, area = centroid_and_area([[outer, one]])
        assert area == pytest.approx(96)
        np.testing.assert_allclose(centre, [(500 - 4 * 7) / 96, 5], rtol=1e-12)
    centre, area = centroid_and_area([[outer], [outer[::-1] + np.array([20, 0])]])
    assert area == pytest.approx(200)
    np.testing.assert_allclose(centre, [15, 5], rtol=1e-12)


def test_centroid_far_from_the_origin() -> None:
    """Coordinates on a slide reach 10^5 while nuclei measure 10: products would lose the digits that matter."""
    far = np.array([2.0**27, 2.0**27 + 2])
    centre, area = centroid_and_area([[ring((0, 0), (8, 0), (8, 4), (0, 4)) + far]])
    assert area == 32
    np.testing.assert_array_equal(centre, far + np.array([4, 2]))


def test_outlines_without_area() -> None:
    """A single point, and a line."""
    for outline, expected in (
        (ring((3, 4), (3, 4), (3, 4)), (3, 4)),
        (ring((0, 0), (4, 2), (8, 4), (0, 0)), (4, 2)),
    ):
        centre, area = centroid_and_area([[outline]])
        np.testing.assert_allclose(centre, expected, atol=1e-9)
        assert area == 0


def test_an_outline_that_crosses_itself() -> None:
    """A bow tie is two triangles, which meet where y = x crosses y = 4.001 - 1.00025 x."""
    meet = 4.001 / 2.00025
    triangles = [((0, 0), (0, 4.001), (meet, meet)), ((4, 4), (4, 0), (meet, meet))]
    areas = np.array([4.001 * meet / 2, 4 * (4 - meet) / 2])
    expected = areas @ np.mean(triangles, axis=1) / areas.sum()
    centre, area = centroid_and_area([[ring((0, 0), (4, 4), (4, 0), (0, 4.001))]])
    np.testing.assert_allclose(centre, expected, atol=1e-9)
    assert area == pytest.approx(areas.sum())


def test_agrees_with_a_raster() -> None:
    """A random star-shaped outline against the mean of the pixels inside it."""
    skimage_draw = pytest.importorskip("skimage.draw")
    rng = np.random.default_rng(0)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 40))
    outline = 500 + (rng.uniform(200, 400, 40) * np.stack([np.cos(angle), np.sin(angle)])).T
    rows, columns = skimage_draw.polygon(outline[:, 1], outline[:, 0])
    centre, area = centroid_and_area([[outline]])
    np.testing.assert_allclose(centre, [columns.mean(), rows.mean()], atol=0.5)
    assert area == pytest.approx(len(rows), rel=0.005)


# --------------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [item()]},
        [item()],
        item(),
        item()["geometry"],
        {"type": "GeometryCollection", "geometries": [item()["geometry"]]},
        [item("LineString", [[0, 0], [9, 9]]), item(), item() | {"geometry": None}],
        "\ufeff" + json.dumps([item()]),
        [item(coordinates=(1.5, 2.5, 0.0))],
        [item("MultiPoint", [[1.5, 2.5]])],
        [item("Polygon", [[[0.5, 1.5], [2.5, 1.5], [2.5, 3.5], [0.5, 3.5], [0.5, 1.5]]])],
    ],
    ids=[
        "collection",
        "list",
        "feature",
        "geometry",
        "geometries",
        "line and no geometry",
        "byte-order mark",
        "third coordinate",
        "MultiPoint",
        "Polygon",
    ],
)
def test_ways_to_write_one_nucleus(tmp_path: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "a.geojson.gz").write_bytes(gzip.compress(text.encode()))
    for path in (written(tmp_path, text), tmp_path / "a.geojson.gz"):
        np.testing.assert_array_equal(read_geojson_points(path).xy, [[1.5, 2.5]])


@pytest.mark.parametrize(
    ("properties", "label"),
    [
        ({"classification": {"name": "Tumor", "color": [1, 2, 3]}}, "Tumor"),
        ({"classification": {"names": ["Tumor", "Positive"]}}, "Tumor: Positive"),
        ({"classification": "Tumor"}, "Tumor"),
        ({"classification": None}, ""),
        ({"classification": {}}, ""),
        ({}, ""),
        (None, ""),
    ],
)
def test_forms_of_a_class(tmp_path: Path, properties: Any, label: str) -> None:
    points = read_geojson_points(written(tmp_path, [item(properties=properties)]))
    assert points.label == [label]
    assert points.where == ["feature 1"]


@pytest.mark.parametrize("key", ["objectType", "object_type"])
@pytest.mark.parametrize("inside", [True, False], ids=["in properties", "next to properties"])
def test_forms_of_the_object_type(tmp_path: Path, key: str, inside: bool) -> None:
    kind = {key: "detection"}
    detection = item(properties=kind) if inside else item(**kind)
    note = item(coordinates=(9, 9), properties={key: "annotation"})
    points = read_geojson_points(written(tmp_path, [note, detection]))
    np.testing.assert_array_equal(points.xy, [[1.5, 2.5]])
    assert points.left_out == {"annotation beside detections": 1}
    assert points.where == ["feature 2"]


def test_a_cell_is_placed_by_its_nucleus(tmp_path: Path) -> None:
    cell = item("Polygon", [SQUARE], nucleusGeometry={"type": "Point", "coordinates": [3, 3]})
    path = written(tmp_path, [cell])
    np.testing.assert_array_equal(read_geojson_points(path).xy, [[3, 3]])
    (shape,) = read_shapes(path)
    assert len(shape.polygons) == 1


def test_multipolygons(tmp_path: Path) -> None:
    """One nucleus in two parts or, as CellViT writes them, all nuclei of a class."""
    shifted = [[x + 10, y] for x, y in SQUARE]
    path = written(tmp_path, [item("MultiPolygon", [[SQUARE], [shifted]])])
    np.testing.assert_allclose(read_geojson_points(path).xy, [[9, 5]])
    points = read_geojson_points(path, "each")
    np.testing.assert_allclose(points.xy, [[4, 5], [14, 5]])
    path = written(tmp_path, [item("MultiPolygon", [[SQUARE]] * 21)])
    with pytest.raises(UserError, match=r"a.geojson, feature 1: a MultiPolygon of 21 parts .* give multi=each"):
        read_geojson_points(path)
    assert len(read_geojson_points(path, "each").xy) == 21


def test_what_is_not_a_nucleus(tmp_path: Path) -> None:
    """TMA cores, annotations beside detections, ignored classes, and outlines as large as tissue."""
    large = [[0, 0], [50, 0], [50, 50], [0, 50], [0, 0]]
    detected = {"objectType": "detection"}
    path = written(
        tmp_path,
        [
            item("Polygon", [SQUARE], properties=detected),
            item("Polygon", [large], properties=detected),
            item("Polygon", [SQUARE], properties={"objectType": "tmaCore"}),
            item("Polygon", [SQUARE], properties={"objectType": "annotation"}),
            item("Polygon", [SQUARE], properties=detected | {"classification": {"name": "Ignore*"}}),
        ],
    )
    points = read_geojson_points(path, max_area=2499)
    np.testing.assert_allclose(points.xy, [[4, 5]])
    assert points.left_out == {
        "outline too large for a nucleus": 1,
        "TMA core": 1,
        "annotation beside detections": 1,
        "ignored class": 1,
    }
    assert len(read_geojson_points(path, max_area=2501).xy) == 2


def test_no_nuclei_and_many(tmp_path: Path) -> None:
    points = read_geojson_points(written(tmp_path, []))
    assert points.xy.shape == (0, 2)
    coordinates = np.random.default_rng(0).uniform(0, 1e5, (20_000, 2)).tolist()
    points = read_geojson_points(written(tmp_path, [item("MultiPoint", coordinates)]))
    np.testing.assert_array_equal(points.xy, coordinates)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"type": "FeatureCollection", "features": [', r"a.geojson: not valid JSON \(.*\), expected GeoJSON"),
        ("", r"not valid JSON"),
        ('"text"', r"expected GeoJSON: a FeatureCollection, a list of features"),
        ({"type": "Topology"}, r"expected GeoJSON"),
        ("[" * 100_000, r"not valid JSON"),
        ([3], r"feature 1: expected a GeoJSON feature, found int"),
        ([item(), item(coordinates=[1])], r"feature 2: expected positions \[x, y\] in pixels"),
        ([item(coordinates="ab")], r"feature 1: expected positions"),
        ([item(coordinates=None)], r"feature 1: expected positions"),
        ("[" + json.dumps(item()).replace("1.5", "NaN") + "]", r"feature 1: expected positions .* finite"),
        ([item("Polygon", [])], r"feature 1: expected the rings of a Polygon"),
        ([item("Polygon", [[[0, 0], [1, 1]]])], r"feature 1: a polygon of 2 positions, expected at least 3"),
        ([item("MultiPolygon", [SQUARE])], r"feature 1: expected positions|feature 1: expected the rings"),
    ],
)
def test_what_is_not_geojson(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_geojson_points(written(tmp_path, content))


def test_damaged_gzip_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson.gz"
    whole = gzip.compress(json.dumps([item()] * 99).encode())
    for data in (whole[: len(whole) // 2], b"[]", b"", whole[:20] + b"\x00\xff" + whole[22:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a.geojson.gz: "):
            read_geojson_points(path)
    with pytest.raises(UserError, match=r"b.geojson: No such file"):
        read_geojson_points(tmp_path / "b.geojson")
