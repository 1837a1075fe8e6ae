"""um per pixel from the table ``mpp.csv`` or the header of a TIFF, checked for plausibility."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from muse_fast.errors import UserError
from muse_fast.images.image_files import open_image
from muse_fast.images.tables import parse_number, read_rows

# Wide enough for every microscope, narrow enough to catch a magnification (20, 40) or nanometres given as um.
MPP_RANGE = (0.05, 5.0)


@dataclass(frozen=True, slots=True)
class MppRow:
    """An image in ``mpp.csv``."""

    mpp: float
    slide: str
    split: str


def read_mpp_table(folder: Path) -> dict[str, MppRow]:
    """The rows of ``mpp.csv`` in a folder by file name; empty without that file. Errors as in ``read_mpp_file``."""
    path = folder / "mpp.csv"
    return read_mpp_file(path, folder) if path.is_file() else {}


def read_mpp_file(path: Path, folder: Path | None = None) -> dict[str, MppRow]:
    """The rows of a table ``image,mpp[,slide][,split]`` by the name of the image.

    Raises:
        UserError: a column or value is invalid, or a file is listed twice or is not in ``folder``; names file and row.
    """
    table: dict[str, MppRow] = {}
    for number, row in read_rows(path, ("image", "mpp"), ("slide", "split")):
        if row["image"] in table:
            raise UserError(f"{path}, row {number}: {row['image']} is listed twice")
        if folder is not None and not (folder / row["image"]).is_file():
            raise UserError(f"{path}, row {number}: there is no file {row['image']!r} in {folder}")
        mpp = check_mpp(row["mpp"], f"{path}, row {number}: mpp")
        table[row["image"]] = MppRow(mpp, row.get("slide", ""), row.get("split", ""))
    return table


def check_mpp(text: str, where: str) -> float:
    """um per pixel from text; the message of the UserError begins with ``where``."""
    mpp = parse_number(text)
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise UserError(f"{where} is {text!r}, expected um per pixel, {MPP_RANGE[0]} to {MPP_RANGE[1]}")
    return mpp


def tiff_mpp(path: Path) -> float | None:
    """um per pixel from the resolution in a TIFF; None if it is missing or implausible for a microscope.

    Many programs write 72 dpi or 1 per cm into images whose scale they do not know.

    Raises:
        UserError: not a readable image.
    """
    with open_image(path) as image:
        tags = getattr(image, "tag_v2", {})
        per_unit = [float(tags.get(tag, 0)) for tag in (282, 283)]  # XResolution, YResolution
        um = {2: 25_400.0, 3: 10_000.0}.get(tags.get(296, 2))  # an inch, the default, or a centimetre
    if um is None or not all(per_unit):
        return None
    x, y = (um / one for one in per_unit)
    return (x + y) / 2 if MPP_RANGE[0] <= x <= MPP_RANGE[1] and abs(x - y) < 0.01 * x else None
