"""``.npy`` mappings are read without unpickling, whichever version of numpy and pickle wrote them.

Centroids and classes from instance maps, against scipy and closed forms.
"""

from __future__ import annotations

import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy
from scipy import ndimage

from muse_fast.errors import UserError
from muse_fast.sources.arrays import instance_centroids, instance_types, integer_map, map_npy, read_npy_mapping


def save(path: Path, content: Any, protocol: int) -> None:
    """Like ``np.save``, with a given pickle protocol."""
    array = np.array(content, dtype=object)
    with open(path, "wb") as file:
        npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array))
        pickle.dump(array, file, protocol=protocol)


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("dtype", ["<i4", ">i2", "u1", "<f8", "<i8", "?"])
def test_arrays_come_back(tmp_path: Path, protocol: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    maps = {
        "inst_map": rng.integers(0, 2, (7, 5)).astype(dtype),
        "type_map": np.asfortranarray(rng.integers(0, 2, (7, 5)).astype(dtype)),
        "more": np.zeros((0, 3), dtype),
    }
    save(tmp_path / "a.npy", maps, protocol)
    found = read_npy_mapping(tmp_path / "a.npy", tuple(maps))
    for name, array in maps.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_numpy_agrees(tmp_path: Path) -> None:
    """A file from ``np.save`` itself, with the same array under two names."""
    array = np.arange(300_000, dtype=np.int32).reshape(500, 600)
    np.save(tmp_path / "a.npy", {"a": array, "b": array, "text": "more"})  # type: ignore[arg-type]
    found = read_npy_mapping(tmp_path / "a.npy", ("a", "b"))
    np.testing.assert_array_equal(found["a"], array)
    np.testing.assert_array_equal(found["b"], array)


def test_damaged_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    """Change every byte of a file in turn: the result is always a mapping of arrays or a UserError."""
    path = tmp_path / "a.npy"
    np.save(path, {"a": np.arange(3, dtype=np.uint8)})  # type: ignore[arg-type]
    data = path.read_bytes()
    start = data.index(b"\n") + 1
    for place in range(start, len(data)):
        for value in (0, 0x52, 0xFF):
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            with suppress(UserError):
                assert read_npy_mapping(path, ("a",))["a"].dtype.kind in "biuf"
        path.write_bytes(data[:place])
        with pytest.raises(UserError):
            read_npy_mapping(path, ("a",))


def test_mapped_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(12.0))
    assert isinstance(map_npy(path), np.memmap)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"a.npy: not a readable array of numbers"):
        map_npy(path)
    np.save(path, np.array([{}]))
    with pytest.raises(UserError, match=r"a.npy: not a readable array of numbers \(.*[Oo]bject"):
        map_npy(path)
    with pytest.raises(UserError, match=r"b.npy: not a readable"):
        map_npy(tmp_path / "b.npy")


# ----------------------------------------------------------------------------------------------------- instance maps


def test_against_scipy() -> None:
    rng = np.random.default_rng(0)
    instances = rng.integers(0, 40, (37, 53)) * 7  # ids with gaps, instances in pieces
    numbers, xy = instance_centroids(instances)
    np.testing.assert_array_equal(numbers, np.unique(instances)[1:])
    expected = ndimage.center_of_mass(np.ones_like(instances), instances, numbers)
    np.testing.assert_allclose(xy, np.array(expected)[:, ::-1] + 0.5, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_one_pixel_one_row_and_empty(dtype: type) -> None:
    instances = np.zeros((3, 5), dtype)
    assert [part.shape for part in instance_centroids(instances)] == [(0,), (0, 2)]
    instances[0, 0], instances[2, 1:5] = 9, 200
    numbers, xy = instance_centroids(instances)
    assert numbers.tolist() == [9, 200]
    assert xy.tolist() == [[0.5, 0.5], [3.0, 2.5]]


def test_types_by_majority() -> None:
    instances = np.array([[5, 5, 5, 0], [5, 8, 8, 8], [0, 8, 9, 9]])
    types = np.array([[2, 2, 1, 4], [1, 3, 0, 0], [4, 0, 0, 0]])
    numbers, _ = instance_centroids(instances)
    # 5: a tie of 1 and 2; 8: background except for one pixel; 9: only background; type 4 is outside all instances.
    assert instance_types(instances, types, numbers).tolist() == [1, 3, 0]
    empty = np.zeros((2, 2), int)
    assert instance_types(empty, empty, np.zeros(0, np.int64)).tolist() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 3)), r"here has the shape \[2, 3\], expected \[2, 2\]"),
        (np.full((2, 2), 0.5), r"here contains float64 from 0.5 to 0.5, expected whole numbers from 0 to 9"),
        (np.full((2, 2), 10), r"here contains int64 from 10 to 10"),
        (np.full((2, 2), -1), r"here contains int64 from -1"),
        (np.full((2, 2), np.inf), r"here contains float64 from inf"),
        (np.full((2, 2), "a"), r"here contains <U1"),
    ],
)
def test_invalid_maps_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        integer_map(values, (2, 2), 9, "here")


def test_maps_stored_as_floats() -> None:
    found = integer_map(np.array([[0.0, 9.0]]), (1, 2), 9, "here")
    assert found.dtype == np.int64
    assert found.tolist() == [[0, 9]]
