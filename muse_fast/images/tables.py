"""The user's tables in CSV files; errors name file and row."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from muse_fast.errors import UserError


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
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        columns = [name.strip() for name in next(csv.reader(file), [])]
    allowed = {*columns} if others else {*needed, *optional}
    if not set(needed) <= set(columns) <= allowed or len(set(columns)) != len(columns):
        expected = ",".join(needed) + "".join(f"[,{name}]" for name in optional)
        raise UserError(f"{path}, row 1: the header is {','.join(columns)!r}, expected {expected}")
    return columns


def rows(path: Path, columns: Sequence[str], *, header: bool = True) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values by column of every row that is not blank.

    Args:
        header: the first row is a header; otherwise it is skipped only if it equals ``columns``.

    Raises:
        UserError: a row has more or fewer values than there are columns, or the file is not a CSV; names file and row.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        try:
            if header:
                next(reader)
            for row in reader:
                values = [value.strip() for value in row]
                if not any(values) or (not header and reader.line_num == 1 and values == list(columns)):
                    continue
                if len(row) != len(columns):
                    raise UserError(f"{path}, row {reader.line_num}: {len(row)} values, expected {','.join(columns)}")
                yield reader.line_num, dict(zip(columns, values, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, row {reader.line_num}: not a CSV ({error})") from None


def read_groups(path: Path) -> dict[str, str]:
    """The group of every slide in a table ``slide,group``.

    Raises:
        UserError: as in :func:`read_rows`, or a slide is in two groups; names file and row.
    """
    groups: dict[str, str] = {}
    for number, row in read_rows(path, ("slide", "group")):
        if groups.setdefault(row["slide"], row["group"]) != row["group"]:
            raise UserError(f"{path}, row {number}: {row['slide']} is also in the group {groups[row['slide']]}")
    return groups


def parse_number(text: str) -> float:
    """The number in a text, or NaN. ``1_0``, which Python reads as ten, is not a number."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
