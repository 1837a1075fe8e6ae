"""CoNSeP."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from muse_fast.errors import UserError
from muse_fast.images.instances import instance_centroids, instance_types, integer_map, read_mat
from muse_fast.images.mpp import MPP_RANGE
from muse_fast.sources.base import Dataset, Entry, Nuclei, one_of, pair_files

_MAX_ID = 2**31 - 1


class CoNSeP(Dataset):
    """CoNSeP: 27 + 14 colon tiles of 1000 px at 40x with instance maps in MATLAB files.

    Options:
        merge: ``yes`` (default) merges healthy with malignant epithelium (types 3, 4) and fibroblasts, muscle and
            endothelium (5, 6, 7), as HoVer-Net's evaluation does; ``no`` keeps the seven types.
        val: so many images of Train, spread evenly over it, become the split val (default 0: there is none).
        mpp: um per pixel, 0.25 by default: the nominal one of 40x.
    """

    kind = "consep"
    title = "the folder of CoNSeP with Train/ and Test/"
    layouts = tuple((f"{part}/Images/*.png", f"{part}/Labels/*.mat") for part in ("Train", "Test"))
    options: ClassVar[dict[str, tuple[type, float, float]]] = {
        "merge": (str, 0, 0),
        "val": (int, 0, 26),
        "mpp": (float, *MPP_RANGE),
    }
    TYPES = (
        "other", "inflammatory", "healthy_epithelial", "malignant_epithelial", "fibroblast", "muscle", "endothelial",
    )  # fmt: skip
    MERGED = ("other", "inflammatory", "epithelial", "spindle")
    _MERGE = np.array([-1, 0, 1, 2, 2, 3, 3, 3], np.int16)  # by type; a nucleus without one is unknown

    def __init__(self, folder: str, merge: str = "yes", val: int = 0, mpp: float = 0.25) -> None:
        super().__init__(folder)
        merged = one_of(self.kind, "merge", merge, ("yes", "no")) == "yes"
        self.label_names = self.MERGED if merged else self.TYPES
        self._label_of = self._MERGE if merged else np.arange(-1, len(self.TYPES), dtype=np.int16)
        self.entries = []
        for part, split in (("Train", "train"), ("Test", "test")):
            if (self.folder / part).is_dir():
                for path, labels in pair_files(self.folder / part / "Images", self.folder / part / "Labels", ".mat"):
                    self.entries.append(Entry(path.stem, path.stem, split, path, labels, mpp))
        if not self.entries:
            raise UserError(f"{self.folder} has neither Train/ nor Test/; expected {self.title}")
        self._set_aside(val)

    def _set_aside(self, count: int) -> None:
        train = [i for i, entry in enumerate(self.entries) if entry.split == "train"]
        if count and count >= len(train):
            raise UserError(f"consep: val={count}, expected fewer than the {len(train)} images of Train")
        for i in range(count):
            row = train[i * len(train) // count]
            self.entries[row] = replace(self.entries[row], split="val")

    def _nuclei(self, entry: Entry, width: int, height: int) -> Nuclei:
        content = read_mat(entry.labels, ("inst_map", "type_map"))
        shape = (height, width)
        instances = integer_map(content["inst_map"], shape, _MAX_ID, f"{entry.labels}: inst_map")
        types = integer_map(content["type_map"], shape, len(self.TYPES), f"{entry.labels}: type_map")
        numbers, xy = instance_centroids(instances)
        return Nuclei(xy, self._label_of[instance_types(instances, types, numbers)])
