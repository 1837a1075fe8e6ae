"""um per pixel from the table ``mpp.csv`` or the header of a TIFF, checked for plausibility."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from muse_fast.errors import UserError
from muse_fast.images.image_files import open_image
from muse_fast.images.tables import NamedRows, names_of, parse_number, read_rows
from muse_fast.runtime.folders import iter_files

# Wide enough for every microscope, narrow enough to catch a magnification (20, 40) or nanometres given as um.
MPP_RANGE = (0.05, 5.0)
TABLE = "mpp.csv"


@dataclass(frozen=True, slots=True)
class MppRow:
    """An image in ``mpp.csv``."""

    mpp: float
    slide: str
    split: str


class MppTables:
    """um per pixel of slides and images, from a given table or from the tables ``mpp.csv`` in their folders.

    Of several tables the nearest counts: that of the file's folder, then those of the folders above, up to the folder
    in which the user looks for files. A row names a file as in `NamedRows`.

    Args:
        given: use this table alone.

    Raises:
        UserError: a table is invalid; names file and row.
    """

    def __init__(self, given: Path | None = None) -> None:
        self._given = None if given is None else read_mpp_file(given)
        self._in_folder: dict[Path, NamedRows[MppRow] | None] = {}

    def read_all(self, folder: Path) -> None:
        """Read the tables in a folder and below, also those that lie in no slide's way."""
        for path in [] if self._given else iter_files(folder, f"**/{TABLE}"):
            self._table(path.parent)

    def find(self, path: Path, root: Path) -> MppRow | None:
        """The row of a file in ``root`` or below."""
        if self._given is not None:
            return self._given.find(*names_of(path, root))
        for folder in path.parents:
            table = self._table(folder)
            row = table.find(*names_of(path, folder)) if table else None
            if row is not None or folder == root:
                return row
        return None

    def _table(self, folder: Path) -> NamedRows[MppRow] | None:
        if folder not in self._in_folder:
            path = folder / TABLE
            self._in_folder[folder] = read_mpp_file(path) if path.is_file() else None
        return self._in_folder[folder]

    def tables(self) -> list[NamedRows[MppRow]]:
        """The tables read so far."""
        return [table for table in (self._given, *self._in_folder.values()) if table is not None]

    def without_effect(self) -> list[str]:
        """Lines for the user about the rows that no file had."""
        return [line for table in self.tables() for line in table.without_effect()]


def read_mpp_file(path: Path) -> NamedRows[MppRow]:
    """The rows of a table ``image,mpp[,slide][,split]``.

    Raises:
        UserError: a column or value is invalid, or a file is listed twice; names file and row.
    """
    table = NamedRows[MppRow](path)
    for number, row in read_rows(path, ("image", "mpp"), ("slide", "split")):
        mpp = check_mpp(row["mpp"], f"{path}, row {number}: mpp")
        if table.add(number, row["image"], MppRow(mpp, row.get("slide", ""), row.get("split", ""))) is not None:
            raise UserError(f"{path}, row {number}: {row['image']} is listed twice")
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
