"""A column of ``obs``, such as clusters, back to QuPath as GeoJSON, one file per slide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor

from muse_fast.embedding.files import need_libraries
from muse_fast.errors import UserError, did_you_mean
from muse_fast.exploring.vectors import RECORD
from muse_fast.predicting.files import QuPathFile, colour, open_text
from muse_fast.predicting.inputs import read_record
from muse_fast.runtime.atomic import replacing
from muse_fast.runtime.names import text_of

if TYPE_CHECKING:
    from pandas import DataFrame, Series


def to_geojson(path: Path, column: str, out: Path) -> list[Path]:
    """Write ``SLIDE.COLUMN.geojson`` to ``out`` for every slide of a file.

    Texts, categories, booleans and whole numbers become classes, with scanpy's colours if the file has them; other
    numbers become a measurement. The nuclei have the ids of `muse_fast.predict`'s files if they come from there.

    Args:
        path: an ``.h5ad`` or ``.zarr`` of ``embed``, or one into which several were joined. The vectors are not read.

    Raises:
        UserError: it is another file, has no such column, or it is not known from where QuPath counts.
    """
    need_libraries()
    obs, xy, uns = _read(path)
    for needed in (column, "slide"):
        if needed not in obs:
            raise UserError(f"{path}: no column {needed!r} in obs{did_you_mean(needed, obs)}; it has {', '.join(obs)}")
    label, value, classes = _as_classes(obs[column], uns.get(f"{column}_colors", ()))
    numbers = [_number(name) for name in obs.index]
    written = []
    for slide in obs["slide"].unique():
        here = np.flatnonzero(obs["slide"].to_numpy() == slide)
        origin = _origin(path, slide, uns.get(RECORD, {}))
        target = out / f"{slide}.{column}.geojson"
        with replacing(target) as temporary, open_text(temporary) as file:
            geojson = QuPathFile(file, slide, origin, classes, column)
            geojson.write(xy[here], label[here], value[here], [numbers[row] for row in here.tolist()])
            geojson.finish()
        written.append(target)
    return written


def _read(path: Path) -> tuple[DataFrame, NDArray[np.float64], dict[str, Any]]:
    """``obs``, ``obsm["spatial"]`` and ``uns`` of a file."""
    import h5py
    from anndata.io import read_elem

    try:
        if path.suffix == ".zarr":
            import zarr

            group: Any = zarr.open_group(str(path), mode="r")
            return read_elem(group["obs"]), read_elem(group["obsm/spatial"]), read_elem(group["uns"])
        with h5py.File(path) as file:
            return read_elem(file["obs"]), read_elem(file["obsm/spatial"]), read_elem(file["uns"])
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: not a file of embed ({error}), expected .h5ad or .zarr with obsm['spatial']"
        ) from None


def _as_classes(
    column: Series[Any], colours: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.float64], list[tuple[str, Sequence[int]]]]:
    """Class ``[n]`` (-1: none) and measurement ``[n]`` (NaN: none) of each nucleus, and name and colour by class."""
    none = np.full(len(column), np.nan)
    if column.dtype.kind == "f":
        return np.full(len(column), -1), column.to_numpy(np.float64), []
    categories = column.astype("category").cat
    names = [str(name) for name in categories.categories]
    given = [ImageColor.getrgb(one)[:3] for one in colours]
    rgb = given if len(given) == len(names) else [colour(number) for number in range(len(names))]
    return categories.codes.to_numpy(np.int64), none, list(zip(names, rgb, strict=True))


def _number(name: str) -> str:
    """The number of a nucleus in its slide, from its name ``SLIDE:N``, or with what a join appended to it."""
    return name.rpartition(":")[2]


def _origin(path: Path, slide: str, record: dict[str, Any]) -> tuple[int, int]:
    """The level-0 pixel from which QuPath counts.

    Raises:
        UserError: it is not known.
    """
    if "qupath_origin" in record and text_of(Path(str(record["slide_path"])).stem) == slide:
        x, y = record["qupath_origin"]
        return int(x), int(y)
    summary = path.parent / f"{slide}.json"
    frame = read_record(summary).get("qupath_frame")
    if not frame:
        raise UserError(
            f"{path}: it is not known from where QuPath counts on {slide}, as files that are joined lose it; put this "
            f"file next to {summary.name} of embed"
        )
    return int(frame[0]), int(frame[1])
