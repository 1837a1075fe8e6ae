"""Folders of images with a sidecar file each, of the same stem, for the nuclei: CSV points or QuPath's GeoJSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from muse_fast.errors import UserError
from muse_fast.images.geojson import MULTI, GeoPoints, read_geojson_points
from muse_fast.images.geojson import SUFFIXES as GEOJSON_SUFFIXES
from muse_fast.images.points import Points
from muse_fast.images.points_csv import class_names_of, read_named_points, read_points
from muse_fast.runtime.options import setting, split_list
from muse_fast.sources.base import Dataset, Entry, find_mpp, list_images, mpp_setting


class _Sidecar(Dataset):
    """Images with sidecar files.

    The um per pixel comes from ``mpp.csv`` (``image,mpp[,slide][,split]``), else from the option ``mpp``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Dataset.Options):
        mpp: float | None = mpp_setting()
        """Um per pixel of images without a row in ``mpp.csv``."""
        labels: str = ""
        r"""Names of the classes, for example ``lymphocyte,tumour,stromal``; ``\,`` is a comma in a name."""

    suffixes: ClassVar[tuple[str, ...]]  # of the sidecar file
    EMPTY: ClassVar[str]  # content of the file for an image without nuclei

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        self.label_names = tuple(split_list(options.labels))
        images = list_images(self.folder)
        stems = Counter(path.stem for path in images)
        self.entries = []
        for path, row in zip(images, find_mpp(self.folder, images, options.mpp), strict=True):
            if stems[path.stem] > 1:
                file = path.stem + self.suffixes[0]
                raise UserError(f"{path}: another image has the same stem, so {file} could belong to either")
            self.entries.append(Entry(path.name, row.slide, row.split, path, self._find_sidecar(path), row.mpp))

    def _find_sidecar(self, path: Path) -> Path:
        found = [path.with_name(path.stem + suffix) for suffix in self.suffixes]
        found = [file for file in found if file.is_file()]
        if not found:
            raise UserError(
                f"{path}: {path.stem}{self.suffixes[0]} is missing; an image without nuclei needs {self.EMPTY}"
            )
        if len(found) > 1:
            raise UserError(f"{path}: both {found[0].name} and {found[1].name} exist; keep one")
        return found[0]


class CsvPoints(_Sidecar):
    """Images with a CSV file each, with the header ``x,y[,label][,score]``, or as `muse_fast.predict` writes it.

    The classes are those of ``labels``, or else all that the columns ``class`` name, in alphabetical order.
    """

    kind = "points"
    title = "a folder of images with a CSV of points each"
    layouts = tuple((f"*{suffix}", "*.csv") for suffix in (".png", ".jpg", ".tif"))
    suffixes = (".csv",)
    EMPTY = "only the header"

    def __init__(self, target: str, options: _Sidecar.Options) -> None:
        super().__init__(target, options)
        self.label_names = self.label_names or class_names_of(entry.labels for entry in self.entries)

    def _nuclei(self, entry: Entry, width: int, height: int) -> Points:
        if not self.label_names:
            return read_points(entry.labels, width, height, 0)
        return read_named_points(entry.labels, width, height, self.label_names)


class QuPath(_Sidecar):
    """Images with a QuPath export each: ``STEM.geojson`` or ``STEM.geojson.gz``, points or outlines in image pixels.

    Detections are nuclei; in a file without detections, annotations are. The classes are those of ``labels``, or else
    all that the files contain, in alphabetical order.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(_Sidecar.Options):
        multi: str = setting("auto", choices=MULTI)
        """``one``: a MultiPolygon is one nucleus; ``each``: each of its parts is one, as written by CellViT; ``auto``:
        one if its parts are few and close."""

    kind = "qupath"
    title = "a folder of images with QuPath's GeoJSON each"
    layouts = tuple(
        (f"*{suffix}", f"*{geojson}") for suffix in (".png", ".jpg", ".tif") for geojson in GEOJSON_SUFFIXES
    )
    suffixes = GEOJSON_SUFFIXES
    EMPTY = "an empty FeatureCollection"

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        self._multi = options.multi
        if not self.label_names:
            named = (set(self._points(entry).label) for entry in self.entries)
            self.label_names = tuple(sorted(set().union(*named) - {""}))

    def _points(self, entry: Entry) -> GeoPoints:
        return read_geojson_points(entry.labels, entry.mpp, self._multi)

    def _nuclei(self, entry: Entry, width: int, height: int) -> Points:
        points = self._points(entry)
        self.dropped += points.left_out
        return self._inside(Points(points.xy, points.labels(self.label_names)), width, height, entry.labels)
