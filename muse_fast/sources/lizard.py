"""Lizard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muse_fast.errors import UserError
from muse_fast.images.points import Points
from muse_fast.images.tables import read_rows
from muse_fast.runtime.folders import find_files
from muse_fast.sources.arrays import instance_centroids, integer_map, read_mat
from muse_fast.sources.base import SPLITS, Dataset, Entry, mpp_setting, split_names

_MAX_ID = 2**31 - 1


class Lizard(Dataset):
    """Lizard: colon tiles at 20x with instance maps in MATLAB files.

    The PNGs, the ``.mat`` files of the same stem and ``info.csv`` (``Filename,Source,Split``) may lie anywhere below
    the folder, because the zip files nest them in several ways.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Dataset.Options):
        splits: str = ",".join(SPLITS)
        """Names for the splits 1, 2 and 3 of ``info.csv``."""
        mpp: float = mpp_setting(0.5)
        """Um per pixel; nominally 0.5 at 20x."""

    kind = "lizard"
    title = "the folder of Lizard with PNGs, .mat files and info.csv"
    layouts = (("**/*.png", "**/*.mat", "**/info.csv"),)
    label_names = ("neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective")

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        names = split_names(self.kind, options.splits, ("1", "2", "3"))
        images, labels = self._by_stem("png"), self._by_stem("mat")
        infos = self._by_stem("csv")
        if "info" not in infos:
            raise UserError(f"{self.folder}: info.csv is missing; expected {self.title}")
        split_of = _read_info(infos["info"], names)
        for stem in sorted(images.keys() | labels.keys() | split_of.keys()):
            for what, found in (("PNG", images), (".mat file", labels), (f"row of {infos['info']}", split_of)):
                if stem not in found:
                    raise UserError(f"{self.folder}: {stem} has no {what}; was every zip file unpacked here?")
        self.entries = [
            Entry(stem, stem, split_of[stem], images[stem], labels[stem], options.mpp) for stem in sorted(images)
        ]

    def _by_stem(self, suffix: str) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in find_files(self.folder, f"**/*.{suffix}"):
            if path.stem in found:
                raise UserError(f"{path}: {found[path.stem]} has the same name; keep one")
            found[path.stem] = path
        return found

    def _nuclei(self, entry: Entry, width: int, height: int) -> Points:
        """``class`` has a row per nucleus, in the order of ``id``, which may have gaps and need not ascend."""
        path = entry.labels
        content = read_mat(path, ("inst_map", "class"), ("id",))
        instances = integer_map(content["inst_map"], (height, width), _MAX_ID, f"{path}: inst_map")
        numbers, xy = instance_centroids(instances)
        classes = content["class"].reshape(-1)
        kinds = integer_map(classes, classes.shape, len(self.label_names), f"{path}: class")
        ids = content["id"].reshape(-1) if "id" in content else numbers
        if len(ids) != len(kinds):
            raise UserError(f"{path}: {len(kinds)} classes for {len(ids)} nuclei")
        ids = integer_map(ids, ids.shape, _MAX_ID, f"{path}: id")
        order = np.argsort(ids, kind="stable")
        place = np.searchsorted(ids[order], numbers)
        known = place < len(ids)
        known[known] = ids[order][place[known]] == numbers[known]
        if not known.all():
            raise UserError(f"{path}: nucleus {numbers[~known][0]} of inst_map is not in id, so it has no class")
        label = kinds[order[place]] - 1
        if (label < 0).any():
            raise UserError(
                f"{path}: class 0 of nucleus {numbers[label < 0][0]}, expected 1 to {len(self.label_names)}"
            )
        return Points(xy, label.astype(np.int16))


def _read_info(path: Path, names: dict[str, str]) -> dict[str, str]:
    """Read the split of every file from ``info.csv``."""
    split_of: dict[str, str] = {}
    for row, values in read_rows(path, ("Filename", "Source", "Split")):
        stem, part = values["Filename"].removesuffix(".png"), values["Split"]
        if part not in names:
            raise UserError(f"{path}, row {row}: Split is {part!r}, expected {', '.join(names)}")
        if stem in split_of:
            raise UserError(f"{path}, row {row}: {stem} is listed twice")
        split_of[stem] = names[part]
    return split_of
