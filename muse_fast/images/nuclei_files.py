"""Nuclei of a whole slide that the user brings: CSV, GeoJSON of QuPath, or HDF5, all in level-0 pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError, did_you_mean
from muse_fast.images.geojson import centroid, read_shapes
from muse_fast.images.points_csv import read_points

SUFFIXES = (".csv", ".geojson", ".json", ".h5", ".hdf5")
HDF5_KEY = "prediction"  # what the authors' sample builder reads: [n, 2 or more], x and y first


@dataclass(frozen=True, slots=True)
class Nuclei:
    """Nuclei of an image or slide: xy ``[n, 2]`` in its pixels, label ``[n]`` and score ``[n]`` where known."""

    xy: NDArray[np.float32]
    label: NDArray[np.int16] | None = None
    score: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.xy)

    def within(self, x: int, y: int, side: int) -> Nuclei:
        """Those inside a square, in pixels of that square."""
        xy = self.xy - np.array([x, y], np.float32)
        inside = ((xy >= 0) & (xy < side)).all(axis=1)
        label = None if self.label is None else self.label[inside]
        score = None if self.score is None else self.score[inside]
        return Nuclei(xy[inside], label, score)


def read_nuclei(path: Path, width: int, height: int, label_names: tuple[str, ...] = ()) -> Nuclei:
    """Nuclei of a slide of ``width`` x ``height`` level-0 pixels.

    A CSV has the header ``x,y[,label][,score]``. In a GeoJSON every point is a nucleus and so is every polygon, at its
    centre of area; the names of their classes are looked up in ``label_names`` where that is given.

    Raises:
        UserError: the file cannot be read, holds a nucleus outside the slide or of an unknown class; names it.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        xy, label, score = read_points(path, width, height, len(label_names))
        return Nuclei(xy, label, score)
    if suffix in (".h5", ".hdf5"):
        return Nuclei(_inside(path, _read_hdf5(path), width, height))
    return _read_geojson(path, width, height, label_names)


def _read_geojson(path: Path, width: int, height: int, label_names: tuple[str, ...]) -> Nuclei:
    points: list[NDArray[np.float64]] = []
    labels: list[int] = []
    for shape in read_shapes(path, nuclei=True):
        found = [*shape.points, *(centroid(polygon) for polygon in shape.polygons)]
        points += found
        labels += [_label(path, shape.label, label_names)] * len(found)
    xy = _inside(path, np.array(points, np.float64).reshape(-1, 2), width, height)
    return Nuclei(xy, np.array(labels, np.int16) if label_names else None)


def _label(path: Path, name: str, label_names: tuple[str, ...]) -> int:
    if not name or not label_names:
        return -1
    if name not in label_names:
        known = ", ".join(label_names)
        raise UserError(f"{path}: the class {name!r} is not among labels={known}{did_you_mean(name, label_names)}")
    return label_names.index(name)


def _read_hdf5(path: Path) -> NDArray[np.float64]:
    import h5py

    try:
        with h5py.File(path) as file:
            table = file.get(HDF5_KEY)
            shape = table.shape if isinstance(table, h5py.Dataset) else None
            if shape is None or len(shape) != 2 or shape[1] < 2:
                raise UserError(
                    f"{path}: {HDF5_KEY!r} is {'missing' if shape is None else f'of shape {list(shape)}'}, expected a "
                    f"dataset {HDF5_KEY!r} [n, 2 or more] with x, y in level-0 pixels first; found {', '.join(file)}"
                )
            return np.asarray(table[:, :2], np.float64)
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: no readable HDF5 file of numbers ({error})") from error


def _inside(path: Path, xy: NDArray[np.float64], width: int, height: int) -> NDArray[np.float32]:
    inside = ((xy >= 0) & (xy < (width, height))).all(axis=1)  # false for NaN as well
    if not inside.all():
        row = int(np.argmin(inside))
        raise UserError(
            f"{path}: nucleus {row + 1} is at x, y = {xy[row, 0]:g}, {xy[row, 1]:g}, expected level-0 pixels, "
            f"0 <= x < {width} and 0 <= y < {height}"
        )
    return np.minimum(xy, np.nextafter(np.array([width, height], np.float32), np.float32(0))).astype(np.float32)
