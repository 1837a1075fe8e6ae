from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.exploring import search
from muse_fast.exploring.neighbours import Place, find_neighbours
from muse_fast.exploring.search import find_query, main
from muse_fast.exploring.vectors import VectorFile, open_vectors
from tests.support.vector_files import draw_slide, some_files, write_vectors


@pytest.fixture
def files(tmp_path: Path) -> list[VectorFile]:
    files = some_files(tmp_path, {"a": 7, "b:1": 9, "c": 0})
    for shade, file in zip((60, 120, 180), files, strict=True):
        xy = np.concatenate([np.zeros((0, 2)), *(block.xy for block in file.blocks())])
        draw_slide(file.path.with_suffix(".png"), xy, np.full((len(xy), 3), shade))
    return files


def test_table_and_sheet(files: list[VectorFile], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest nucleus to 105,20 is that at 100,20."""
    out = tmp_path / "found"
    assert main([str(tmp_path), "--like", "b:1:105,20", "--top", "4", "--out", str(out)]) == 0
    query, (expected,) = Place(1, 2), find_neighbours(files, [Place(1, 2)], 4)
    with open(out / "search.csv", newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert [int(row["rank"]) for row in rows] == [0, 1, 2, 3, 4]
    for row, place, value in zip(rows, [query, *expected.places], [1, *expected.similarity], strict=True):
        file = files[place.file]
        assert (row["slide"], row["nucleus"], row["class"]) == (file.slide, f"{file.slide}:{place.row}", "nucleus")
        assert (float(row["x"]), float(row["y"])) == (place.row * 40 + 20, 20)
        assert (float(row["x_um"]), float(row["y_um"])) == (place.row * 20 + 10, 10)
        assert float(row["similarity"]) == pytest.approx(value, abs=1e-6) and row["file"] == str(file.path)
        assert float(row["score"]) == pytest.approx(file.nuclei([place.row])[0].score, abs=1e-4)
    pixels = np.asarray(Image.open(out / "search.png"))
    for rank, place in enumerate([query, *expected.places]):
        middle = pixels[10 + 22 + 10 + 64, 10 + rank * 138 + 64]
        assert (middle == (60, 120)[place.file]).all()
    assert "4 nuclei most similar to b:1:2, of 3 slides" in capsys.readouterr().out


def test_nuclei_without_scores_and_classes(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.h5ad", np.eye(2), kinds=[None, None], score=np.nan)
    search.search(open_vectors([path]), "a:20,20", 1, tmp_path / "found")
    with open(tmp_path / "found" / "search.csv", newline="", encoding="utf-8") as table:
        assert [(row["class"], row["score"]) for row in csv.DictReader(table)] == [("", "")] * 2


@pytest.mark.parametrize(("apart", "allowed"), [("60", range(3, 7)), ("inf", ())])
def test_neighbours_that_are_apart(files: list[VectorFile], tmp_path: Path, apart: str, allowed: Sequence[int]) -> None:
    """The nuclei of a slide are 20 um apart; those of other slides always count."""
    assert main([str(tmp_path), "--like", "a:20,20", "--apart", apart, "--out", str(tmp_path / "found")]) == 0
    with open(tmp_path / "found" / "search.csv", newline="", encoding="utf-8") as table:
        names = [row["nucleus"] for row in csv.DictReader(table)][1:]
    assert sorted(names) == [*(f"a:{row}" for row in allowed), *(f"b:1:{row}" for row in range(9))]


def test_all_nuclei_and_a_long_sheet(files: list[VectorFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MOST_DRAWN", 12)
    search.search(files, "a:20,20", 1000, tmp_path / "found")
    assert len((tmp_path / "found" / "search.csv").read_text().splitlines()) == 1 + 16
    with Image.open(tmp_path / "found" / "search.png") as sheet:
        assert sheet.height == 10 + 22 + 2 * (128 + 44)  # two lines of ten and two


def test_slides_that_have_moved(files: list[VectorFile], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table needs no slides; the crops are grey, and the reason is printed. --slides finds them."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in files:
        slide = file.path.with_suffix(".png")
        slide.rename(moved / slide.name)
    given = [str(tmp_path / "a.h5ad"), "--like", "a:20,20", "--top", "2"]
    assert main([*given, "--out", str(tmp_path / "grey")]) == 0
    assert "no crops of a: " in capsys.readouterr().out
    assert (np.asarray(Image.open(tmp_path / "grey" / "search.png"))[106, 74] == 225).all()
    assert main([*given, "--out", str(tmp_path / "shown"), "--slides", str(moved)]) == 0
    assert "no crops" not in capsys.readouterr().out
    assert (np.asarray(Image.open(tmp_path / "shown" / "search.png"))[106, 74] == 60).all()
    assert (tmp_path / "grey" / "search.csv").read_bytes() == (tmp_path / "shown" / "search.csv").read_bytes()


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ("a:100,90", r"no nucleus within 20 um; the nearest is 35\.0 um \(70 px\) away, at 100\.0,20\.0"),
        ("c:1,1", r"c\.h5ad has no nuclei"),
        ("b1:1,1", r"no slide b1, only a, b:1, c; did you mean 'b:1'\?"),
        ("a", "expected SLIDE:X,Y"),
        ("a:1", "expected SLIDE:X,Y"),
        ("a:1,2,3", "expected SLIDE:X,Y"),
        ("a:1,nan", "expected SLIDE:X,Y"),
        (":1,2", "expected SLIDE:X,Y"),
    ],
)
def test_what_names_no_nucleus(files: list[VectorFile], like: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_query(files, like)


def test_nothing_is_written_on_an_error(files: list[VectorFile], tmp_path: Path) -> None:
    out = tmp_path / "found"
    for arguments, said in (
        (["--like", "a:20,20", "--top", "0"], "--top 0: expected 1 or more"),
        (["--like", "a:20,20", "--apart", "-1"], "--apart -1.0: expected 0 or more um"),
        (["--like", "a:20,20", "--apart", "nan"], "--apart nan: expected 0 or more um"),
        (["--like", "x:20,20"], "no slide x"),
    ):
        with pytest.raises(UserError, match=said):
            main([str(tmp_path), "--out", str(out), *arguments])
        assert not out.exists()
    out.mkdir()
    with pytest.raises(UserError, match="found exists already"):
        main([str(tmp_path), "--out", str(out), "--like", "a:20,20"])
