"""Odd and bad coordinates have a defined result wherever they are read, and no NaN or infinity reaches a view.

``test_roiset.py`` and ``test_sources.py`` test the plain cases (NaN, infinite, negative, outside, on the edge, x and y
swapped, text, wrong shapes and headers, a byte-order mark); these are the others.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from muse_fast.config import ViewsConfig
from muse_fast.errors import UserError
from muse_fast.images.points_csv import read_points
from muse_fast.roiset.records import Roi, nucleus_records
from muse_fast.sources import open_source
from muse_fast.views.plan import draw_plan

WIDTH, HEIGHT = 200, 160
HUGE = np.iinfo(np.int64).max


def records(xy: object) -> np.ndarray:
    return nucleus_records(xy, None, None, WIDTH, HEIGHT, (), "the ROI")["xy"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("xy", "message"),
    [
        pytest.param([[-np.inf, 1]], "row 0 .* -inf, 1", id="minus infinity"),
        pytest.param(np.float16([[1, 1], [np.nan, 1]]), "row 1 .* nan, 1", id="NaN in half precision"),
        pytest.param([[np.nextafter(0, -1), 1]], "row 0 ", id="just below 0"),
        pytest.param([[1, np.nextafter(HEIGHT, 999)]], "row 0 ", id="just beyond the edge"),
        pytest.param([[HUGE, 1]], r"row 0 .* 9\.2", id="largest whole number"),
        pytest.param(np.array([[2**64 - 1, 1]], np.uint64), "row 0 ", id="minus one as unsigned"),
        pytest.param([[2**70, 1]], "object, expected numbers", id="beyond 64 bits"),
        pytest.param([[1, None]], "object, expected numbers", id="missing value"),
        pytest.param([{"x": 1, "y": 2}], "object, expected numbers", id="records in place of pairs"),
        pytest.param(None, "object, expected numbers", id="nothing"),
        pytest.param([[1, 2], [3]], "xy has rows of different lengths", id="missing coordinate"),
        pytest.param([["NaN", "1"]], "expected numbers", id="text that Python parses as a number"),
        pytest.param([[1 + 2j, 0]], "complex128, expected numbers", id="complex"),
        pytest.param([[True, False]], "bool, expected numbers", id="a mask"),
        pytest.param(np.ones((2, 5, 2)), r"shape \[2, 5, 2\]", id="a batch"),
        pytest.param(np.ones((2, 7)), r"shape \[2, 7\]", id="transposed"),
        pytest.param(5, r"shape \[\]", id="a number"),
    ],
)
def test_refused_by_the_writer(xy: object, message: str) -> None:
    with pytest.raises(UserError, match=f"the ROI: .*{message}"):
        records(xy)


@pytest.mark.parametrize(
    ("xy", "kept"),
    [
        pytest.param([], np.zeros((0, 2)), id="no nuclei"),
        pytest.param(np.zeros((0, 2)), np.zeros((0, 2)), id="no nuclei, with columns"),
        pytest.param([[1, 2]], [[1, 2]], id="one nucleus"),
        pytest.param([[0, 0]], [[0, 0]], id="the first corner"),
        pytest.param([[-0.0, 0]], [[0, 0]], id="minus zero"),
        pytest.param([[5e-324, 1]], [[0, 1]], id="just above 0"),
        pytest.param([[3, 4], [3, 4], [3, 4]], [[3, 4]] * 3, id="duplicates are separate nuclei"),
        pytest.param(np.array([[1, 2]], np.uint8), [[1, 2]], id="bytes"),
        pytest.param(np.asfortranarray([[1.0, 2], [3, 4]]), [[1, 2], [3, 4]], id="column by column"),
        pytest.param(np.array([[1, 9, 2, 9]], np.float32)[:, ::2], [[1, 2]], id="strided"),
        pytest.param(np.array([[1.5, 2.5]], ">f8"), [[1.5, 2.5]], id="big-endian"),
    ],
)
def test_kept_by_the_writer(xy: object, kept: object) -> None:
    np.testing.assert_array_equal(records(xy), np.float32(kept))


def csv_points(folder: Path, text: str | bytes) -> np.ndarray:
    path = folder / "a.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_points(path, WIDTH, HEIGHT, 2).xy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("x,y\n1e400,2\n", "row 2: x is '1e400'", id="overflows to infinity"),
        pytest.param("x,y\n-1e-9,2\n", "row 2: x is '-1e-9'", id="just below 0"),
        pytest.param("x,y\n1,160.0\n", "row 2: y is '160.0'", id="on the bottom edge"),
        pytest.param("x,y\n1_0,2\n", "row 2: x is '1_0'", id="what Python parses as ten"),
        pytest.param("x,y\n0x10,2\n", "row 2: x is '0x10'", id="hexadecimal"),
        pytest.param("x,y\n1+2j,2\n", r"row 2: x is '1\+2j'", id="complex"),
        pytest.param("x,y\nNone,2\n", "row 2: x is 'None'", id="None"),
        pytest.param("x,y\nTrue,2\n", "row 2: x is 'True'", id="True"),
        pytest.param("x,y\n1,5;2,5\n", "row 2: 3 values", id="decimal comma"),
        pytest.param("x;y\n1;2\n", "row 1: the header is 'x;y', .*commas, not by semicolons", id="semicolons"),
        pytest.param("X,Y\n1,2\n", "row 1: the header is 'X,Y'", id="capitals"),
        pytest.param("id,x,y\n3000000000,1,2\n", "row 1: the header is 'id,x,y'", id="ids, which sets do not have"),
        pytest.param("x,y,label\n1,2,2147483648\n", "row 2: label is '2147483648'", id="label beyond 31 bits"),
        pytest.param("x,y,label\n1,2,nan\n", "row 2: label is 'nan'", id="label NaN"),
        pytest.param('x,y\n"1,2\n3,4\n', "row 2: not a CSV", id="unclosed quote"),
        pytest.param("x,y\n" + "1" * 200_000 + ",2\n", "row 2: not a CSV", id="value of 200,000 digits"),
        pytest.param("x,y\n\0001,2\n", "row 2: ", id="NUL"),
        pytest.param("x,y\n1,2\n\x1a\n", "row 3: 1 values", id="end-of-file mark of DOS"),
        pytest.param("x,y\n1,2\n".encode("utf-16"), "row 1: not text in UTF-8", id="UTF-16"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(99), "row 1: not text in UTF-8", id="a picture"),
    ],
)
def test_refused_in_a_csv(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"a\.csv, {message}"):
        csv_points(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        pytest.param("x,y\n", np.zeros((0, 2)), id="no nuclei"),
        pytest.param("x,y\n1,2\n", [[1, 2]], id="one nucleus"),
        pytest.param("x,y\n1,2\n1,2\n", [[1, 2]] * 2, id="duplicates are separate nuclei"),
        pytest.param("x,y\n-0.0,0\n", [[0, 0]], id="minus zero"),
        pytest.param("x,y\n1e2,+2.50\n", [[100, 2.5]], id="exponent and sign"),
        pytest.param("\ufeffy,x\r\n2,1\r\n", [[1, 2]], id="byte-order mark, columns swapped"),
    ],
)
def test_kept_from_a_csv(tmp_path: Path, text: str, kept: object) -> None:
    np.testing.assert_array_equal(csv_points(tmp_path, text), np.float32(kept))


def test_a_long_csv(tmp_path: Path) -> None:
    """``test_roiset.py`` tests a million nuclei."""
    xy = np.random.default_rng(0).integers(0, HEIGHT, (100_000, 2))
    text = "x,y\n" + "\n".join(f"{x},{y}" for x, y in xy.tolist())
    np.testing.assert_array_equal(csv_points(tmp_path, text), xy)


def test_a_folder_in_place_of_a_csv(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(UserError, match=r"a\.csv is missing"):
        open_source(f"points:{tmp_path}", mpp=0.5)


@given(st.text("0123456789.-+einfa_, \n\"'", max_size=40) | st.text(max_size=20))
def test_a_csv_yields_points_inside_or_is_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        xy = csv_points(folder, ("x,y\n" + text).encode(errors="replace"))
    except UserError as error:
        assert "a.csv, row " in str(error)  # noqa: PT017
        return
    assert xy.dtype == np.float32 and ((xy >= 0) & (xy < [WIDTH, HEIGHT])).all()


# ----------------------------------------------------------------------------------------------------------- views

ANY = st.floats(width=32) | st.floats(-5, 205, width=32)
SQUARE = 160


@given(arrays(np.float32, st.tuples(st.integers(0, 60), st.just(2)), elements=ANY), st.integers(0, 2**31))
@example(np.array([[1e-22, 80.0], [80.0, 1e-22], [159.99999, 80.0]], np.float32), 0)  # a flip rounds it onto the border
@example(np.array([[0.0, 0.0], [160.0, 80.0]], np.float32), 1)
def test_views_contain_only_points_inside_them_whatever_a_roi_contains(xy: np.ndarray, seed: int) -> None:
    """Even if a set has correct hashes but bad points, NaN, infinite and outside points are in no view."""
    nothing = np.zeros(len(xy), np.float32)
    roi = Roi(3, b"", SQUARE, SQUARE, 0.25, "s", "", (0, 0), xy, nothing.astype(np.int16), nothing, Path("set"))
    config = ViewsConfig(global_size=64, local_size=32, num_locals=4)
    plan = draw_plan(roi, 0, seed, config)
    nuclei = plan.nuclei()
    points, index, offsets = nuclei.xy.numpy(), nuclei.index.numpy(), nuclei.offsets.numpy()
    assert offsets[0] == 0 and offsets[-1] == len(points) == len(index) and (np.diff(offsets) >= 0).all()
    for view, box in enumerate(plan.boxes):
        rows = slice(offsets[view], offsets[view + 1])
        assert ((points[rows] >= 0) & (points[rows] < box.size)).all()
        right, bottom = box.x + box.side, box.y + box.side
        inside = [i for i, (x, y) in enumerate(xy.tolist()) if box.x <= x < right and box.y <= y < bottom]
        assert index[rows].tolist() == inside
    finite = np.isfinite(xy).all(axis=1)
    moved = draw_plan(dataclasses.replace(roi, xy=xy[finite]), 0, seed, config).nuclei()
    np.testing.assert_array_equal(moved.xy.numpy(), points)  # the others have no effect
