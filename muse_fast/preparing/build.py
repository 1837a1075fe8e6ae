"""Write a ROI set, with a summary and a contact sheet for the user."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from muse_fast.preparing.roi_sheet import roi_sheet
from muse_fast.roiset.roiset import Roi, RoiSetWriter
from muse_fast.sources import SourceImage

_SHOWN = 6

# An image of a source, or a ROI that is already encoded.
Item: TypeAlias = SourceImage | Roi


def build_set(
    writer: RoiSetWriter,
    items: Iterable[Item],
    finish: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    """Write all items to a set, its contact sheet and its summary; return the summary.

    Args:
        items: at least one. An error while iterating leaves no set behind.
        finish: writes further files into the set's folder and returns further entries of the summary.
    """
    tally, shown = Tally(writer.label_names), Sample(_SHOWN)
    with writer:
        for item in items:
            _add(writer, item)
            tally.count(item)
            shown.offer(item)
        roi_sheet(writer.folder / "contact.png", shown.items, writer.label_names)
        summary = tally.summary() | {"bytes": writer.num_bytes} | finish(writer.folder)
        (writer.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _add(writer: RoiSetWriter, item: Item) -> None:
    add = partial(writer.add_jpeg, item.jpeg) if isinstance(item, Roi) else partial(writer.add, item.image)
    add(
        mpp=item.mpp,
        xy=item.xy,
        label=item.label,
        score=item.score,
        slide=item.slide,
        split=item.split,
        origin=item.origin,
    )


def print_summary(out: Path, summary: dict[str, Any], seconds: float) -> None:
    low, high = summary["mpp"]
    splits = {name or "(no split)": count for name, count in summary["rois_per_split"].items()}
    print(f"{out}: {summary['rois']} ROIs of {summary['slides']} slides, {summary['nuclei']} nuclei")
    print(f"  splits   {counted(splits)}")
    print(f"  classes  {counted(summary['nuclei_per_class'])}")
    print(f"  um/px    {low:g}" + (f" to {high:g}" if high > low else ""))
    print(f"  size     {summary['bytes'] / 1e6:.1f} MB in {seconds:.1f} s")
    print(f"  skipped  {counted(summary['dropped'])}")
    print(f"  look at  {out / 'contact.png'}")


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing"


class Tally:
    """Counts the contents of a set while it is written."""

    def __init__(self, label_names: tuple[str, ...]) -> None:
        self.rois = 0
        self._label_names = label_names
        self._splits: Counter[str] = Counter()
        self._labels: Counter[int] = Counter()
        self._slides: set[str] = set()
        self._mpp: set[float] = set()

    def count(self, item: Item) -> None:
        self.rois += 1
        self._splits[item.split] += 1
        self._slides.add(item.slide)
        self._mpp.add(item.mpp)
        labels = np.full(len(item.xy), -1) if item.label is None else item.label
        self._labels.update(labels.tolist())

    def summary(self) -> dict[str, Any]:
        return {
            "rois": self.rois,
            "slides": len(self._slides),
            "nuclei": self._labels.total(),
            "rois_per_split": dict(self._splits),
            "nuclei_per_class": {self._name(label): count for label, count in sorted(self._labels.items())},
            "mpp": [min(self._mpp), max(self._mpp)],
        }

    def _name(self, label: int) -> str:
        if label < 0:
            return "unknown"
        return self._label_names[label] if self._label_names else str(label)


class Sample:
    """A uniform random sample of a stream of images, by reservoir sampling."""

    def __init__(self, count: int) -> None:
        self.items: list[Item] = []
        self._count, self._offered = count, 0
        self._rng = np.random.default_rng(0)

    def offer(self, item: Item) -> None:
        self._offered += 1
        if len(self.items) < self._count:
            self.items.append(item)
        elif (place := int(self._rng.integers(self._offered))) < self._count:
            self.items[place] = item
