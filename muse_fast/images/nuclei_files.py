"""The user's files of the nuclei of a whole slide: CSV, GeoJSON from QuPath, or HDF5, all in level-0 pixels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError
from muse_fast.images.geojson import MAX_AREA_UM2, read_geojson_points
from muse_fast.images.geojson import SUFFIXES as GEOJSON_SUFFIXES
from muse_fast.images.points import Points
from muse_fast.images.points_csv import read_points

SUFFIXES = (".csv", *GEOJSON_SUFFIXES, ".json", ".h5", ".hdf5")
HDF5_KEY = "prediction"  # the dataset that the authors' sample builder reads: [n, 2 or more], x and y first


def read_nuclei(
    path: Path, width: int, height: int, mpp: float, label_names: tuple[str, ...] = (), multi: str = "one"
) -> tuple[Points, Counter[str]]:
    """The nuclei of a slide, and the number of objects in the file that are not nuclei, by reason.

    Args:
        path: a CSV with the header ``x,y[,label][,score]``, GeoJSON, or HDF5.
        width, height: of the slide, level-0 pixels.
        mpp: um per pixel of level 0.
        label_names: names of the classes in a GeoJSON; empty: classes are not read.
        multi: see `read_geojson_points`, which decides which objects are nuclei.

    Raises:
        UserError: the file cannot be read, or a nucleus is outside the slide or of an unknown class; names the file.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return read_points(path, width, height, len(label_names)), Counter()
    if suffix in (".h5", ".hdf5"):
        return Points(_inside(path, _read_hdf5(path), width, height)), Counter()
    points = read_geojson_points(path, multi, MAX_AREA_UM2 / mpp**2)
    label = points.labels(label_names) if label_names else None
    return Points(_inside(path, points.xy, width, height), label), points.left_out


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
        raise UserError(f"{path}: not a readable HDF5 file of numbers ({error})") from error


def _inside(path: Path, xy: NDArray[np.float64], width: int, height: int) -> NDArray[np.float32]:
    inside = ((xy >= 0) & (xy < (width, height))).all(axis=1)  # false for NaN as well
    if not inside.all():
        row = int(np.argmin(inside))
        raise UserError(
            f"{path}: nucleus {row + 1} is at x, y = {xy[row, 0]:g}, {xy[row, 1]:g}, expected level-0 pixels, "
            f"0 <= x < {width} and 0 <= y < {height}"
        )
    return np.minimum(xy, np.nextafter(np.array([width, height], np.float32), np.float32(0))).astype(np.float32)
