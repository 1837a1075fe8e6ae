"""The user's files of nuclei: the same result from three formats, and invalid files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.images.nuclei_files import SUFFIXES
from muse_fast.images.nuclei_files import read_nuclei as read_file
from muse_fast.images.points import Points
from muse_fast.images.slide import Frame, Level, Slide

h5py = pytest.importorskip("h5py")


class Page(Slide):
    """A slide without pixels; QuPath shows the part from ``corner`` on."""

    def __init__(self, width: int, height: int, mpp: float = 0.5, corner: tuple[int, int] = (0, 0)) -> None:
        self.levels, self.mpp = (Level(width, height, 1.0),), mpp
        self._corner = corner

    @property
    def qupath_frame(self) -> Frame:
        return Frame(*self._corner, self.width - self._corner[0], self.height - self._corner[1])

    def header_mpp(self) -> None: ...

    def read_stored(self, *region: int) -> np.ndarray: ...  # type: ignore[empty-body, override]

    def close(self) -> None: ...


def read_nuclei(path: Path, width: int, height: int, labels: tuple[str, ...] = (), multi: str = "auto") -> Points:
    return read_file(path, Page(width, height), labels, multi)[0]


XY = np.array([[3.5, 4.25], [0, 0], [99.5, 59.5]])


def write_h5(path: Path, rows: object, key: str = "prediction") -> Path:
    with h5py.File(path, "w") as file:
        file[key] = rows
    return path


def geojson(path: Path, *features: tuple[dict, str]) -> Path:
    rows = [
        {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}} if name else {}}
        for geometry, name in features
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": rows}))
    return path


def square(x: float, y: float) -> dict:
    ring = [[x - 1, y - 1], [x + 1, y - 1], [x + 1, y + 1], [x - 1, y + 1], [x - 1, y - 1]]
    return {"type": "Polygon", "coordinates": [ring]}


def point(x: float, y: float) -> dict:
    return {"type": "Point", "coordinates": [x, y]}


def test_all_formats_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y,label,score\n" + "".join(f"{x},{y},1,0.5\n" for x, y in XY))
    write_h5(tmp_path / "a.h5", np.concatenate([XY, np.ones((3, 2))], axis=1))
    several = {"type": "MultiPoint", "coordinates": XY[1:].tolist()}
    geojson(tmp_path / "a.geojson", (square(*XY[0]), "b"), (several, "a"))
    table, prediction, shapes = (read_nuclei(tmp_path / f"a.{s}", 100, 60) for s in ("csv", "h5", "geojson"))
    for nuclei in (table, prediction, shapes):
        np.testing.assert_array_equal(nuclei.xy, XY.astype(np.float32))
    assert table.label is not None and table.label.tolist() == [1, 1, 1]
    assert table.score is not None and table.score.tolist() == [0.5, 0.5, 0.5]
    assert prediction.label is shapes.label is None

    named = read_nuclei(tmp_path / "a.geojson", 100, 60, ("a", "b"))
    assert named.label is not None and named.label.tolist() == [1, 0, 0]


def test_files_from_predict_are_read(tmp_path: Path) -> None:
    """The names of classes decide, not their numbers, as the detector numbers them in its own order."""
    head = "x,y,label,class,score,x_qupath,y_qupath"
    (tmp_path / "a.csv").write_text(f'{head}\n3.25,4.50,1,"odd, first",0.5,1.25,2.50\n7,8,0,even,1,5.00,6.00\n')
    (tmp_path / "b.csv").write_text("x,y,label,score\n3.25,4.50,0,0.5\n7,8,1,1\n")
    labels = ("odd, first", "even")
    with_names, without = (read_nuclei(tmp_path / f"{name}.csv", 100, 60, labels) for name in "ab")
    for column in ("xy", "label", "score"):
        np.testing.assert_array_equal(getattr(with_names, column), getattr(without, column))
    nuclei, left_out = read_file(tmp_path / "a.csv", Page(100, 60))
    assert nuclei.label is not None and nuclei.label.tolist() == [1, 0]
    assert left_out == {"name of a class, as labels= is not given": 2}
    with pytest.raises(UserError, match=r"a.csv: class 'even', expected Even, odd; did you mean 'Even'"):
        read_nuclei(tmp_path / "a.csv", 100, 60, ("Even", "odd"))


def test_geojson_is_read_as_by_the_source_qupath(tmp_path: Path) -> None:
    """Parts, TMA cores, annotations, tissue and ignored classes; gzip is read."""
    both = {"type": "MultiPolygon", "coordinates": [square(*xy)["coordinates"] for xy in ((10, 10), (30, 20))]}
    path = geojson(tmp_path / "a.geojson", (both, ""))
    assert read_nuclei(path, 100, 60, multi="one").xy.tolist() == [[20, 15]]
    for multi in ("auto", "each"):
        assert read_nuclei(path, 100, 60, multi=multi).xy.tolist() == [[10, 10], [30, 20]]

    content = json.loads(path.read_text())
    content["features"] = [
        {"type": "Feature", "geometry": square(x, 9), "properties": {"objectType": kind, "classification": name}}
        for x, kind, name in (
            (10, "detection", "a"),
            (20, "annotation", "Region"),
            (30, "tmaCore", None),
            (40, "detection", "Ignore*"),
        )
    ]
    (tmp_path / "b.geojson.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
    nuclei, left_out = read_file(tmp_path / "b.geojson.gz", Page(100, 60), ("a",))
    assert nuclei.xy.tolist() == [[10, 9]] and nuclei.label is not None and nuclei.label.tolist() == [0]
    assert left_out == {"annotation beside detections": 1, "TMA core": 1, "ignored class": 1}
    assert len(read_file(path, Page(100, 60, 50.0), multi="each")[0]) == 0  # squares of 100 um
    assert ".geojson.gz" in SUFFIXES
    geojson(path, (point(1, 2), "a"), (point(3, 4), "b"), (point(5, 6), ""))
    assert read_file(path, Page(100, 60))[1] == {"name of a class, as labels= is not given": 2}


def test_a_centre_beyond_the_edge_is_counted(tmp_path: Path) -> None:
    """An outline may cross the border, so its centre may lie outside; more than a tenth belong to something else."""
    inside = [[x, 30.0] for x in range(5, 95, 5)]
    for outside, refused in (([[100.5, 30]], False), ([[100.5, 30], [50, -1], [50, 60]], True)):
        rows = [*inside, *outside]
        geojson(tmp_path / "a.geojson", *((point(*xy), "a") for xy in rows))
        write_h5(tmp_path / "a.h5", np.array(rows))
        for path in (tmp_path / "a.geojson", tmp_path / "a.h5"):
            if refused:
                message = (
                    rf"{path.name}: 3 of 21 nuclei lie outside the slide of 100 x 60 px \(the first at 100.5, 30\)"
                )
                with pytest.raises(UserError, match=message + "; expected level-0 pixels"):
                    read_nuclei(path, 100, 60)
                continue
            nuclei, left_out = read_file(path, Page(100, 60), ("a",))
            assert nuclei.xy.tolist() == inside and left_out == {"nucleus outside the slide": 1}


def test_geojson_counts_from_the_corner_that_qupath_shows(tmp_path: Path) -> None:
    """QuPath's file, ours with its record, and one in level-0 pixels; tables are in level-0 pixels."""
    page = Page(1000, 600, corner=(300, 200))
    level0 = np.array([[301.5, 202.25], [900, 500]])
    counted = [point(*xy) for xy in (level0 - (300, 200)).tolist()]
    path = geojson(tmp_path / "a.geojson", *((one, "") for one in counted))
    np.testing.assert_array_equal(read_file(path, page)[0].xy, level0)
    record = {"muse_fast": {"frame": "qupath", "origin": [300, 200]}}
    recorded = tmp_path / "b.geojson"
    recorded.write_text(json.dumps(json.loads(path.read_text()) | record))
    for frame in ("qupath", "level0"):
        np.testing.assert_array_equal(read_file(recorded, page, frame=frame)[0].xy, level0)
    geojson(path, *((point(*xy), "") for xy in level0.tolist()))
    np.testing.assert_array_equal(read_file(path, page, frame="level0")[0].xy, level0)
    (tmp_path / "a.csv").write_text("x,y\n301.5,202.25\n900,500\n")
    np.testing.assert_array_equal(read_file(tmp_path / "a.csv", page)[0].xy, level0)
    np.testing.assert_array_equal(read_file(write_h5(tmp_path / "a.h5", level0), page)[0].xy, level0)

    many = np.stack([np.arange(400.0, 980, 20), np.full(29, 300.0)], axis=1)
    geojson(path, *((point(*xy), "") for xy in many.tolist()))
    message = r"lie outside the part that QuPath shows, 700 x 400 px at 300, 200 .*; give frame=level0 if they count"
    with pytest.raises(UserError, match=message):
        read_file(path, page)


def test_files_without_nuclei(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n")
    write_h5(tmp_path / "a.h5", np.zeros((0, 2)))
    geojson(tmp_path / "a.geojson")
    for suffix in ("csv", "h5", "geojson"):
        assert read_nuclei(tmp_path / f"a.{suffix}", 100, 60, ("a",)).xy.shape == (0, 2)


def test_within() -> None:
    nuclei = Points(XY.astype(np.float32), np.arange(3, dtype=np.int16), None).within(0, 4, 60)
    assert nuclei.xy.tolist() == [[3.5, 0.25]]
    assert nuclei.label is not None and nuclei.label.tolist() == [0] and nuclei.score is None
    assert len(Points(np.array([[60.0, 4]], np.float32)).within(0, 4, 60)) == 0  # the right edge is outside


@pytest.mark.parametrize(
    ("rows", "key", "message"),
    [
        ([[1.0, 2]], "cells", r"a.h5: 'prediction' is missing, expected a dataset .* found cells"),
        ([1.0, 2], "prediction", r"a.h5: 'prediction' is of shape \[2\]"),
        ([[1.0, 2], [np.nan, 2]], "prediction", r"a.h5: nucleus 2 is at x, y = nan, 2"),
        ([[b"a", b"b"]], "prediction", r"a.h5: not a readable HDF5 file of numbers"),
    ],
)
def test_invalid_hdf5_is_refused(tmp_path: Path, rows: object, key: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_nuclei(write_h5(tmp_path / "a.h5", rows, key), 100, 60)


def test_other_invalid_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_text("not hdf5")
    with pytest.raises(UserError, match=r"a.h5: not a readable HDF5"):
        read_nuclei(tmp_path / "a.h5", 100, 60)
    geojson(tmp_path / "a.geojson", (point(10, 3), "Tumour"))
    with pytest.raises(UserError, match=r"a.geojson, feature 1: class 'Tumour', expected tumour, stroma; did you mean"):
        read_nuclei(tmp_path / "a.geojson", 100, 60, ("tumour", "stroma"))
    (tmp_path / "a.csv").write_text("x,y\n3,60\n")
    with pytest.raises(UserError, match=r"a.csv, row 2: y is '60'"):
        read_nuclei(tmp_path / "a.csv", 100, 60)
