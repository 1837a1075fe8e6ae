"""Reads what users bring: images, CSV files of points, and the table of um per pixel."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images import jpeg
from muse_fast.images.jpeg import MAX_SIDE
from muse_fast.runtime.atomic import replacing

# Wide enough for every microscope, narrow enough to catch a magnification (20, 40) or nanometres given as um.
MPP_RANGE = (0.05, 5.0)


@dataclass(frozen=True, slots=True)
class MppRow:
    """What ``mpp.csv`` says of one image."""

    mpp: float
    slide: str
    split: str


def read_image(path: Path, data: bytes | None = None) -> NDArray[np.uint8]:
    """``[H, W, 3]`` uint8 RGB of an image file.

    JPEGs are decoded strictly: damaged pixels raise, where Pillow would return them grey.

    Args:
        data: the bytes of the image, where it lies within the file.

    Raises:
        UserError: no RGB image of at most ``MAX_SIDE`` a side, or damaged; names the file.
    """
    with _opened(path, data) as image:
        if image.mode not in ("RGB", "RGBA") or max(image.size) > MAX_SIDE:
            found = f"{image.mode}, {image.width} x {image.height} px"
            raise UserError(f"{path}: {found}; expected 8-bit RGB, at most {MAX_SIDE} a side")
        if image.format == "JPEG":
            return jpeg.read(path.read_bytes() if data is None else data, image.width, image.height)
        return np.array(image.convert("RGB"))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height by the header of an image file.

    Raises:
        UserError: no image; names the file.
    """
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path, data: bytes | None = None) -> Iterator[Image.Image]:
    """The image in a file, or in ``data`` from it; what goes wrong in the block names the file."""
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            yield image
    except UserError:
        raise
    # SyntaxError: a broken PNG. ZeroDivisionError: a TIFF's fraction.
    except (OSError, ValueError, SyntaxError, ZeroDivisionError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error})") from error


def read_points(
    path: Path, width: float, height: float, num_labels: int
) -> tuple[NDArray[np.float32], NDArray[np.int16] | None, NDArray[np.float32] | None]:
    """Points of one image from a CSV with the header ``x,y[,label][,score]``; a byte-order mark and blank lines pass.

    A column ``class`` beside ``label``, as `muse_fast.predict` writes, is left to `read_class_names`.

    Args:
        width, height: of the image, pixels; infinite where they are not known.
        num_labels: labels are 0 to ``num_labels - 1``, or -1 for unknown; 0: any whole number from -1.

    Returns:
        xy ``[n, 2]`` float32, label ``[n]`` int16 or None, score ``[n]`` float32 or None (columns that are absent).

    Raises:
        UserError: a column is missing or unknown, or a value is none that can be used; names file and row.
    """
    columns = _point_columns(path)
    highest = num_labels - 1 if num_labels else np.iinfo(np.int16).max
    table = _point_table(path, columns, _rows(path, columns), (width, height), (-1, highest))
    label = table["label"].astype(np.int16) if "label" in table else None
    score = table["score"].astype(np.float32) if "score" in table else None
    return _points_inside(table, width, height), label, score


def read_class_names(path: Path) -> dict[int, str]:
    """What the column ``class`` of a CSV for `read_points` calls the labels in it; empty where it has none.

    Raises:
        UserError: a label has two names; names file and row.
    """
    columns = _point_columns(path)
    names: dict[int, str] = {}
    if "class" in columns:
        for number, row in _rows(path, columns):
            label, name = int(float(row["label"])), row["class"]
            if name and names.setdefault(label, name) != name:
                raise UserError(f"{path}, row {number}: label {label} is called {name!r} here, {names[label]!r} before")
    return names


def _point_columns(path: Path) -> list[str]:
    columns = _header(path, ("x", "y"), ("label", "score", "class"))
    if "class" in columns and "label" not in columns:
        raise UserError(f"{path}, row 1: the header is {','.join(columns)!r}; class needs its number in a column label")
    return columns


def read_bare_points(
    path: Path, width: float, height: float, labels: range
) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Points of one image from a CSV with rows ``x,y,label`` and no header (one that says just that passes).

    Args:
        labels: those that the file may hold; they come out counted from 0.

    Returns:
        xy ``[n, 2]`` float32 and label ``[n]`` int16; an empty file is an image without nuclei.

    Raises:
        UserError: a value is none that can be used; names file and row.
    """
    columns = ["x", "y", "label"]
    rows = _rows(path, columns, header=False)
    table = _point_table(path, columns, rows, (width, height), (labels[0], labels[-1]))
    return _points_inside(table, width, height), (table["label"] - labels[0]).astype(np.int16)


def _point_table(
    path: Path,
    columns: list[str],
    rows: Iterator[tuple[int, dict[str, str]]],
    size: tuple[float, float],
    labels: tuple[int, int],
) -> dict[str, NDArray[np.float64]]:
    """The checked values ``[n]`` of every column of numbers."""
    width, height = size
    numbers = [name for name in columns if name != "class"]
    limits = {
        "x": (0.0, float(np.nextafter(width, 0))),
        "y": (0.0, float(np.nextafter(height, 0))),
        "label": labels,
        "score": (-1e30, 1e30),
    }
    table = []
    for number, row in rows:
        values = []
        for name in numbers:
            text = row[name]
            value = _number(text)
            low, high = limits[name]
            if not low <= value <= high or (name == "label" and value != int(value)):
                expected = {"x": f"0 <= x < {width}", "y": f"0 <= y < {height}"}.get(name, f"{low:g} to {high:g}")
                whole = "a whole number, " if name == "label" else "a number, "
                raise UserError(f"{path}, row {number}: {name} is {text!r}, expected {whole}{expected}")
            values.append(value)
        table.append(values)
    return dict(zip(numbers, np.array(table, np.float64).reshape(-1, len(numbers)).T, strict=True))


def _points_inside(table: dict[str, NDArray[np.float64]], width: float, height: float) -> NDArray[np.float32]:
    """``[n, 2]`` float32; rounding may push a point onto the border, where it would be outside."""
    edge = np.nextafter(np.array([width, height], np.float32), np.float32(0))
    return np.minimum(np.stack([table["x"], table["y"]], axis=1).astype(np.float32), edge)


def write_points(path: Path, xy: NDArray[np.floating], label: NDArray[np.integer], score: NDArray[np.floating]) -> None:
    """A CSV of the points of one image that `read_points` takes, ``x,y,label,score``; whole or absent."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "label", "score"])
        for (x, y), kind, value in zip(xy.tolist(), label.tolist(), score.tolist(), strict=True):
            writer.writerow([f"{x:.2f}", f"{y:.2f}", kind, f"{value:.4f}"])


def read_mpp_table(folder: Path) -> dict[str, MppRow]:
    """``mpp.csv`` of a folder by file name; empty where there is none. Errors as of ``read_mpp_file``."""
    path = folder / "mpp.csv"
    return read_mpp_file(path, folder) if path.is_file() else {}


def read_mpp_file(path: Path, folder: Path | None = None) -> dict[str, MppRow]:
    """A table ``image,mpp[,slide][,split]`` by the name of the image.

    Raises:
        UserError: a column or value that cannot be used, a file listed twice, or one that is not in ``folder``, where
            that is given; names file and row.
    """
    table: dict[str, MppRow] = {}
    for number, row in _rows(path, _header(path, ("image", "mpp"), ("slide", "split"))):
        if row["image"] in table:
            raise UserError(f"{path}, row {number}: {row['image']} is listed twice")
        if folder is not None and not (folder / row["image"]).is_file():
            raise UserError(f"{path}, row {number}: there is no file {row['image']!r} in {folder}")
        mpp = check_mpp(row["mpp"], f"{path}, row {number}: mpp")
        table[row["image"]] = MppRow(mpp, row.get("slide", ""), row.get("split", ""))
    return table


def read_rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and the values of the columns ``needed`` of a CSV with a header; other columns may stand beside.

    Raises:
        UserError: a column or a value is missing; names file and row.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        try:
            if not set(needed) <= set(reader.fieldnames or ()):
                found = ",".join(reader.fieldnames or ())
                raise UserError(f"{path}, row 1: the header is {found!r}, expected {','.join(needed)}")
            for row in reader:
                values = {name: (row[name] or "").strip() for name in needed}
                if not all(values.values()):
                    raise UserError(f"{path}, row {reader.line_num}: a value is missing, expected {','.join(needed)}")
                yield reader.line_num, values
        except csv.Error as error:
            raise UserError(f"{path}, row {reader.line_num}: no CSV ({error})") from None


def read_groups(path: Path) -> dict[str, str]:
    """A table ``slide,group`` by the name of the slide.

    Raises:
        UserError: a column is missing or a value empty, or a slide stands in two groups; names file and row.
    """
    groups: dict[str, str] = {}
    for number, row in _rows(path, _header(path, ("slide", "group"), ())):
        if not row["slide"] or not row["group"]:
            raise UserError(f"{path}, row {number}: expected the names of a slide and of its group")
        if groups.setdefault(row["slide"], row["group"]) != row["group"]:
            raise UserError(f"{path}, row {number}: {row['slide']} stands in the group {groups[row['slide']]} too")
    return groups


def check_mpp(text: str, where: str) -> float:
    """um per pixel from text; ``where`` begins the message of the UserError."""
    mpp = _number(text)
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise UserError(f"{where} is {text!r}, expected um per pixel, {MPP_RANGE[0]} to {MPP_RANGE[1]}")
    return mpp


def tiff_mpp(path: Path) -> float | None:
    """um per pixel by the resolution of a TIFF; None where it tells none that a microscope could have.

    Many programs write 72 dpi or 1 per cm into pictures whose scale they do not know.

    Raises:
        UserError: no readable image.
    """
    with _opened(path) as image:
        tags = getattr(image, "tag_v2", {})
        per_unit = [float(tags.get(tag, 0)) for tag in (282, 283)]  # XResolution, YResolution
        um = {2: 25_400.0, 3: 10_000.0}.get(tags.get(296, 2))  # an inch, the default, or a centimetre
    if um is None or not all(per_unit):
        return None
    x, y = (um / one for one in per_unit)
    return (x + y) / 2 if MPP_RANGE[0] <= x <= MPP_RANGE[1] and abs(x - y) < 0.01 * x else None


def _number(text: str) -> float:
    """NaN for what is no number. ``1_0``, which Python takes for ten, is none either."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def _header(path: Path, needed: tuple[str, ...], optional: tuple[str, ...]) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        columns = [name.strip() for name in next(csv.reader(file), [])]
    legal = set(columns) <= {*needed, *optional} and set(needed) <= set(columns) and len(set(columns)) == len(columns)
    if not legal:
        expected = ",".join(needed) + "".join(f"[,{name}]" for name in optional)
        raise UserError(f"{path}, row 1: the header is {','.join(columns)!r}, expected {expected}")
    return columns


def _rows(path: Path, columns: list[str], header: bool = True) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number in the file (a header is row 1) and the values by column."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        try:
            if header:
                next(reader)
            for row in reader:
                stripped = [value.strip() for value in row]
                if not any(stripped) or (not header and reader.line_num == 1 and stripped == columns):
                    continue
                if len(row) != len(columns):
                    raise UserError(f"{path}, row {reader.line_num}: {len(row)} values, expected {','.join(columns)}")
                yield reader.line_num, dict(zip(columns, stripped, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, row {reader.line_num}: no CSV ({error})") from None
