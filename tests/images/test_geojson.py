"""GeoJSON in every form that QuPath and other programs write, and invalid files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.images.geojson import centroid_and_area, read_shapes

POINT = {"type": "Point", "coordinates": [1.5, 2]}
SQUARE = {"type": "Polygon", "coordinates": [[[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]]]}


def feature(geometry: dict, **rest: object) -> dict:
    return {"type": "Feature", "geometry": geometry, **rest}


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [feature(POINT), feature(SQUARE)]},
        [feature(POINT), feature(SQUARE, properties=None)],
        {"type": "GeometryCollection", "geometries": [POINT, SQUARE]},
        [feature({"type": "LineString", "coordinates": [[0, 0], [1, 1]]}), feature(POINT), feature(SQUARE)],
    ],
)
def test_containers(tmp_path: Path, content: object) -> None:
    point, square = read_shapes(written(tmp_path / "a.geojson", content))
    assert point.points.tolist() == [[1.5, 2]] and not point.polygons
    assert [[ring.shape for ring in polygon] for polygon in square.polygons] == [[(5, 2)]]


def test_classes_and_cells(tmp_path: Path) -> None:
    named = {"properties": {"objectType": "cell", "classification": {"name": "Tumor", "color": [200, 0, 0]}}}
    plain = {"properties": {"classification": "Stroma"}}
    small = {"type": "Polygon", "coordinates": [[[1, 1], [2, 1], [2, 2], [1, 2], [1, 1]]]}
    path = written(tmp_path / "a.json", [feature(SQUARE, nucleusGeometry=small, **named), feature(POINT, **plain)])
    assert [shape.label for shape in read_shapes(path)] == ["Tumor", "Stroma"]
    for nuclei, expected in ((False, [2, 2]), (True, [1.5, 1.5])):
        assert centroid_and_area(next(read_shapes(path, nuclei=nuclei)).polygons)[0].tolist() == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", r"a.geojson: not valid JSON"),
        ('{"type": "Topology"}', r"a.geojson: expected GeoJSON"),
        ("[3]", r"a.geojson, feature 1: expected a GeoJSON feature, found int"),
        ([feature(POINT), feature({"type": "Point", "coordinates": [1]})], r"feature 2: expected positions \[x, y\]"),
        ([feature({"type": "Point", "coordinates": None})], r"feature 1: expected positions"),
        ('[{"type": "Feature", "geometry": {"type": "Point", "coordinates": [NaN, 1]}}]', r"finite numbers"),
        (
            [feature({"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]})],
            r"2 positions, expected at least 3",
        ),
        ([feature({"type": "MultiPolygon", "coordinates": [3]})], r"expected the rings of a MultiPolygon"),
    ],
)
def test_invalid_content_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read_shapes(written(tmp_path / "a.geojson", content)))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.geojson: No such file"):
        list(read_shapes(tmp_path / "a.geojson"))


def test_centroid_is_the_mean_of_the_pixels() -> None:
    """Against the mean of a fine grid of points inside, far from the origin, where sums of products lose digits."""
    rng = np.random.default_rng(0)
    shift = np.array([150_000.0, 90_000.0])
    turn = np.sort(rng.uniform(0, 2 * np.pi, 9))
    outline = np.stack([np.cos(turn), np.sin(turn)], axis=1) * rng.uniform(5, 12, (9, 1))
    hole = outline[::-1] * 0.3 + (0.5, -0.4)
    grid = np.stack(np.meshgrid(np.arange(-13, 13, 0.02), np.arange(-13, 13, 0.02)), axis=-1).reshape(-1, 2)
    inside = _inside(outline, grid) & ~_inside(hole, grid)
    expected = grid[inside].mean(axis=0) + shift
    for rings in ([outline, hole], [outline[::-1], hole], [outline, hole[::-1]]):
        np.testing.assert_allclose(centroid_and_area([[ring + shift for ring in rings]])[0], expected, atol=0.01)
    assert np.abs(outline.mean(axis=0) + shift - expected).max() > 0.2  # the mean of the corners is a different point
    line = np.array([[0.0, 0], [2, 2], [4, 4]])
    assert centroid_and_area([[line]])[0].tolist() == [2, 2]


def _inside(ring: np.ndarray, points: np.ndarray) -> np.ndarray:
    from skimage.measure import points_in_poly

    return points_in_poly(points, ring)
