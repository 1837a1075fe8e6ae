"""PanNuke."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError
from muse_fast.images.points import Points
from muse_fast.runtime.folders import iter_files
from muse_fast.sources.arrays import instance_centroids, instance_types, integer_map, map_npy, read_npy_mapping
from muse_fast.sources.base import SPLITS, Dataset, Entry, mpp_setting, pair_files, split_names

_MAX_ID = 2**31 - 1


class PanNuke(Dataset):
    """PanNuke: images of 256 px at 40x from 19 tissues in three folds, with instance maps of five classes.

    Three layouts are read: the zip files as unpacked (``Fold 1/images/fold1/images.npy`` and
    ``Fold 1/masks/fold1/masks.npy``), flat folds (``fold0/images.npy``, ``fold0/masks.npy``), and CellViT's conversion
    (``fold0/images/0_17.png``, ``fold0/labels/0_17.npy``). The arrays are memory-mapped.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Dataset.Options):
        splits: str = ",".join(SPLITS)
        """Names of the splits, one for each fold present, in order."""
        mpp: float = mpp_setting(0.25)
        """Um per pixel; nominally 0.25 at 40x."""

    kind = "pannuke"
    title = "the folder of PanNuke with its folds"
    layouts = (
        ("Fold */images/fold*/images.npy", "Fold */masks/fold*/masks.npy"),
        ("fold*/images.npy", "fold*/masks.npy"),
        ("fold*/images/*.png", "fold*/labels/*.npy"),
    )
    label_names = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        self._maps: dict[Path, NDArray[Any]] = {}
        folds = self._folds()
        split_of = split_names(self.kind, options.splits, tuple(folds))
        self.entries = []
        for name, (images, labels) in folds.items():
            listed = self._stacked if images.suffix == ".npy" else self._single
            self.entries += listed(name, images, labels, split_of[name], options.mpp)

    def _mapped(self, path: Path) -> NDArray[Any]:
        if path not in self._maps:
            self._maps[path] = map_npy(path)
        return self._maps[path]

    def _folds(self) -> dict[str, tuple[Path, Path]]:
        """Find images and labels of every fold, by its name, in the first layout that matches anything."""
        for layout in self.layouts:
            images, labels = (self._by_fold(pattern) for pattern in layout)
            for fold in images.keys() ^ labels.keys():
                there, pattern = (images, layout[1]) if fold in images else (labels, layout[0])
                raise UserError(f"{there[fold]} exists, but {fold} has no {pattern}")
            if images:
                return {fold: (images[fold], labels[fold]) for fold in sorted(images)}
        raise UserError(
            f"{self.folder} contains no fold of PanNuke, expected {' or '.join(one[0] for one in self.layouts)}"
        )

    def _by_fold(self, pattern: str) -> dict[str, Path]:
        """Find the stacked array, or the folder of single files, of every fold."""
        found = {}
        for path in iter_files(self.folder, pattern):
            fold = path.relative_to(self.folder).parts[0].replace(" ", "").lower()
            found[fold] = path if path.name in ("images.npy", "masks.npy") else path.parent
        return found

    def _stacked(self, fold: str, images: Path, masks: Path, split: str, mpp: float) -> Iterator[Entry]:
        shape = self._mapped(images).shape
        if len(shape) != 4 or shape[3] != 3:
            raise UserError(f"{images} has the shape {list(shape)}, expected [N, H, W, 3]")
        expected = (*shape[:3], len(self.label_names) + 1)
        if (found := self._mapped(masks).shape) != expected:
            raise UserError(f"{masks} has the shape {list(found)}, expected {list(expected)} to match {images}")
        for row in range(shape[0]):
            name = f"{fold}_{row:05d}"
            yield Entry(name, name, split, images, masks, mpp, row=row)

    def _single(self, fold: str, images: Path, labels: Path, split: str, mpp: float) -> Iterator[Entry]:
        for path, file in pair_files(images, labels, ".npy"):
            yield Entry(f"{fold}_{path.stem}", f"{fold}_{path.stem}", split, path, file, mpp)

    def _pixels(self, entry: Entry) -> NDArray[np.uint8]:
        if entry.image.suffix != ".npy":
            return super()._pixels(entry)
        pixels = self._mapped(entry.image)[entry.row]
        return integer_map(pixels, pixels.shape, 255, f"{entry.image}, image {entry.row}").astype(np.uint8)

    def _nuclei(self, entry: Entry, width: int, height: int) -> Points:
        if entry.image.suffix != ".npy":
            return self._single_nuclei(entry, width, height)
        masks = self._mapped(entry.labels)[entry.row]
        where = f"{entry.labels}, image {entry.row}"
        found = [np.zeros((0, 2))]
        for channel in range(len(self.label_names)):  # the last channel is background
            instances = integer_map(masks[..., channel], (height, width), _MAX_ID, f"{where}, channel {channel}")
            found.append(instance_centroids(instances)[1])
        label = np.repeat(np.arange(-1, len(self.label_names)), [len(xy) for xy in found])
        return Points(np.concatenate(found), label.astype(np.int16))

    def _single_nuclei(self, entry: Entry, width: int, height: int) -> Points:
        maps, shape = read_npy_mapping(entry.labels, ("inst_map", "type_map")), (height, width)
        instances = integer_map(maps["inst_map"], shape, _MAX_ID, f"{entry.labels}: inst_map")
        types = integer_map(maps["type_map"], shape, len(self.label_names), f"{entry.labels}: type_map")
        numbers, xy = instance_centroids(instances)
        return Points(xy, (instance_types(instances, types, numbers) - 1).astype(np.int16))
