"""BRCA-M2C."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muse_fast.errors import UserError
from muse_fast.images.points import Points
from muse_fast.images.slide import find_slides
from muse_fast.images.tables import text_lines
from muse_fast.sources.base import SPLITS, Context, Dataset, Entry, put_in_split, require_file


class BrcaM2C(Dataset):
    """BRCA-M2C: breast patches from TCGA at 0.5 um per pixel with three classes of nuclei.

    An image is called ``{slide}_{x}_{y}_{w}_{h}_{4 * mpp of the slide}.png`` with x, y, w, h in level-0 pixels; its
    labels are rows ``y x class``. All images were resampled to 0.5 um per pixel.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Dataset.Options):
        slides: str = ""
        """Folder with slides of TCGA, from which the tissue around the images is read; an image whose slide is missing
        has no context."""

    kind = "brcam2c"
    title = "BRCA-M2C"
    layouts = (("images/*.png", "labels/*_gt_class_coords.txt", *(f"brca_ds_{split}.txt" for split in SPLITS)),)
    label_names = ("lymphocyte", "tumour", "stromal")
    MPP = 0.5
    _NAME = re.compile(r"(?P<slide>[^_]+)_(?P<x>\d+)_(?P<y>\d+)_(?P<width>\d+)_(?P<height>\d+)_[\d.]+\.png")

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        self._slides: dict[str, Path] = {}  # the file is SLIDE.UUID.svs
        for path in find_slides(Path(options.slides)) if options.slides else []:
            name = path.name.split(".")[0]
            if (other := self._slides.setdefault(name, path)) != path:
                raise UserError(f"{path} and {other} are both slide {name}; leave one of them in slides=FOLDER")
        self.entries = [self._entry(name, split) for name, split in self._split_of().items()]

    def _split_of(self) -> dict[str, str]:
        split_of: dict[str, str] = {}
        for split in SPLITS:
            listing = self.folder / f"brca_ds_{split}.txt"
            require_file(listing, "expected the folder of BRCA-M2C with images/ and labels/")
            for row, line in text_lines(listing):
                for name in line.split():
                    put_in_split(split_of, name, split, f"{listing}, row {row}")
        return split_of

    def _entry(self, name: str, split: str) -> Entry:
        parts = self._NAME.fullmatch(name)
        if parts is None:
            raise UserError(f"{self.folder / name}: expected a name like {{slide}}_x_y_w_h_{{4 * mpp}}.png")
        labels = self.folder / "labels" / f"{Path(name).stem}_gt_class_coords.txt"
        x, y, width, height = (int(parts[key]) for key in ("x", "y", "width", "height"))
        path = self._slides.get(parts["slide"])
        context = None if path is None else Context(path, (x, y, x + width, y + height), is_slide=True)
        image = self.folder / "images" / name
        return Entry(name, parts["slide"], split, image, labels, self.MPP, (x, y), context=context)

    def _nuclei(self, entry: Entry, width: int, height: int) -> Points:
        path = require_file(entry.labels, "an image without nuclei needs an empty file")
        rows = []
        for number, line in text_lines(path):
            values = line.split()
            if not values:
                continue
            if len(values) != 3 or not all(value.isdecimal() and len(value) < 10 for value in values):
                raise UserError(f"{path}, row {number}: {line!r}, expected three integers 'y x class'")
            y, x, label = map(int, values)
            if y >= height or x >= width or not 1 <= label <= 3:
                raise UserError(f"{path}, row {number}: {line!r}, expected y < {height}, x < {width}, class 1 to 3")
            rows.append((x, y, label - 1))
        table = np.array(rows, np.int64).reshape(-1, 3)
        return Points(table[:, :2].astype(np.float32), table[:, 2].astype(np.int16))
