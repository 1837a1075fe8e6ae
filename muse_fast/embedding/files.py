"""The file of a slide's nuclei and vectors, in anndata's layout, written block by block.

anndata itself writes the file of a slide without nuclei, which has all columns and categories; its arrays then grow by
blocks, so that one block is in memory at a time.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from muse_fast.embedding.nuclei import Nuclei
from muse_fast.embedding.parts import Rows
from muse_fast.errors import UserError
from muse_fast.exploring.vectors import RECORD
from muse_fast.runtime import atomic

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

FORMATS = ("h5ad", "zarr")
DTYPES = ("float16", "float32")
_GROWING = ("X", "obsm/spatial", "obs/_index", *(f"obs/{name}" for name in ("score", "x_um", "y_um")))
_CODES = ("obs/class/codes", "obs/slide/codes")
_BLOCK = 16_384  # nuclei in memory
_CHUNK_BYTES = 1 << 20
_ZARR_FORMAT = 2  # anndata 0.11 and 0.12 read it


class Described(NamedTuple):
    """The nuclei of a slide and their vectors, to be written."""

    slide: str
    nuclei: Nuclei
    rows: Rows
    mpp: float  # um per level-0 pixel
    record: Mapping[str, Any]  # ``uns["muse_fast"]``: text, numbers and lists of numbers


class Written(NamedTuple):
    """What was written."""

    nuclei: int
    per_class: dict[str, int]
    lost: int  # nuclei left out, as they could not be read
    dim: int  # D


def need_libraries(format: str = "h5ad") -> None:
    """Check that the packages that files need are installed.

    Raises:
        UserError: one is not.
    """
    try:
        import anndata  # noqa: F401
        import pyarrow.parquet  # noqa: F401

        if format == "zarr":
            from zarr import Group

            if not hasattr(Group, "create_array"):
                raise UserError("format=zarr needs zarr 3, for Python 3.11 or later; use format=h5ad")
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'muse_fast[embed]'") from None


def write(folder: Path, stem: str, described: Described, dtype: str, format: str) -> Written:
    """Write ``STEM.h5ad`` (or ``.zarr``) and ``STEM.parquet`` to a folder, on disk once this returns.

    Nuclei whose vector is NaN are left out; the others keep the number that they have among all.

    Args:
        dtype: of the vectors.

    Raises:
        UserError: a vector has values beyond the range of float16.
        OSError: the disk is full, for example.
    """
    path, table = folder / f"{stem}.{format}", folder / f"{stem}.parquet"
    _remove(path)
    try:
        written = _write(path, table, described, np.dtype(dtype))
    except RuntimeError as error:  # of HDF5, when it closes a file on a full disk
        raise OSError(f"{path}: {' '.join(str(error).split())}") from error
    for file in (table, *(path.rglob("*") if path.is_dir() else [path])):
        atomic.fsync(file)
    return written


def in_memory(described: Described, dtype: str) -> AnnData:
    """The same content as an AnnData."""
    import anndata
    import pandas

    empty = _empty(described, np.dtype(dtype))
    blocks = [(empty.obs, empty.obsm["spatial"], empty.X), *_blocks(described, np.dtype(dtype))]
    frames, places, vectors = zip(*blocks, strict=True)
    obs = pandas.concat(frames[1:] or frames)
    return anndata.AnnData(np.concatenate(vectors), obs, obsm={"spatial": np.concatenate(places)}, uns=dict(empty.uns))


def _write(path: Path, table: Path, described: Described, dtype: np.dtype[Any]) -> Written:
    import pyarrow
    from pyarrow import parquet

    empty = _empty(described, dtype)
    schema = pyarrow.Schema.from_pandas(empty.obs)
    index = len(schema) - 1  # of no rows, whose type is unknown
    schema = schema.set(index, schema.field(index).with_type(pyarrow.string()))
    names = described.nuclei.class_names
    count, per_class = 0, np.zeros(len(names), np.int64)
    with ExitStack() as stack:
        group = _open(path, empty, stack)
        arrays = {name: _grown(group, name, described.rows.count) for name in (*_GROWING, *_CODES)}
        rows = stack.enter_context(parquet.ParquetWriter(table, schema))
        for obs, xy, vectors in _blocks(described, dtype):
            columns = {"X": vectors, "obsm/spatial": xy, "obs/_index": obs.index.to_numpy(object)}
            columns |= {f"obs/{name}": obs[name].to_numpy() for name in ("score", "x_um", "y_um")}
            columns |= {f"obs/{name}/codes": obs[name].cat.codes.to_numpy() for name in ("class", "slide")}
            for name, values in columns.items():
                arrays[name].resize((count + len(obs), *values.shape[1:]))
                arrays[name][count:] = values
            rows.write_table(pyarrow.Table.from_pandas(obs, schema))
            count += len(obs)
            per_class += obs["class"].value_counts(sort=False).to_numpy()
    if path.is_dir():
        import zarr

        zarr.consolidate_metadata(str(path))
    lost = described.rows.count - count
    return Written(count, dict(zip(names, per_class.tolist(), strict=True)), lost, described.rows.dim)


def _blocks(
    described: Described, dtype: np.dtype[Any]
) -> Iterator[tuple[DataFrame, NDArray[np.float64], NDArray[Any]]]:
    """Yield ``obs``, level-0 positions and vectors of blocks of nuclei, without those whose vector is NaN."""
    for block, vectors in described.rows.blocks(_BLOCK):
        kept = ~np.isnan(vectors[:, 0]) if vectors.shape[1] else np.ones(len(vectors), bool)
        number = np.arange(block.start, block.stop)[kept]
        with np.errstate(over="ignore"):
            values = vectors[kept].astype(dtype)
        if not np.isfinite(values).all():
            largest = np.abs(vectors[kept]).max()
            raise UserError(f"{described.slide}: vectors reach {largest:g}, beyond float16; give dtype=float32")
        yield _obs(described, number), described.nuclei.xy[number], values


def _obs(described: Described, number: NDArray[np.int64]) -> DataFrame:
    """The rows of ``obs`` of some nuclei."""
    import pandas

    nuclei, slide = described.nuclei, described.slide
    um = nuclei.xy[number] * described.mpp
    return pandas.DataFrame(
        {
            "class": pandas.Categorical.from_codes(nuclei.label[number], list(nuclei.class_names)),
            "score": nuclei.score[number],
            "x_um": um[:, 0],
            "y_um": um[:, 1],
            "slide": pandas.Categorical.from_codes(np.zeros(len(number), np.int8), [slide]),
        },
        pandas.Index([f"{slide}:{n}" for n in number.tolist()], dtype=object),
    )


def _empty(described: Described, dtype: np.dtype[Any]) -> AnnData:
    """The slide without its nuclei."""
    import anndata

    record = {key: np.array(value) if isinstance(value, list) else value for key, value in described.record.items()}
    return anndata.AnnData(
        np.zeros((0, described.rows.dim), dtype),
        _obs(described, np.zeros(0, np.int64)),
        obsm={"spatial": np.zeros((0, 2))},
        uns={RECORD: record},
    )


def _open(path: Path, empty: AnnData, stack: ExitStack) -> Any:
    """Write ``empty`` and open it to be changed, as a group of h5py or zarr."""
    import anndata

    if path.suffix == ".zarr":
        import zarr

        with anndata.settings.override(zarr_write_format=_ZARR_FORMAT), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the format's default will change
            empty.write_zarr(path)
        return zarr.open_group(str(path), mode="r+")
    import h5py

    empty.write_h5ad(path)
    return stack.enter_context(h5py.File(path, "r+"))


def _grown(group: Any, name: str, count: int) -> Any:
    """Replace an array of no rows by one that can grow to ``count``, and return it."""
    old = group[name]
    attributes, shape, dtype = dict(old.attrs), old.shape, old.dtype
    size = np.prod(shape[1:], dtype=int) * max(dtype.itemsize, 1)
    chunks = (int(min(max(1, _CHUNK_BYTES // max(size, 1)), max(count, 1))), *(max(side, 1) for side in shape[1:]))
    parent, _, key = name.rpartition("/")
    within = group[parent] if parent else group
    del within[key]
    if hasattr(within, "create_array"):  # zarr, whose texts have a type of their own
        texts = dtype.kind in "OT"
        return within.create_array(
            key, shape=shape, chunks=chunks, dtype=str if texts else dtype, attributes=attributes
        )
    made = within.create_dataset(key, shape, dtype, chunks=chunks, maxshape=(None, *shape[1:]))
    made.attrs.update(attributes)
    return made


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
