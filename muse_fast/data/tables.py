"""Reads what users bring: images, CSV files of points, and the table of um per pixel."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.data import jpeg
from muse_fast.data.jpeg import MAX_SIDE
from muse_fast.errors import UserError

# Wide enough for every microscope, narrow enough to catch a magnification (20, 40) or nanometres given as um.
MPP_RANGE = (0.05, 5.0)


@dataclass(frozen=True, slots=True)
class MppRow:
    """What ``mpp.csv`` says of one image."""

    mpp: float
    slide: str
    split: str


def read_image(path: Path) -> NDArray[np.uint8]:
    """``[H, W, 3]`` uint8 RGB of an image file.

    JPEGs are decoded strictly: damaged pixels raise, where Pillow would return them grey.

    Raises:
        UserError: no RGB image of at most ``MAX_SIDE`` a side, or damaged; names the file.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA") or max(image.size) > MAX_SIDE:
                found = f"{image.mode}, {image.width} x {image.height} px"
                raise UserError(f"{path}: {found}; expected 8-bit RGB, at most {MAX_SIDE} a side")
            if image.format == "JPEG":
                return jpeg.read(path.read_bytes(), image.width, image.height)
            return np.array(image.convert("RGB"))
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: broken PNG
        raise UserError(f"{path}: not a readable image ({error})") from error


def read_points(
    path: Path, width: float, height: float, num_labels: int
) -> tuple[NDArray[np.float32], NDArray[np.int16] | None, NDArray[np.float32] | None]:
    """Points of one image from a CSV with the header ``x,y[,label][,score]``; a byte-order mark and blank lines pass.

    Args:
        width, height: of the image, pixels; infinite where they are not known.
        num_labels: labels are 0 to ``num_labels - 1``, or -1 for unknown; 0: any whole number from -1.

    Returns:
        xy ``[n, 2]`` float32, label ``[n]`` int16 or None, score ``[n]`` float32 or None (columns that are absent).

    Raises:
        UserError: a column is missing or unknown, or a value is none that can be used; names file and row.
    """
    columns = _header(path, ("x", "y"), ("label", "score"))
    limits = {
        "x": (0.0, float(np.nextafter(width, 0))),
        "y": (0.0, float(np.nextafter(height, 0))),
        "label": (-1, num_labels - 1 if num_labels else np.iinfo(np.int16).max),
        "score": (-1e30, 1e30),
    }
    rows = []
    for number, row in _rows(path, columns):
        values = []
        for name, text in row.items():
            value = _number(text)
            low, high = limits[name]
            if not low <= value <= high or (name == "label" and value != int(value)):
                expected = {"x": f"0 <= x < {width}", "y": f"0 <= y < {height}"}.get(name, f"{low:g} to {high:g}")
                whole = "a whole number, " if name == "label" else "a number, "
                raise UserError(f"{path}, row {number}: {name} is {text!r}, expected {whole}{expected}")
            values.append(value)
        rows.append(values)
    table = dict(zip(columns, np.array(rows, np.float64).reshape(-1, len(columns)).T, strict=True))
    # Rounding to float32 may push a point onto the border, where it would be outside.
    edge = np.nextafter(np.array([width, height], np.float32), np.float32(0))
    xy = np.minimum(np.stack([table["x"], table["y"]], axis=1).astype(np.float32), edge)
    label = table["label"].astype(np.int16) if "label" in table else None
    score = table["score"].astype(np.float32) if "score" in table else None
    return xy, label, score


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


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number in the file (the header is row 1) and the values by column."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        try:
            next(reader)
            for row in reader:
                if not any(value.strip() for value in row):
                    continue
                if len(row) != len(columns):
                    raise UserError(f"{path}, row {reader.line_num}: {len(row)} values, expected {','.join(columns)}")
                yield reader.line_num, dict(zip(columns, (value.strip() for value in row), strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, row {reader.line_num}: no CSV ({error})") from None
