"""``roiset:DIR[,DIR ...]``: prepared ROI sets, to evaluate on or to join into one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError
from muse_fast.roiset.roiset import Roi, RoiSet
from muse_fast.runtime.options import split_list
from muse_fast.sources.base import Source, SourceImage


class Prepared(Source):
    """The ROIs of one ROI set after the other, with all their annotations.

    The classes of all sets are merged by name; sets that only number them keep their numbers. Slides of the same name
    in several sets are one slide.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Source.Options):
        split: str = ""
        """Split of the ROIs without one."""

    kind = "roiset"
    title = "one or more ROI sets"

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        self._sets = [RoiSet(Path(folder)) for folder in split_list(target)]
        self._split = options.split
        self.label_names = tuple(dict.fromkeys(name for each in self._sets for name in each.label_names))

    def __len__(self) -> int:
        return sum(map(len, self._sets))

    def slides(self) -> Iterator[tuple[str, str]]:
        for each in self._sets:
            for split in each.splits:
                yield from ((slide, split or self._split) for slide in each.slides_of(split))

    def rois(self) -> Iterator[Roi]:
        """Yield the ROIs with unchanged JPEGs and labels renumbered to ``label_names``.

        Raises:
            UserError: a set only numbers its classes, another names them.
        """
        for each in self._sets:
            # Label -1, unknown, indexes the last element and stays -1.
            places = np.array([*map(self.label_names.index, each.label_names), -1], np.int16)
            for i in range(len(each)):
                roi = each[i]
                label = places[roi.label] if each.label_names else self._numbered(roi.label, each)
                yield replace(roi, label=label, split=roi.split or self._split)

    def _numbered(self, label: NDArray[np.int16], each: RoiSet) -> NDArray[np.int16]:
        """The labels of a set that does not name them, which are refused if another set does."""
        if self.label_names and label.max(initial=-1) >= 0:
            raise UserError(f"{each.path} only numbers its classes, another set names them; prepare it with labels=")
        return label

    def __iter__(self) -> Iterator[SourceImage]:
        for roi in self.rois():
            name = f"{roi.path.name}-{roi.id:06d}"
            pixels = roi.decode()
            yield SourceImage(name, roi.slide, roi.split, pixels, roi.mpp, roi.xy, roi.label, roi.score, roi.origin)
