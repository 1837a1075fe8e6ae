"""The user's tables: what is not a CSV, and which row belongs to which file."""

from __future__ import annotations

from pathlib import Path

import pytest

from muse_fast.errors import UserError
from muse_fast.images.mpp import MppTables
from muse_fast.images.tables import csv_rows, names_of, read_groups, rows, text_lines


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_mark(tmp_path: Path, ends: str, mark: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes((mark + ends.join(["a, b", "", '"1,5",é', ""])).encode())
    assert list(csv_rows(path)) == [(1, ["a", "b"]), (2, []), (3, ["1,5", "é"])]
    assert list(rows(path, ["a", "b"])) == [(3, {"a": "1,5", "b": "é"})]
    assert list(text_lines(path)) == [(1, "a, b"), (2, ""), (3, '"1,5",é')]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"x,y\n1,2\n', "row 1: not a CSV"),
        (b'x,y\n"1,2\n3,4\n', "row 2: not a CSV"),
        (b'x,y\n1,2\n"3\n,4"\n5,6\n', "row 3: not a CSV .*several lines"),
        (b'x,y\n"1"2,3\n', "row 2: not a CSV"),
        (b"x,y\n" + b"1" * 140_000 + b",2\n", "row 2: not a CSV .*limit"),
        (b"x,y\n1,2\n1,\0\n", "row 3: not a CSV .*NUL"),
        ("x,y\n\n1,µ\n".encode("latin-1"), "row 3: not text in UTF-8; save"),
        ("x,y\n".encode("utf-16"), "row 1: not text in UTF-8; save"),
        (b"x;y\n1;2\n", "row 1: the header is 'x;y', expected x,y; separate values by commas, not by semicolons"),
        (b"x\ty\n1\t2\n", "row 1: the header .* not by tabs"),
        (b"x,y\n1;2\n", "row 2: 1 values, expected x,y; .* not by semicolons"),
        (b"", "row 1: the header is ''"),
    ],
)
def test_what_is_not_a_csv_is_refused_with_its_row(tmp_path: Path, content: bytes, message: str) -> None:
    from muse_fast.images.tables import read_rows

    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"t\.csv, {message}"):
        list(read_rows(path, ("x", "y")))


def test_names_of_a_file() -> None:
    assert names_of(Path("/in/one/a.b.svs"), Path("/in")) == ("one/a.b.svs", "one/a.b", "a.b.svs", "a.b")
    assert names_of(Path("/in/a.svs"), Path("/other")) == ("a.svs", "a", "a.svs", "a")


@pytest.mark.parametrize("name", ["one/a.tif", "one/a", "a.tif", "a", r"one\a.tif", "./one/a.tif"])
def test_a_row_names_a_file_by_path_or_name_with_or_without_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / "mpp.csv").write_text(f"image,mpp\n{name},0.4\nA.TIF,0.3\n")
    tables = MppTables()
    row = tables.find(tmp_path / "one" / "a.tif", tmp_path)
    assert row is not None and row.mpp == 0.4
    assert tables.find(tmp_path / "two" / "b.tif", tmp_path) is None
    assert tables.without_effect() == [f"{tmp_path / 'mpp.csv'}: 1 of 2 rows match no slide or image: A.TIF (row 3)"]


def test_the_nearest_table_that_lists_a_file_counts(tmp_path: Path) -> None:
    for folder, text in (
        ("", "a,0.1\nb,0.2\nc,0.3\n"),
        ("one", "a,0.4\nb,0.5\n"),
        ("one/deep", "a,0.6\n"),
        ("two", "x,1\n"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "mpp.csv").write_text("image,mpp\n" + text)
    tables = MppTables()
    tables.read_all(tmp_path)
    found = [tables.find(tmp_path / "one" / "deep" / f"{name}.svs", tmp_path) for name in "abc"]
    assert [row and row.mpp for row in found] == [0.6, 0.5, 0.3]
    assert tables.find(tmp_path / "one" / "deep" / "c.svs", tmp_path / "one") is None  # above what the user gave
    assert sorted(tables.without_effect()) == [
        f"{tmp_path / 'mpp.csv'}: 2 of 3 rows match no slide or image: a (row 2), b (row 3)",
        f"{tmp_path / 'one' / 'mpp.csv'}: 1 of 2 rows match no slide or image: a (row 2)",
        f"{tmp_path / 'two' / 'mpp.csv'}: 1 of 1 rows match no slide or image: x (row 2)",
    ]


def test_a_given_table_alone(tmp_path: Path) -> None:
    (tmp_path / "mpp.csv").write_text("image,mpp\na,0.1\nb,0.2\n")
    (tmp_path / "own.csv").write_text("image,mpp\na,0.3\n" + "".join(f"s{i},0.5\n" for i in range(7)))
    tables = MppTables(tmp_path / "own.csv")
    tables.read_all(tmp_path)
    row = tables.find(tmp_path / "a.svs", tmp_path)
    assert row is not None and row.mpp == 0.3 and tables.find(tmp_path / "b.svs", tmp_path) is None
    (line,) = tables.without_effect()
    assert line.endswith(
        "7 of 8 rows match no slide or image: s0 (row 3), s1 (row 4), s2 (row 5), s3 (row 6), s4 (row 7) and 2 more"
    )


def test_groups(tmp_path: Path) -> None:
    path = tmp_path / "g.csv"
    path.write_text("slide,group\na,A\na,A\nb,B\n")
    groups = read_groups(path)
    assert groups.find("x", "a") == "A" and groups.unused() == [(4, "b")]
    path.write_text("slide,group\na,A\na,B\n")
    with pytest.raises(UserError, match=r"g\.csv, row 3: a is also in the group A"):
        read_groups(path)
