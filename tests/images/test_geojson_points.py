"""GeoJSON read as points: centroids in closed form, every form that programs write, and invalid files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.images.geojson import GeoPoints, centroid_and_area, read_geojson_points, read_shapes, share_inside

SQUARE = [[2, 3], [6, 3], [6, 7], [2, 7], [2, 3]]


def ring(*corners: tuple[float, float]) -> np.ndarray:
    return np.array(corners, np.float64)


def item(kind: str = "Point", coordinates: Any = (1.5, 2.5), **more: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": {}} | more


def nested(*geometries: Any) -> dict[str, Any]:
    return {"type": "GeometryCollection", "geometries": geometries}


def points_of(path: Path, multi: str = "auto", mpp: float = 1.0) -> GeoPoints:
    return read_geojson_points(path, mpp, multi)


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


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
        item() | {"geometry": nested(nested(item("Point")["geometry"]))},
        [item(), item("Polygon", []), item("MultiPoint", []), {"type": "Feature"}],  # empty is like null
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
        "nested geometries",
        "empty",
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
        np.testing.assert_array_equal(points_of(path).xy, [[1.5, 2.5]])


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
    points = points_of(written(tmp_path, [item(properties=properties)]))
    assert points.label == [label]
    assert points.where == ["feature 1"]


@pytest.mark.parametrize("key", ["objectType", "object_type"])
@pytest.mark.parametrize("inside", [True, False], ids=["in properties", "next to properties"])
def test_forms_of_the_object_type(tmp_path: Path, key: str, inside: bool) -> None:
    kind = {key: "detection"}
    detection = item(properties=kind) if inside else item(**kind)
    note = item(coordinates=(9, 9), properties={key: "annotation"})
    points = points_of(written(tmp_path, [note, detection]))
    np.testing.assert_array_equal(points.xy, [[1.5, 2.5]])
    assert points.left_out == {"annotation beside detections": 1}
    assert points.where == ["feature 2"]


def test_a_cell_is_placed_by_its_nucleus(tmp_path: Path) -> None:
    cell = item("Polygon", [SQUARE], nucleusGeometry={"type": "Point", "coordinates": [3, 3]})
    path = written(tmp_path, [cell])
    np.testing.assert_array_equal(points_of(path).xy, [[3, 3]])
    (shape,) = read_shapes(path)
    assert len(shape.polygons) == 1


@pytest.mark.parametrize("mpp", [0.25, 1.0])
@pytest.mark.parametrize("kind", ["detection", "cell", "annotation"])
def test_a_nucleus_in_parts(tmp_path: Path, kind: str, mpp: float) -> None:
    """Two squares of 4 um are one nucleus if the gap between them is at most 2 um, else two."""
    properties = {"objectType": kind, "classification": {"name": "Tumor"}}
    other = item("Polygon", [box(50, 50, 54, 54)], properties=properties)
    for gap, one, expected in ((1.9, True, [[6.95, 3]]), (2.1, False, [[4, 3], [10.1, 3]])):
        parts = np.array([[box(2, 1, 6, 5)], [box(6 + gap, 1, 10 + gap, 5)]]) / mpp
        path = written(tmp_path, [other, item("MultiPolygon", parts.tolist(), properties=properties)])
        found = points_of(path, mpp=mpp)
        np.testing.assert_allclose(found.xy[1:] * mpp, expected)
        assert found.label == ["Tumor"] * len(found.xy)
        assert len(points_of(path, "one", mpp).xy) == 2 and len(points_of(path, "each", mpp).xy) == 3
        assert (len(found.xy) == 2) == one


def test_parts_in_a_row(tmp_path: Path) -> None:
    """Four parts are one nucleus if each is close to another; of five, each is one."""
    other = item("Polygon", [box(50, 50, 54, 54)])
    for count, expected in ((4, [[6.5, 2]]), (5, [[2 + 3 * i, 2] for i in range(5)])):
        row = [[box(1 + 3 * i, 1, 3 + 3 * i, 3)] for i in range(count)]
        found = points_of(written(tmp_path, [other, item("MultiPolygon", row)]))
        np.testing.assert_allclose(found.xy[1:], expected)
    hollow = [box(0, 0, 9, 9), box(3, 3, 6, 6)]
    inner = [box(3.5, 3.5, 5.5, 5.5)]
    found = points_of(written(tmp_path, [other, item("MultiPolygon", [hollow, inner])]))
    np.testing.assert_allclose(found.xy[1:], [[4.5, 4.5]])


def cellvit(kind: str, **nuclei: list[Any]) -> list[dict[str, Any]]:
    """The layout of CellViT: a list with one annotation per class, with all its nuclei."""
    return [
        item(
            kind, shapes, properties={"objectType": "annotation", "classification": {"name": name, "color": [1, 2, 3]}}
        )
        for name, shapes in nuclei.items()
    ]


def test_one_feature_per_class(tmp_path: Path) -> None:
    """CellViT's files have a nucleus per part, also where two of a class touch, or a class has only one."""
    outlines = {
        "Neoplastic": [[box(4 * i, 8 * i, 4 * i + 6, 8 * i + 6)] for i in range(50)],
        "Inflammatory": [[box(100, 10, 106, 16)], [box(106, 10, 112, 16)]],  # neighbours that touch
        "Dead": [[box(200, 10, 206, 16)]],
    }
    centres = {name: [np.mean(part[0][:4], axis=0).tolist() for part in parts] for name, parts in outlines.items()}
    expected = [(name, tuple(centre)) for name, found in centres.items() for centre in found]
    for content in (cellvit("MultiPolygon", **outlines), cellvit("MultiPoint", **centres)):
        for container in (content, {"type": "FeatureCollection", "features": content}):
            found = points_of(written(tmp_path, container))
            assert list(zip(found.label, map(tuple, found.xy.tolist()), strict=True)) == expected
    touching = cellvit("MultiPolygon", Inflammatory=outlines["Inflammatory"], Dead=outlines["Dead"])
    assert len(points_of(written(tmp_path, touching)).xy) == 3
    assert len(points_of(written(tmp_path, [*touching, touching[1]])).xy) == 3  # two features of a class: QuPath's


def test_classes_of_tiatoolbox(tmp_path: Path) -> None:
    """``type`` is the class: a name, or a number without a dictionary of classes; for QuPath it may be the object's."""
    outline = [box(0, 0, 6, 6)]
    content = {
        "type": "FeatureCollection",
        "features": [
            item("Polygon", outline, properties={"type": "neoplastic epithelial", "prob": 0.9, "box": [0, 0, 6, 6]}),
            item("Polygon", outline, properties={"type": 3, "prob": 0.8}),
            item("Point", (1, 1), properties={"type": 0, "prob": 0.8}),
            item("Point", (1, 1), properties={"type": None}),
            item("Polygon", outline, properties={"type": "detection", "classification": {"name": "Tumor"}}),
            item("Polygon", outline, properties={"type": "cell"}),
            item("Polygon", outline, properties={"type": "annotation"}),
        ],
    }
    found = points_of(written(tmp_path, content))
    assert found.label == ["neoplastic epithelial", "3", "0", "", "Tumor", ""]
    assert found.left_out == {"annotation beside detections": 1}
    assert found.labels(["0", "3", "Tumor", "neoplastic epithelial"]).tolist() == [3, 1, 0, -1, 2, -1]


def test_objects_of_early_qupath(tmp_path: Path) -> None:
    """Version 0.2 wrote the type as ``id``; later ids are UUIDs or the user's."""
    kinds = ("PathDetectionObject", "PathCellObject", "PathAnnotationObject", "TMACoreObject", "PathTileObject", "a")
    found = points_of(written(tmp_path, [item(coordinates=(i, 0), id=kind) for i, kind in enumerate(kinds)]))
    assert found.xy[:, 0].tolist() == [0, 1, 5]
    assert found.left_out == {"annotation beside detections": 1, "TMA core": 1, "tile": 1}


# --------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("record", [None, {"frame": "qupath", "origin": [300, 200]}])
def test_positions_are_in_level_0_pixels(tmp_path: Path, record: Any) -> None:
    """A file counts from where it says or, if it does not, from where the caller says."""
    content = {"type": "FeatureCollection", "features": [item(), item("Polygon", [SQUARE])]}
    path = written(tmp_path, content | ({"muse_fast": record} if record else {}))
    left, top = record["origin"] if record else (7, 9)
    assert read_geojson_points(path, 1.0, origin=(7, 9)).xy.tolist() == [[left + 1.5, top + 2.5], [left + 4, top + 5]]
    point, square = read_shapes(path, origin=(7, 9))
    assert point.points.tolist() == [[left + 1.5, top + 2.5]]
    assert square.polygons[0][0][0].tolist() == [left + 2, top + 3]


@pytest.mark.parametrize("record", [3, {}, {"origin": [1]}, {"origin": ["a", 1]}, {"origin": [1, None]}])
def test_a_damaged_record_is_refused(tmp_path: Path, record: Any) -> None:
    with pytest.raises(UserError, match=r"a.geojson: muse_fast is .*, expected its origin \[x, y\] in level-0 pixels"):
        points_of(written(tmp_path, {"features": [item()], "muse_fast": record}))


def test_share_inside() -> None:
    square = [ring((0, 0), (10, 0), (10, 10), (0, 10))]
    assert share_inside([square], (0, 0, 100, 100)) == 1
    assert share_inside([square, square], (4, 0, 100, 100)) == pytest.approx(0.6)
    assert share_inside([square], (2, 2, 4, 4)) == 1  # larger than the box on all sides
    assert share_inside([square], (20, 20, 30, 30)) == 0


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
    points = points_of(path)  # of 2,500 um2
    np.testing.assert_allclose(points.xy, [[4, 5]])
    assert points.left_out == {
        "outline too large for a nucleus": 1,
        "TMA core": 1,
        "annotation beside detections": 1,
        "ignored class": 1,
    }
    assert len(points_of(path, mpp=0.8).xy) == 2  # of 1,600 um2


def test_no_nuclei_and_many(tmp_path: Path) -> None:
    points = points_of(written(tmp_path, []))
    assert points.xy.shape == (0, 2)
    coordinates = np.random.default_rng(0).uniform(0, 1e5, (20_000, 2)).tolist()
    points = points_of(written(tmp_path, [item("MultiPoint", coordinates)]))
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
        ([item("Polygon", [[]])], r"feature 1: a polygon of 0 positions"),
        ([item("MultiPolygon", [[]])], r"feature 1: expected the rings of a MultiPolygon"),
        ([item("point")], r"feature 1: a geometry of type 'point', expected Point, MultiPoint, .* GeometryCollection"),
        ([item() | {"geometry": "POINT (1 2)"}], r"feature 1: a geometry of type None"),
        ([item() | {"geometry": {"type": "GeometryCollection"}}], r"feature 1: a GeometryCollection without a list"),
        ([item() | {"properties": "cell"}], r"feature 1: properties are str, expected an object"),
        ([item(coordinates=[10**400, 1])], r"feature 1: expected positions"),
        ([item("Polygon", [[[0, 0], [1, 1]]])], r"feature 1: a polygon of 2 positions, expected at least 3"),
        ([item("MultiPolygon", [SQUARE])], r"feature 1: expected positions|feature 1: expected the rings"),
    ],
)
def test_what_is_not_geojson(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        points_of(written(tmp_path, content))


def test_damaged_gzip_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson.gz"
    whole = gzip.compress(json.dumps([item()] * 99).encode())
    for data in (whole[: len(whole) // 2], b"[]", b"", whole[:20] + b"\x00\xff" + whole[22:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a.geojson.gz: "):
            points_of(path)
    with pytest.raises(UserError, match=r"b.geojson: No such file"):
        points_of(tmp_path / "b.geojson")
