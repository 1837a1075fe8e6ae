"""Centroids and classes from instance maps, in which every nucleus has its own number."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError


def instance_centroids(instances: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ascending numbers ``[n]`` and centroids ``[n, 2]`` (x, y) of the instances of a map ``[H, W]``; 0 is background.

    Pixel centres are at half pixels: an instance that is only the first pixel is at 0.5, 0.5.
    """
    rows, columns = np.nonzero(instances)
    numbers, index = np.unique(instances[rows, columns], return_inverse=True)
    sums = [np.bincount(index, axis, len(numbers)) for axis in (columns, rows)]
    return numbers.astype(np.int64), np.stack(sums, axis=1) / np.bincount(index, minlength=len(numbers))[:, None] + 0.5


def instance_types(
    instances: NDArray[np.integer], types: NDArray[np.integer], numbers: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The most common type ``[n]`` in each instance, from a map of types ``[H, W]``; 0 if all its pixels are 0."""
    inside = instances > 0
    index = np.searchsorted(numbers, instances[inside])
    width = int(types.max(initial=0)) + 1
    votes = np.bincount(index * width + types[inside], minlength=len(numbers) * width).reshape(-1, width)
    votes[:, 0] = 0  # background cut into the instance
    return votes.argmax(axis=1)


def integer_map(values: NDArray[Any], shape: tuple[int, ...], highest: int, where: str) -> NDArray[np.int64]:
    """``values`` as integers from 0 to ``highest``; public datasets store them as floats.

    Raises:
        UserError: another shape, or a value that is not such an integer; the message begins with ``where``.
    """
    if values.shape != shape:
        raise UserError(f"{where} has the shape {list(values.shape)}, expected {list(shape)}")
    if (
        values.dtype.kind not in "fiub"
        or not ((values >= 0) & (values <= highest) & (values == np.floor(values))).all()
    ):
        raise UserError(f"{where} contains {_extremes(values)}, expected whole numbers from 0 to {highest}")
    return values.astype(np.int64)


def _extremes(values: NDArray[Any]) -> str:
    if values.dtype.kind not in "fiub" or values.size == 0:
        return str(values.dtype)
    return f"{values.dtype} from {values.min():g} to {values.max():g}"


def read_mat(path: Path, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
    """The arrays of a MATLAB file by name. No code in the file is run.

    Raises:
        UserError: damaged, not a MATLAB file, or an array is missing; names the file.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, variable_names=[*needed, *optional])
    except NotImplementedError as error:
        raise UserError(f"{path}: MATLAB 7.3, expected version 7 or older; save it with '-v7'") from error
    except (MatReadError, OSError, EOFError, ValueError, TypeError, IndexError, zlib.error, struct.error) as error:
        raise UserError(f"{path}: not a readable MATLAB file ({error})") from error
    if missing := [name for name in needed if name not in content]:
        raise UserError(f"{path}: {', '.join(missing)} missing, expected {', '.join(needed)}")
    return {name: content[name] for name in (*needed, *optional) if name in content}
