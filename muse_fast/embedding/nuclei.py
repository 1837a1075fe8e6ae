"""Which nuclei of a page are described: those that a detector finds, or those of the user's files."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError
from muse_fast.images.geojson import read_geojson_points
from muse_fast.images.nuclei_files import SUFFIXES, read_nuclei
from muse_fast.images.points import Points, drop_outside
from muse_fast.images.points_csv import read_points_and_names
from muse_fast.images.slide import Slide
from muse_fast.predicting.detectors import TileDetector
from muse_fast.predicting.files import as_written
from muse_fast.predicting.inputs import fingerprint_of, read_record
from muse_fast.predicting.pages import PageFile
from muse_fast.predicting.pipeline import Prediction
from muse_fast.runtime.progress_bar import ShowProgress
from muse_fast.sources.wsi import file_named, files_by_name

PREDICTIONS = "predict.json"  # in a folder that `muse_fast.predict` has written
_ONE_CLASS = "nucleus"
_TILES = 4  # that a detector processes at a time


@dataclass(frozen=True, slots=True)
class Nuclei:
    """The nuclei of one page."""

    xy: NDArray[np.float64]  # [n, 2] level-0 pixels, on the page
    label: NDArray[np.int16]  # [n] index into class_names, -1 unknown
    score: NDArray[np.float32]  # [n] NaN without scores
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.xy)


class NucleiSource(Protocol):
    """Gives the nuclei of pages."""

    def record(self, file: PageFile) -> Any:
        """What the nuclei of a page depend on, for JSON.

        Raises:
            UserError: there is no file for the page.
        """
        ...

    def of(self, file: PageFile, progress: ShowProgress) -> Nuclei:
        """The nuclei of a page, always in the same order.

        Raises:
            UserError: page or nuclei cannot be read.
        """
        ...


class Detected:
    """The nuclei that `muse_fast.predict` finds, with the numbers that it writes.

    Args:
        name, fingerprint: of the detector's weights.
        everywhere: also outside tissue.
    """

    def __init__(
        self,
        detector: TileDetector,
        name: str,
        fingerprint: str,
        *,
        everywhere: bool,
        readers: int,
        max_unreadable: float,
    ) -> None:
        self._detector, self._record = detector, {"detector": name, "sha256": fingerprint}
        self._everywhere, self._readers, self._max_unreadable = everywhere, readers, max_unreadable

    def record(self, file: PageFile) -> Any:
        return self._record

    def of(self, file: PageFile, progress: ShowProgress) -> Nuclei:
        with Prediction(
            file, self._detector, everywhere=self._everywhere, tile=None, max_unreadable=self._max_unreadable
        ) as found:
            sink = Collector((found.page.width, found.page.height))
            found.run(
                sink,
                batch=_TILES,
                readers=self._readers,
                done=lambda tiles: progress(tiles, len(found.tiles), "tiles"),
            )
        return sink.nuclei(self._detector.class_names)


class Given:
    """Nuclei at the positions ``[n, 2]`` in level-0 pixels, all of one class.

    Raises:
        UserError: other positions.
    """

    def __init__(self, xy: NDArray[np.float64]) -> None:
        if xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(xy).all():
            raise UserError(f"nuclei of shape {list(xy.shape)}: expected finite positions [n, 2] in level-0 pixels")
        self._xy = xy

    def record(self, file: PageFile) -> Any:
        """See `NucleiSource.record`."""
        return sha256(self._xy.tobytes()).hexdigest()

    def of(self, file: PageFile, progress: ShowProgress) -> Nuclei:
        """See `NucleiSource.of`."""
        with closing(file.open()) as page:
            outside = ~((self._xy >= 0) & (self._xy <= (page.width, page.height))).all(axis=1)
            if outside.any():
                row = int(outside.argmax())
                raise UserError(
                    f"{file.path}: {int(outside.sum())} of {len(self._xy)} nuclei lie outside its {page.width} x "
                    f"{page.height} px (row {row} at {', '.join(f'{p:g}' for p in self._xy[row])}); expected level-0 "
                    "pixels"
                )
        count = len(self._xy)
        return Nuclei(self._xy, np.zeros(count, np.int16), np.full(count, np.nan, np.float32), (_ONE_CLASS,))


class Collector:
    """Keeps nuclei as they are read from the table that `muse_fast.predict` would write."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._xy, self._label, self._score = [np.zeros((0, 2))], [np.zeros(0, np.int16)], [np.zeros(0, np.float32)]

    def write(self, xy: NDArray[np.float64], label: NDArray[np.int64], score: NDArray[np.float64]) -> None:
        """See `muse_fast.predicting.pipeline.Sink`."""
        self._xy.append(as_written(xy, self._size).astype(np.float32).astype(np.float64))
        self._label.append(label.astype(np.int16))
        self._score.append(score.round(4).astype(np.float32))

    def nuclei(self, class_names: tuple[str, ...]) -> Nuclei:
        xy, label, score = np.concatenate(self._xy), np.concatenate(self._label), np.concatenate(self._score)
        return Nuclei(xy, label, score, class_names)


class FromFiles:
    """The nuclei of the user's files: one file for one page, a folder of files named like the pages, or a folder of
    earlier predictions.

    Args:
        target: the file or folder.
        multi, frame: of GeoJSON, see `muse_fast.images.nuclei_files.read_nuclei`.
    """

    def __init__(self, target: Path, multi: str, frame: str) -> None:
        self._target, self._multi, self._frame = target, multi, frame
        self._predictions = (target / PREDICTIONS).is_file()
        self._names = tuple(read_record(target / PREDICTIONS).get("class_names", ()))
        self._by_name = files_by_name(target, SUFFIXES) if target.is_dir() and not self._predictions else {}

    @property
    def is_of_one_page(self) -> bool:
        return self._target.is_file()

    def record(self, file: PageFile) -> Any:
        return fingerprint_of(self._file_of(file))

    def of(self, file: PageFile, progress: ShowProgress) -> Nuclei:
        with closing(file.open()) as page:
            return self._read(self._file_of(file), page)

    def _read(self, path: Path, page: Slide) -> Nuclei:
        points, names, left_out = _read_with_names(path, page, self._names, self._multi, self._frame)
        if left_out:
            print(f"{path}: left out {', '.join(f'{n} x {why}' for why, n in left_out.items())}", flush=True)
        score = np.full(len(points), np.nan, np.float32) if points.score is None else points.score.astype(np.float32)
        unique = tuple(dict.fromkeys(names))  # a table may give two labels one name
        label = np.array([*map(unique.index, names), -1], np.int16)[points.classes()]
        return Nuclei(points.xy.astype(np.float64), label, score, unique)

    def _file_of(self, file: PageFile) -> Path:
        if self._target.is_file():
            return self._target
        if self._predictions:
            path = self._target / file.name / "cells.csv"
            if not path.is_file():
                raise UserError(f"nuclei={self._target} has no prediction {file.name} (no {path.name} there)")
            return path
        found = file_named(self._by_name, file.name)
        if found is None:
            raise UserError(f"nuclei={self._target} has no file {file.name} with suffix {', '.join(SUFFIXES)}")
        return found


def _read_with_names(
    path: Path, slide: Slide, names: tuple[str, ...], multi: str, frame: str
) -> tuple[Points, tuple[str, ...], Counter[str]]:
    """The nuclei of a file as by `read_nuclei`, the names of their labels, and what was left out, by reason.

    Without ``names``, these are the names in the file, in the order of a CSV's labels, else of the alphabet; numbers
    if a CSV has no names.
    """
    suffix = path.suffix.lower()
    if names or suffix in (".h5", ".hdf5"):
        points, left_out = read_nuclei(path, slide, names, multi, frame)
        return points, names or (_ONE_CLASS,), left_out
    if suffix == ".csv":
        points, named = read_points_and_names(path, slide.width, slide.height)
        labels = range(int(points.classes().max(initial=0)) + 1)
        return points, tuple(named.get(i, _ONE_CLASS if points.label is None else str(i)) for i in labels), Counter()
    within = slide.frame(frame)
    found = read_geojson_points(path, slide.mpp, multi, within.origin)
    names = tuple(sorted({*found.label} - {""}))
    points = Points(found.xy, found.labels(names) if names else None)
    points, outside = drop_outside(points, within.box, path, within.area, within.expected)
    return points, names or (_ONE_CLASS,), +(found.left_out + Counter({"nucleus outside the slide": outside}))
