"""OCELOT."""

from __future__ import annotations

import json
from typing import Any

from muse_fast.errors import UserError
from muse_fast.images.image_files import image_size
from muse_fast.images.mpp import check_mpp
from muse_fast.images.points import Points
from muse_fast.images.points_csv import read_bare_points
from muse_fast.runtime.folders import iter_files
from muse_fast.sources.base import SPLITS, Context, Dataset, Entry, require_file


class Ocelot(Dataset):
    """OCELOT 1.0.1: the cell patches, 1024 px at about 0.2 um per pixel from six organs of TCGA.

    ``metadata.json`` states slide, position and um per pixel of each; labels are rows ``x,y,label`` in a CSV without a
    header, empty if there are no cells. The tissue patch around a cell patch, with about a quarter of the pixels per
    um, is its context if it was unpacked. Splits that were not unpacked are skipped.
    """

    kind = "ocelot"
    title = "the folder of OCELOT with images/, annotations/ and metadata.json"
    layouts = (("metadata.json", "images/*/cell/*.jpg", "annotations/*/cell/*.csv"),)
    label_names = ("background_cell", "tumour_cell")

    def __init__(self, target: str, options: Dataset.Options) -> None:
        super().__init__(target, options)
        self._metadata = require_file(self.folder / "metadata.json", f"expected {self.title}")
        try:
            content = json.loads(self._metadata.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self._metadata}: not readable as JSON ({error})") from error
        pairs = self._value(content, "sample_pairs", dict)
        here = [split for split in SPLITS if (self.folder / "images" / split / "cell").is_dir()]
        if not here:
            raise UserError(f"{self.folder / 'images'} contains neither train/cell nor val/cell nor test/cell")
        self.entries = [entry for name in sorted(pairs) if (entry := self._entry(pairs, name)).split in here]
        for split in here:
            self._check_files(split)

    def _entry(self, pairs: dict[str, Any], name: str) -> Entry:
        split = self._value(pairs, name, dict, "subset", str)
        if split not in SPLITS:
            raise UserError(f"{self._metadata}: subset of {name} is {split!r}, expected {', '.join(SPLITS)}")
        x, y = (self._value(pairs, name, dict, "cell", dict, f"{axis}_start", (int, float)) for axis in "xy")
        places = ("resized_mpp_x", "resized_mpp_y")
        across, down = (
            check_mpp(
                str(self._value(pairs, name, dict, "cell", dict, place, (int, float))),
                f"{self._metadata}: {place} of {name}",
            )
            for place in places
        )
        if abs(across - down) > 0.02 * across:
            raise UserError(f"{self._metadata}: pixels of {name} are {across} x {down} um, expected squares")
        return Entry(
            name,
            self._value(pairs, name, dict, "slide_name", str),
            split,
            self.folder / "images" / split / "cell" / f"{name}.jpg",
            self.folder / "annotations" / split / "cell" / f"{name}.csv",
            (across + down) / 2,
            (round(x), round(y)),
            context=self._context(pairs, name, split),
        )

    def _context(self, pairs: dict[str, Any], name: str, split: str) -> Context | None:
        path = self.folder / "images" / split / "tissue" / f"{name}.jpg"
        if not path.is_file():
            return None
        cell, tissue = (
            [
                float(self._value(pairs, name, dict, patch, dict, f"{axis}_{end}", (int, float)))
                for end in ("start", "end")
                for axis in "xy"
            ]
            for patch in ("cell", "tissue")
        )
        (x0, y0, x1, y1), (width, height) = tissue, image_size(path)
        if not (x0 <= cell[0] < cell[2] <= x1 and y0 <= cell[1] < cell[3] <= y1):
            raise UserError(
                f"{self._metadata}: the cell patch of {name}, {cell}, lies outside its tissue patch, {tissue}"
            )
        across, down = width / (x1 - x0), height / (y1 - y0)
        left, top, right, bottom = cell
        return Context(path, ((left - x0) * across, (top - y0) * down, (right - x0) * across, (bottom - y0) * down))

    def _value(self, content: Any, *path: Any) -> Any:
        """Look up a value in nested mappings; ``path`` is ``key, type, key, type, ...``."""
        walked = []
        for key, kind in zip(path[::2], path[1::2], strict=True):
            walked.append(key)
            content = content.get(key) if isinstance(content, dict) else None
            number = isinstance(content, (int, float))
            if not isinstance(content, kind) or isinstance(content, bool) or (number and not abs(content) < 1e9):
                raise UserError(f"{self._metadata}: {'.'.join(walked)} is {content!r}, expected as in OCELOT 1.0.1")
        return content

    def _check_files(self, split: str) -> None:
        """Check that images and metadata list the same names."""
        listed = {entry.name for entry in self.entries if entry.split == split}
        folder = self.folder / "images" / split / "cell"
        found = {path.stem for path in iter_files(folder, "*.jpg")}
        if lost := sorted(listed - found):
            raise UserError(f"{folder / lost[0]}.jpg is missing, one of {len(lost)} listed in {self._metadata}")
        if extra := sorted(found - listed):
            raise UserError(f"{folder / extra[0]}.jpg is not in {self._metadata} as {split}")

    def _nuclei(self, entry: Entry, width: int, height: int) -> Points:
        path = require_file(entry.labels, "an image without nuclei needs an empty CSV")
        return read_bare_points(path, width, height, range(1, 3))
