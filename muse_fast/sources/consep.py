"""CoNSeP."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from muse_fast.errors import UserError
from muse_fast.images.points import Points
from muse_fast.runtime.options import setting
from muse_fast.sources.arrays import instance_centroids, instance_types, integer_map, read_mat
from muse_fast.sources.base import Dataset, Entry, mpp_setting, pair_files

_MAX_ID = 2**31 - 1


class CoNSeP(Dataset):
    """CoNSeP: 27 + 14 colon tiles of 1000 px at 40x with instance maps in MATLAB files."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Dataset.Options):
        merge: str = setting("yes", choices=("yes", "no"))
        """``yes`` merges healthy with malignant epithelium (types 3, 4), and fibroblasts, muscle and endothelium (5, 6,
        7), as in HoVer-Net's evaluation; ``no`` keeps all seven types."""
        val: int = setting(0, ge=0, le=26)
        """Number of images of Train, evenly spread, that form the split val."""
        mpp: float = mpp_setting(0.25)
        """Um per pixel; nominally 0.25 at 40x."""

    kind = "consep"
    title = "the folder of CoNSeP with Train/ and Test/"
    layouts = tuple((f"{part}/Images/*.png", f"{part}/Labels/*.mat") for part in ("Train", "Test"))
    TYPES = (
        "other", "inflammatory", "healthy_epithelial", "malignant_epithelial", "fibroblast", "muscle", "endothelial",
    )  # fmt: skip
    MERGED = ("other", "inflammatory", "epithelial", "spindle")
    _MERGE = np.array([-1, 0, 1, 2, 2, 3, 3, 3], np.int16)  # by type; a nucleus of type 0 is unknown

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        merged = options.merge == "yes"
        self.label_names = self.MERGED if merged else self.TYPES
        self._label_of = self._MERGE if merged else np.arange(-1, len(self.TYPES), dtype=np.int16)
        self.entries = []
        for part, split in (("Train", "train"), ("Test", "test")):
            if (self.folder / part).is_dir():
                for path, labels in pair_files(self.folder / part / "Images", self.folder / part / "Labels", ".mat"):
                    self.entries.append(Entry(path.stem, path.stem, split, path, labels, options.mpp))
        if not self.entries:
            raise UserError(f"{self.folder} has neither Train/ nor Test/; expected {self.title}")
        self._set_aside(options.val)

    def _set_aside(self, count: int) -> None:
        train = [i for i, entry in enumerate(self.entries) if entry.split == "train"]
        if count and count >= len(train):
            raise UserError(f"consep: val={count}, expected fewer than the {len(train)} images of Train")
        for i in range(count):
            row = train[i * len(train) // count]
            self.entries[row] = replace(self.entries[row], split="val")

    def _nuclei(self, entry: Entry, width: int, height: int) -> Points:
        content = read_mat(entry.labels, ("inst_map", "type_map"))
        shape = (height, width)
        instances = integer_map(content["inst_map"], shape, _MAX_ID, f"{entry.labels}: inst_map")
        types = integer_map(content["type_map"], shape, len(self.TYPES), f"{entry.labels}: type_map")
        numbers, xy = instance_centroids(instances)
        return Points(xy, self._label_of[instance_types(instances, types, numbers)])
