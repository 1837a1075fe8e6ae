"""The layout of detection datasets for CellViT++."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from muse_fast.errors import UserError, did_you_mean
from muse_fast.images.points import Points
from muse_fast.images.points_csv import read_bare_points
from muse_fast.images.tables import text_lines
from muse_fast.runtime.folders import subfolders
from muse_fast.runtime.options import setting
from muse_fast.sources.base import Dataset, Entry, mpp_setting, pair_files, put_in_split, require_file


class CellViT(Dataset):
    """CellViT++'s layout: ``{train,test}/{images/*.png,labels/*.csv}``, rows ``x,y,label`` counted from 0.

    ``label_map.yaml`` names the labels. ``splits/fold_K/{train,val}.csv`` list stems of the train images, one per line;
    without them, all are in the split train.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Dataset.Options):
        mpp: float | None = mpp_setting()
        """Um per pixel; required, because the layout does not state it."""
        fold: int = setting(0, ge=0, le=999)
        """K of ``splits/fold_K``."""

    kind = "cellvit"
    title = "a folder in CellViT++'s layout with train/, test/ and label_map.yaml"
    layouts = tuple(
        ("label_map.yaml", f"{part}/images/*.{suffix}", f"{part}/labels/*.csv")
        for part in ("train", "test")
        for suffix in ("png", "jpg")
    )

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        self.label_names = self._read_label_map(require_file(self.folder / "label_map.yaml", f"expected {self.title}"))
        if options.mpp is None:
            raise UserError(f"{self.folder}: the layout does not state um per pixel; give mpp=NUMBER")
        self.entries = []
        for part in ("train", "test"):
            if not (self.folder / part).is_dir():
                continue
            pairs = pair_files(self.folder / part / "images", self.folder / part / "labels", ".csv")
            split_of = self._read_fold(options.fold, {path.stem for path, _ in pairs}) if part == "train" else {}
            for path, labels in pairs:
                split = split_of.get(path.stem, "") if split_of else part
                self.entries.append(Entry(path.name, path.stem, split, path, labels, options.mpp))
        if not self.entries:
            raise UserError(f"{self.folder} has neither train/ nor test/; expected {self.title}")

    def _read_label_map(self, path: Path) -> tuple[str, ...]:
        from omegaconf import OmegaConf

        try:
            content = OmegaConf.to_container(OmegaConf.load(path))
        except Exception as error:  # PyYAML's and OmegaConf's errors have no common base
            raise UserError(f"{path}: not readable as YAML ({error})") from error
        if isinstance(content, Mapping) and isinstance(content.get("labels"), Mapping):
            content = content["labels"]
        names = {str(key): str(name) for key, name in content.items()} if isinstance(content, Mapping) else {}
        wanted = [str(i) for i in range(len(names))]
        if not names or sorted(names, key=lambda key: (len(key), key)) != wanted:
            raise UserError(f"{path}: {content!r}, expected a name for each label 0, 1, 2, ...")
        return tuple(names[key] for key in wanted)

    def _read_fold(self, fold: int, stems: set[str]) -> dict[str, str]:
        """Return the split of every train image listed in the fold; empty if there are no folds."""
        folds = self.folder / "splits"
        if not folds.is_dir():
            return {}
        split_of: dict[str, str] = {}
        for split in ("train", "val"):
            known = ", ".join(path.name for path in subfolders(folds)) or "nothing"
            path = require_file(
                folds / f"fold_{fold}" / f"{split}.csv", f"{folds} contains {known}; choose with fold=K"
            )
            for row, line in text_lines(path):
                stem = line.rstrip(",").removesuffix(".png")
                if not stem:
                    continue
                if stem not in stems:
                    raise UserError(f"{path}, row {row}: train/images has no {stem!r}{did_you_mean(stem, stems)}")
                put_in_split(split_of, stem, split, f"{path}, row {row}")
        return split_of

    def _nuclei(self, entry: Entry, width: int, height: int) -> Points:
        return read_bare_points(entry.labels, width, height, range(len(self.label_names)))
