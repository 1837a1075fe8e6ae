"""Where ROIs come from: public datasets, folders of images with points, procedural images, whole slides.

A source yields one ``SourceImage`` at a time and never holds more than one. ``open_source("brcam2c:DIR")`` opens it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from muse_fast.data import synthetic
from muse_fast.data.tables import MPP_RANGE, read_image, read_mpp_table, read_points
from muse_fast.errors import UserError, did_you_mean


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image and its nuclei, as a source yields it."""

    name: str
    slide: str
    split: str  # "" where the source knows no split
    image: NDArray[np.uint8]  # [H, W, 3] RGB
    mpp: float  # um per pixel
    xy: NDArray[np.float32]  # [n, 2] pixels of the image
    label: NDArray[np.int16] | None  # [n], position in the source's label_names, -1 unknown
    score: NDArray[np.float32] | None  # [n]
    origin: tuple[int, int] = (0, 0)  # x, y of the top-left corner in level-0 pixels of the slide


class Source(ABC):
    """An iterable of ``SourceImage``. Sources that know their length before the work have ``len()``."""

    kind: ClassVar[str]
    options: ClassVar[dict[str, tuple[type, float, float]]] = {}  # name: type, lowest, highest
    label_names: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()  # what was left out so far, by reason

    @abstractmethod
    def __iter__(self) -> Iterator[SourceImage]: ...

    def slides(self) -> Iterator[tuple[str, str]]:
        """Slide and split of every image; sources that need not read images for it do not."""
        yield from ((item.slide, item.split) for item in self)


class BrcaM2C(Source):
    """BRCA-M2C: breast patches of TCGA at 0.5 um per pixel with three classes of nuclei.

    An image is called ``{slide}_{x}_{y}_{w}_{h}_{4 * mpp of the slide}.png`` with x, y, w, h in level-0 pixels; its
    labels are rows ``y x class``. The images were resampled to 0.5 um per pixel whatever the slide had.
    """

    kind = "brcam2c"
    label_names = ("lymphocyte", "tumour", "stromal")
    MPP = 0.5
    _NAME = re.compile(r"(?P<slide>[^_]+)_(?P<x>\d+)_(?P<y>\d+)_\d+_\d+_[\d.]+\.png")

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._split_of: dict[str, str] = {}
        for split in ("train", "val", "test"):
            listing = self._folder / f"brca_ds_{split}.txt"
            if not listing.is_file():
                raise UserError(f"{listing} is missing; expected the folder of BRCA-M2C with images/ and labels/")
            for row, name in enumerate(listing.read_text().split(), start=1):
                if name in self._split_of:
                    raise UserError(f"{listing}, row {row}: {name} stands in the split {self._split_of[name]} too")
                self._split_of[name] = split

    def __len__(self) -> int:
        return len(self._split_of)

    def slides(self) -> Iterator[tuple[str, str]]:
        yield from ((self._parts(name)["slide"], split) for name, split in self._split_of.items())

    def _parts(self, name: str) -> re.Match[str]:
        parts = self._NAME.fullmatch(name)
        if parts is None:
            raise UserError(f"{self._folder / name}: expected a name like {{slide}}_x_y_w_h_{{4 * mpp}}.png")
        return parts

    def __iter__(self) -> Iterator[SourceImage]:
        for name, split in self._split_of.items():
            parts = self._parts(name)
            image = read_image(self._folder / "images" / name)
            xy, label = self._read_labels(Path(name).stem, image.shape)
            origin = int(parts["x"]), int(parts["y"])
            yield SourceImage(name, parts["slide"], split, image, self.MPP, xy, label, None, origin)

    def _read_labels(self, stem: str, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        path = self._folder / "labels" / f"{stem}_gt_class_coords.txt"
        if not path.is_file():
            raise UserError(f"{path} is missing")
        rows = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            values = line.split()
            if not values:
                continue
            if len(values) != 3 or not all(value.isdecimal() for value in values):
                raise UserError(f"{path}, row {number}: {line!r}, expected three integers 'y x class'")
            y, x, label = map(int, values)
            if y >= shape[0] or x >= shape[1] or not 1 <= label <= 3:
                raise UserError(
                    f"{path}, row {number}: {line!r}, expected y < {shape[0]}, x < {shape[1]}, class 1 to 3"
                )
            rows.append((x, y, label - 1))
        table = np.array(rows, np.int64).reshape(-1, 3)
        return table[:, :2].astype(np.float32), table[:, 2].astype(np.int16)


class Points(Source):
    """A folder of images (png, jpg, tif), each with a CSV of the same stem and the header ``x,y[,label][,score]``.

    The um per pixel comes from the option ``mpp`` or from ``mpp.csv`` (``image,mpp[,slide][,split]``). The option
    ``labels`` names the classes, for example ``labels=lymphocyte,tumour,stromal``.
    """

    kind = "points"
    options: ClassVar[dict[str, tuple[type, float, float]]] = {"mpp": (float, *MPP_RANGE), "labels": (str, 0, 0)}
    SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

    def __init__(self, folder: str, mpp: float | None = None, labels: str = "") -> None:
        super().__init__()
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise UserError(f"{folder} is no folder; expected images with a CSV of points each")
        self.label_names = tuple(filter(None, labels.split(",")))
        self._mpp = mpp
        self._table = read_mpp_table(self._folder)
        self._images = sorted(path for path in self._folder.iterdir() if path.suffix.lower() in self.SUFFIXES)
        self._check_files()

    def _check_files(self) -> None:
        """Refuse before the work begins what cannot end well."""
        if not self._images:
            raise UserError(f"{self._folder} holds no image ({', '.join(self.SUFFIXES)})")
        stems = Counter(path.stem for path in self._images)
        for path in self._images:
            if stems[path.stem] > 1:
                raise UserError(f"{path}: another image has the same stem, so {path.stem}.csv could belong to either")
            if not path.with_suffix(".csv").is_file():
                raise UserError(f"{path}: {path.stem}.csv is missing; an image without nuclei needs the header alone")
            if self._mpp is None and path.name not in self._table:
                raise UserError(
                    f"{path}: um per pixel unknown; give mpp=NUMBER or list the image in mpp.csv (image,mpp)"
                )

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[SourceImage]:
        for path in self._images:
            row = self._table.get(path.name)
            mpp = self._mpp if self._mpp is not None else row.mpp if row else None
            assert mpp is not None  # _check_files
            image = read_image(path)
            height, width, _ = image.shape
            xy, label, score = read_points(path.with_suffix(".csv"), width, height, len(self.label_names))
            slide, split = (row.slide or path.stem, row.split) if row else (path.stem, "")
            yield SourceImage(path.name, slide, split, image, mpp, xy, label, score)


class Synthetic(Source):
    """``synthetic:N``: N procedural images, the first 70 % train, then 15 % val, then 15 % test."""

    kind = "synthetic"
    label_names = synthetic.LABEL_NAMES
    options: ClassVar[dict[str, tuple[type, float, float]]] = {
        "size": (int, 32, 8192),
        "mpp": (float, *MPP_RANGE),
        "seed": (int, 0, 2**31),
    }

    def __init__(self, count: str, size: int = synthetic.SIZE, mpp: float = synthetic.MPP, seed: int = 0) -> None:
        super().__init__()
        if not count.isdecimal() or int(count) < 1:
            raise UserError(f"synthetic:{count}: expected the number of images, 1 or more")
        self._count, self._size, self._mpp, self._seed = int(count), size, mpp, seed

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[SourceImage]:
        for i in range(self._count):
            image, xy, label = synthetic.synthetic_image((self._seed, i), self._size, self._mpp)
            place = i / self._count
            split = "train" if place < 0.7 else "val" if place < 0.85 else "test"
            name = f"synthetic-{i:06d}"
            yield SourceImage(name, name, split, image, self._mpp, xy, label, None)


def open_source(spec: str, **options: Any) -> Source:
    """Open ``KIND:TARGET``; options may be text (``"0.5"``) or values.

    Raises:
        UserError: unknown kind or option (with the nearest known name), or the target cannot be read.
    """
    from muse_fast.data.slides import Slides

    kinds: dict[str, type[Source]] = {source.kind: source for source in (BrcaM2C, Points, Synthetic, Slides)}
    kind, _, target = spec.partition(":")
    if kind not in kinds or not target:
        hint = did_you_mean(kind, kinds) if kind not in kinds else ""
        raise UserError(f"{spec!r} is no source, expected KIND:TARGET with KIND one of {', '.join(kinds)}{hint}")
    source = kinds[kind]
    return source(target, **{name: _parse_option(source, name, value) for name, value in options.items()})  # type: ignore[call-arg]


def _parse_option(source: type[Source], name: str, value: Any) -> Any:
    if name not in source.options:
        known = ", ".join(source.options) or "none"
        raise UserError(f"{source.kind}: no option {name!r} among {known}{did_you_mean(name, source.options)}")
    kind, low, high = source.options[name]
    if kind is str:
        return str(value)
    try:
        number = kind(str(value))
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{source.kind}: {name}={value}, expected {what} from {low} to {high}")
    return number
