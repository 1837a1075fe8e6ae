"""The user's tables in CSV files; errors name file and row."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Generic, TypeVar

from muse_fast.errors import UserError
from muse_fast.runtime.names import key_of

_T = TypeVar("_T")
_SHOWN = 5  # names in one message


# ------------------------------------------------------------------------------------------------------------- reading


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number, from 1, and values of every line of a CSV in UTF-8; a blank line has no values.

    A byte-order mark and all kinds of line ends are understood.

    Raises:
        UserError: no such file, not UTF-8, or not a CSV, for example because a quote is not closed; names file and row.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    row = 1
    try:
        with _open_text(path, newline="") as file:
            reader = csv.reader(_lines(file), strict=True)
            for values in reader:
                if reader.line_num > row:
                    raise csv.Error("a quoted value extends over several lines: is a quote missing?")
                yield row, [value.strip() for value in values]
                row += 1
    except csv.Error as error:
        raise UserError(f"{path}, row {row}: not a CSV ({error})") from None


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number, from 1, and text of every line of a list in UTF-8, without blanks at both ends.

    Raises:
        UserError: as in :func:`csv_rows`.
    """
    with _open_text(path) as file:
        yield from enumerate(map(str.strip, file), start=1)


@contextmanager
def _open_text(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text in UTF-8; what cannot be read or decoded in the block is raised as a UserError."""
    try:
        with open(path, newline=newline, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError:
        raise UserError(f"{path}, row {_undecodable_line(path)}: not text in UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def _lines(file: IO[str]) -> Iterator[str]:
    for line in file:
        if "\0" in line:
            raise csv.Error("it contains a NUL character")
        yield line


def _undecodable_line(path: Path) -> int:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1  # the file was replaced meanwhile


def read_rows(
    path: Path, needed: Sequence[str], optional: Sequence[str] = (), *, others: bool = False
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number (the header is row 1) and values by column of the rows of a CSV with a header.

    Args:
        needed: required columns, with a value in every row.
        optional: further columns that are allowed.
        others: allow any further columns.

    Raises:
        UserError: a column is missing or unknown, or a row lacks a value; names file and row.
    """
    for number, row in rows(path, column_names(path, needed, optional, others=others)):
        if not all(row[name] for name in needed):
            raise UserError(f"{path}, row {number}: a value is missing, expected {','.join(needed)}")
        yield number, row


def column_names(path: Path, needed: Sequence[str], optional: Sequence[str] = (), *, others: bool = False) -> list[str]:
    """The checked header of a CSV; arguments and errors as in :func:`read_rows`."""
    _, columns = next(csv_rows(path), (1, list[str]()))
    allowed = {*columns} if others else {*needed, *optional}
    if not set(needed) <= set(columns) <= allowed or len(set(columns)) != len(columns):
        expected = ",".join(needed) + "".join(f"[,{name}]" for name in optional)
        raise UserError(f"{path}, row 1: the header is {','.join(columns)!r}, expected {expected}{_separator(columns)}")
    return columns


def rows(path: Path, columns: Sequence[str], *, header: bool = True) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values by column of every row that is not blank.

    Args:
        header: the first row is a header; otherwise it is skipped only if it equals ``columns``.

    Raises:
        UserError: a row has more or fewer values than there are columns, or the file is not a CSV; names file and row.
    """
    for number, values in csv_rows(path):
        if not any(values) or (number == 1 and (header or values == list(columns))):
            continue
        if len(values) != len(columns):
            found = f"{len(values)} values, expected {','.join(columns)}{_separator(values)}"
            raise UserError(f"{path}, row {number}: {found}")
        yield number, dict(zip(columns, values, strict=True))


def _separator(values: Sequence[str]) -> str:
    """A hint for a row that other characters than commas separate."""
    found = [name for sign, name in ((";", "semicolons"), ("\t", "tabs")) if len(values) == 1 and sign in values[0]]
    return f"; separate values by commas, not by {found[0]}" if found else ""


def parse_number(text: str) -> float:
    """The number in a text, or NaN. ``1_0``, which Python reads as ten, is not a number."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


# ----------------------------------------------------------------------------------------- rows about slides and images


class NamedRows(Generic[_T]):
    """The rows of a table about slides or images by their names, and which of them were used.

    A row names a file by its path in a folder or by its name alone, each with or without the suffix. Names are compared
    by `key_of`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, tuple[int, str, _T]] = {}  # by name: line number, name as written, value
        self._used: set[str] = set()

    def add(self, number: int, name: str, value: _T) -> _T | None:
        """Add the row of line ``number``; if an earlier row has the same name, keep and return the value of that."""
        key = key_of(name).replace("\\", "/").removeprefix("./")
        first, _, before = self._rows.setdefault(key, (number, name, value))
        return None if first == number else before

    def find(self, *names: str) -> _T | None:
        """The value of the first of ``names`` that has a row; see `names_of`."""
        key = next((key for key in map(key_of, names) if key in self._rows), None)
        if key is None:
            return None
        self._used.add(key)
        return self._rows[key][2]

    def unused(self) -> list[tuple[int, str]]:
        """Line number and name of the rows that no file had so far."""
        return [(number, name) for key, (number, name, _) in self._rows.items() if key not in self._used]

    def without_effect(self) -> list[str]:
        """A line for the user about the rows that no file had, if there are any."""
        names = [f"{name} (row {number})" for number, name in self.unused()]
        return [f"{self.path}: {some_of(names, len(self._rows), 'rows')}"] if names else []


def names_of(path: Path, folder: Path) -> tuple[str, ...]:
    """The names by which a table may list a file in ``folder`` or below it, the most specific first."""
    inside = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    return inside.as_posix(), inside.with_suffix("").as_posix(), path.name, path.stem


def some_of(names: Sequence[str], total: int, what: str) -> str:
    """``2 of 9 rows match no slide or image: a, b``; of many names the first few."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} of {total} {what} match no slide or image: {', '.join(names[:_SHOWN])}{more}"


def read_groups(path: Path) -> NamedRows[str]:
    """The group of every slide in a table ``slide,group``.

    Raises:
        UserError: as in :func:`read_rows`, or a slide is in two groups; names file and row.
    """
    groups = NamedRows[str](path)
    for number, row in read_rows(path, ("slide", "group")):
        before = groups.add(number, row["slide"], row["group"])
        if before not in (None, row["group"]):
            raise UserError(f"{path}, row {number}: {row['slide']} is also in the group {before}")
    return groups
