"""CSV files of the points of one image."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError, did_you_mean
from muse_fast.images.points import Points
from muse_fast.images.tables import column_names, parse_number, rows
from muse_fast.runtime.atomic import replacing

QUPATH_COLUMNS = ("x_qupath", "y_qupath")  # written by `muse_fast.predict` if QuPath crops the slide


def read_points(path: Path, width: float, height: float, num_labels: int) -> Points:
    """Points of one image from a CSV with the header ``x,y[,label][,score]``.

    A byte-order mark and blank lines are allowed. The other columns that `muse_fast.predict` writes are ignored here:
    ``class`` next to ``label``, see `read_named_points`, and x and y as QuPath counts them.

    Args:
        width, height: of the image, pixels; infinite if unknown.
        num_labels: labels are 0 to ``num_labels - 1``, or -1 for unknown; 0: any whole number from -1 on.

    Returns:
        xy float32, label int16 and score float32; label and score are None without such a column.

    Raises:
        UserError: a column is missing or unknown, or a value is invalid; names file and row.
    """
    columns = _point_columns(path)
    return _points(path, columns, rows(path, columns), (width, height), num_labels)


def read_named_points(path: Path, width: float, height: float, label_names: Sequence[str]) -> Points:
    """Like `read_points`; in a CSV with a column ``class``, which names the labels, the name decides, not the number.

    Args:
        label_names: of the classes, at least one.

    Returns:
        Points whose label is the position in ``label_names``, -1 for unknown.

    Raises:
        UserError: as in `read_points`, or a name is not in ``label_names``; names file and class.
    """
    if "class" not in _point_columns(path):
        return read_points(path, width, height, len(label_names))
    points, names = read_points_and_names(path, width, height)
    position = {-1: -1}
    for label in {*points.classes().tolist()} - {-1}:
        if label not in names:
            raise UserError(f"{path}: label {label} has no name in the column class; name it, or remove that column")
        if names[label] not in label_names:
            known, hint = ", ".join(label_names), did_you_mean(names[label], label_names)
            raise UserError(f"{path}: class {names[label]!r}, expected {known}{hint}")
        position[label] = label_names.index(names[label])
    label = np.array([position[label] for label in points.classes().tolist()], np.int16)
    return Points(points.xy, label, points.score)


def read_points_and_names(path: Path, width: float, height: float) -> tuple[Points, dict[int, str]]:
    """What `read_points` returns, and the names of the labels, from the column ``class``; empty without such a column.

    Raises:
        UserError: as in `read_points`, or a label has two names; names file and row.
    """
    columns = _point_columns(path)
    names: dict[int, str] = {}
    numbered = _naming(path, rows(path, columns), names) if "class" in columns else rows(path, columns)
    return _points(path, columns, numbered, (width, height), 0), names


def read_class_names(path: Path) -> dict[int, str]:
    """The class names by label, from the column ``class`` of a CSV for `read_points`; empty without such a column.

    Raises:
        UserError: as in `read_points_and_names`.
    """
    return read_points_and_names(path, np.inf, np.inf)[1]


def class_names_of(paths: Iterable[Path]) -> tuple[str, ...]:
    """All names in the columns ``class`` of some CSVs for `read_points`, in alphabetical order; empty without names.

    Raises:
        UserError: some files name their labels and others only number them, or as in `read_points_and_names`.
    """
    names: set[str] = set()
    named = numbered = None
    for path in paths:
        points, found = read_points_and_names(path, np.inf, np.inf)
        found.pop(-1, None)  # however a file calls what has no class
        names |= {*found.values()}
        if found:
            named = named or path
        elif points.label is not None and points.label.max(initial=-1) >= 0:
            numbered = numbered or path
    if named and numbered:
        raise UserError(f"{numbered} numbers its classes, {named} names them; give labels= with the names in order")
    return tuple(sorted(names))


def _points(
    path: Path,
    columns: list[str],
    numbered: Iterator[tuple[int, dict[str, str]]],
    size: tuple[float, float],
    num_labels: int,
) -> Points:
    highest = num_labels - 1 if num_labels else np.iinfo(np.int16).max
    table = _point_table(path, columns, numbered, size, (-1, highest))
    label = table["label"].astype(np.int16) if "label" in table else None
    score = table["score"].astype(np.float32) if "score" in table else None
    return Points(_points_inside(table, *size), label, score)


def _naming(
    path: Path, numbered: Iterator[tuple[int, dict[str, str]]], names: dict[int, str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """The same rows, whose class names are entered in ``names`` by label once they have been checked."""
    for number, row in numbered:
        yield number, row
        label, name = int(float(row["label"])), row["class"]
        if name and names.setdefault(label, name) != name:
            raise UserError(f"{path}, row {number}: label {label} is called {name!r} here, {names[label]!r} before")


def _point_columns(path: Path) -> list[str]:
    columns = column_names(path, ("x", "y"), ("label", "score", "class", *QUPATH_COLUMNS))
    if "class" in columns and "label" not in columns:
        raise UserError(f"{path}, row 1: the header is {','.join(columns)!r}; class needs a column label")
    return columns


def read_bare_points(path: Path, width: float, height: float, labels: range) -> Points:
    """Points of one image from a CSV with rows ``x,y,label`` and no header (one with exactly these names is skipped).

    Args:
        labels: allowed in the file; they are returned counted from 0.

    Returns:
        xy float32 and label int16; an empty file is an image without nuclei.

    Raises:
        UserError: a value is invalid; names file and row.
    """
    columns = ["x", "y", "label"]
    bare = rows(path, columns, header=False)
    table = _point_table(path, columns, bare, (width, height), (labels[0], labels[-1]))
    return Points(_points_inside(table, width, height), (table["label"] - labels[0]).astype(np.int16))


def _point_table(
    path: Path,
    columns: list[str],
    numbered: Iterator[tuple[int, dict[str, str]]],
    size: tuple[float, float],
    labels: tuple[int, int],
) -> dict[str, NDArray[np.float64]]:
    """The checked values ``[n]`` of every column of numbers."""
    width, height = size
    limits = {
        "x": (0.0, float(np.nextafter(width, 0))),
        "y": (0.0, float(np.nextafter(height, 0))),
        "label": labels,
        "score": (-1e30, 1e30),
    }
    numbers = [name for name in columns if name in limits]
    table = []
    for number, row in numbered:
        values = []
        for name in numbers:
            text = row[name]
            value = parse_number(text)
            low, high = limits[name]
            if not low <= value <= high or (name == "label" and value != int(value)):
                expected = {"x": f"0 <= x < {width}", "y": f"0 <= y < {height}"}.get(name, f"{low:g} to {high:g}")
                whole = "a whole number, " if name == "label" else "a number, "
                raise UserError(f"{path}, row {number}: {name} is {text!r}, expected {whole}{expected}")
            values.append(value)
        table.append(values)
    return dict(zip(numbers, np.array(table, np.float64).reshape(-1, len(numbers)).T, strict=True))


def _points_inside(table: dict[str, NDArray[np.float64]], width: float, height: float) -> NDArray[np.float32]:
    """``[n, 2]`` float32; rounding may move a point onto the border, which is outside, so it is clipped."""
    edge = np.nextafter(np.array([width, height], np.float32), np.float32(0))
    return np.minimum(np.stack([table["x"], table["y"]], axis=1).astype(np.float32), edge)


def write_points(path: Path, xy: NDArray[np.floating], label: NDArray[np.integer], score: NDArray[np.floating]) -> None:
    """Write the points of one image as a CSV ``x,y,label,score`` for `read_points`, atomically."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "label", "score"])
        for (x, y), kind, value in zip(xy.tolist(), label.tolist(), score.tolist(), strict=True):
            writer.writerow([f"{x:.2f}", f"{y:.2f}", kind, f"{value:.4f}"])
