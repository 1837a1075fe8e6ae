"""The user's files of the nuclei of a whole slide: CSV and HDF5 in level-0 pixels, GeoJSON in those of QuPath."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError
from muse_fast.images.geojson import SUFFIXES as GEOJSON_SUFFIXES
from muse_fast.images.geojson import read_geojson_points
from muse_fast.images.points import Points, drop_outside
from muse_fast.images.points_csv import read_named_points, read_points_and_names
from muse_fast.images.slide import Slide

SUFFIXES = (".csv", *GEOJSON_SUFFIXES, ".json", ".h5", ".hdf5")
HDF5_KEY = "prediction"  # the dataset that the authors' sample builder reads: [n, 2 or more], x and y first
_NO_LABELS = "name of a class, as labels= is not given"


def read_nuclei(
    path: Path, slide: Slide, label_names: tuple[str, ...] = (), multi: str = "auto", frame: str = "qupath"
) -> tuple[Points, Counter[str]]:
    """The nuclei of a slide in level-0 pixels, and how much of the file was left out, by reason.

    Args:
        path: a CSV as `read_named_points` reads it, GeoJSON, or HDF5.
        label_names: names of the classes; empty: names are not read.
        multi: see `read_geojson_points`, which decides which objects are nuclei.
        frame: of a GeoJSON that does not record its origin, see `Slide.frame`.

    Raises:
        UserError: the file cannot be read, too many nuclei are outside the slide, one in a CSV is, or one is of an
            unknown class; names the file.
    """
    suffix, left_out = path.suffix.lower(), Counter[str]()
    if suffix == ".csv":
        if label_names:
            return read_named_points(path, slide.width, slide.height, label_names), left_out
        nuclei, names = read_points_and_names(path, slide.width, slide.height)
        left_out[_NO_LABELS] = len(nuclei) if len(names) > 1 else 0
        return nuclei, +left_out
    if suffix in (".h5", ".hdf5"):
        within = slide.frame("level0")
        nuclei = Points(_read_hdf5(path))
    else:
        within = slide.frame(frame)
        found = read_geojson_points(path, slide.mpp, multi, within.origin)
        nuclei = Points(found.xy, found.labels(label_names) if label_names else None)
        left_out += found.left_out
        if not label_names and len({*found.label} - {""}) > 1:
            left_out[_NO_LABELS] = sum(map(bool, found.label))
    nuclei, outside = drop_outside(nuclei, within.box, path, within.area, within.expected)
    left_out["nucleus outside the slide"] = outside
    return nuclei, +left_out


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
            xy = np.asarray(table[:, :2], np.float64)
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a readable HDF5 file of numbers ({error})") from error
    finite = np.isfinite(xy).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise UserError(f"{path}: nucleus {row + 1} is at x, y = {xy[row, 0]:g}, {xy[row, 1]:g}, expected numbers")
    return xy
