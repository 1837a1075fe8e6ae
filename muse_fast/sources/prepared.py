"""``roiset:DIR[,DIR ...]``: ROI sets that were prepared before, to be evaluated on or joined into one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from muse_fast.roiset.roiset import Roi, RoiSet
from muse_fast.sources.base import Source, SourceImage


class Prepared(Source):
    """The ROIs of one ROI set after the other, with all that is known of them.

    The classes are those of all sets, by name. Slides of one name in several sets are one slide.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Source.Options):
        split: str = ""
        """The split of the ROIs that have none."""

    kind = "roiset"
    title = "a ROI set, or several"

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        self._sets = [RoiSet(Path(folder)) for folder in target.split(",")]
        self._split = options.split
        self.label_names = tuple(dict.fromkeys(name for each in self._sets for name in each.label_names))

    def __len__(self) -> int:
        return sum(map(len, self._sets))

    def slides(self) -> Iterator[tuple[str, str]]:
        for each in self._sets:
            for split in each.splits:
                yield from ((slide, split or self._split) for slide in each.slides_of(split))

    def rois(self) -> Iterator[Roi]:
        """The ROIs with their JPEGs as they are, and labels numbered as in ``label_names``."""
        for each in self._sets:
            # The last place is what label -1, unknown, finds.
            places = np.array([*map(self.label_names.index, each.label_names), -1], np.int16)
            for i in range(len(each)):
                roi = each[i]
                yield replace(roi, label=places[roi.label], split=roi.split or self._split)

    def __iter__(self) -> Iterator[SourceImage]:
        for roi in self.rois():
            name = f"{roi.path.name}-{roi.id:06d}"
            pixels = roi.decode()
            yield SourceImage(name, roi.slide, roi.split, pixels, roi.mpp, roi.xy, roi.label, roi.score, roi.origin)
