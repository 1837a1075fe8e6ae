"""PUMA."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from muse_fast.errors import UserError, did_you_mean
from muse_fast.images.geojson import centroid_and_area, read_shapes
from muse_fast.images.image_files import IMAGE_SUFFIXES, image_size
from muse_fast.images.mpp import tiff_mpp
from muse_fast.images.points import Points
from muse_fast.runtime.options import setting
from muse_fast.sources.base import SPLITS, Context, Dataset, Entry, mpp_setting, pair_files, put_in_split

IMAGES, LABELS = "01_training_dataset_tif_ROIs", "01_training_dataset_geojson_nuclei"
CONTEXTS = "01_training_dataset_tif_context_ROIs"
CLASSES = (
    "tumor", "lymphocyte", "plasma_cell", "histiocyte", "melanophage",
    "neutrophil", "stroma", "endothelium", "epithelium", "apoptosis",
)  # fmt: skip


class Puma(Dataset):
    """PUMA (Zenodo, version 5): melanoma ROIs of 1024 px with outlines of ten classes of nuclei.

    A ROI's context image, five times as wide around the same centre, is used if it was unpacked. Splits come from
    ``split/{train,val,test}.json`` of the paper's code, if present.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Dataset.Options):
        mpp: float | None = mpp_setting()
        """Um per pixel; required if the TIFFs do not state it, because PUMA's pages do not state it reliably."""
        coarse: str = setting("muse", choices=("muse", "til", "none"))
        """``muse``: three classes as in the paper's code: tumour, TILs (only lymphocytes), and all others, including
        plasma cells; ``til`` counts plasma cells as TILs; ``none`` keeps all ten classes."""
        centre: str = setting("area", choices=("area", "vertices"))
        """``area``: the centroid of the outline's area, as in the paper's code; ``vertices``: the mean of its vertices,
        as in the challenge's evaluation."""

    kind = "puma"
    title = f"the folder of PUMA with {IMAGES}/ and {LABELS}/"
    layouts = ((f"{IMAGES}/*.tif", f"{LABELS}/*_nuclei.geojson"),)
    TILS: ClassVar[dict[str, tuple[str, ...]]] = {"muse": ("lymphocyte",), "til": ("lymphocyte", "plasma_cell")}

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        self._by_vertices = options.centre == "vertices"
        if options.coarse == "none":
            self.label_names, groups = CLASSES, list(range(len(CLASSES)))
        else:
            self.label_names = ("tumor", "tils", "other")
            groups = [0 if name == "tumor" else 1 if name in self.TILS[options.coarse] else 2 for name in CLASSES]
        self._label_of = {f"nuclei_{name}": group for name, group in zip(CLASSES, groups, strict=True)}
        pairs = pair_files(self.folder / IMAGES, self.folder / LABELS, "_nuclei.geojson")
        split_of = self._split_of({path.stem for path, _ in pairs})
        self.entries = [self._entry(path, labels, split_of.get(path.stem, ""), options.mpp) for path, labels in pairs]

    def _entry(self, path: Path, labels: Path, split: str, mpp: float | None) -> Entry:
        mpp = tiff_mpp(path) if mpp is None else mpp
        if mpp is None:
            raise UserError(
                f"{path}: the TIFF does not state um per pixel, and PUMA's pages do not state it reliably; give "
                "mpp=NUMBER (0.22 to 0.25 for a scan at 40x)"
            )
        return Entry(path.stem, path.stem, split, path, labels, mpp, context=self._context(path))

    def _context(self, path: Path) -> Context | None:
        larger = self.folder / CONTEXTS / f"{path.stem}_context.tif"
        if not larger.is_file():
            return None
        inner, outer = image_size(path), image_size(larger)
        left, top = ((whole - part) / 2 for whole, part in zip(outer, inner, strict=True))
        if min(left, top) < 0:
            raise UserError(f"{larger}: {outer[0]} x {outer[1]} px, smaller than the {inner[0]} x {inner[1]} of {path}")
        return Context(larger, (left, top, left + inner[0], top + inner[1]))

    def _split_of(self, stems: set[str]) -> dict[str, str]:
        """Return the split of every ROI listed in ``split/*.json``."""
        split_of: dict[str, str] = {}
        for split in SPLITS:
            path = self.folder / "split" / f"{split}.json"
            if not path.is_file():
                continue
            try:
                names = list(json.loads(path.read_text(encoding="utf-8-sig"))["anno"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f'{path}: expected JSON with "anno", the ROIs of the split ({error})') from error
            if odd := [name for name in names if not isinstance(name, str)]:
                raise UserError(f'{path}: {odd[0]!r} in "anno", expected names of ROIs')
            for name in names:
                stem = Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name
                if stem not in stems:
                    raise UserError(f"{path}: there is no {stem}.tif in {IMAGES}{did_you_mean(stem, stems)}")
                put_in_split(split_of, stem, split, str(path))
        return split_of

    def _nuclei(self, entry: Entry, width: int, height: int) -> Points:
        xy, label = [], []
        for shape in read_shapes(entry.labels):
            if shape.label not in self._label_of:
                hint = did_you_mean(shape.label, self._label_of)
                raise UserError(
                    f"{entry.labels}, {shape.where}: class {shape.label!r}, expected one of nuclei_* in PUMA{hint}"
                )
            if not shape.polygons:
                raise UserError(f"{entry.labels}, {shape.where}: a point, expected a Polygon or MultiPolygon")
            if self._by_vertices:
                xy.append(np.concatenate([rings[0] for rings in shape.polygons]).mean(axis=0))
            else:
                xy.append(centroid_and_area(shape.polygons)[0])
            label.append(self._label_of[shape.label])
        nuclei = Points(np.array(xy, np.float64).reshape(-1, 2), np.array(label, np.int16))
        return self._inside(nuclei, width, height, entry.labels)
