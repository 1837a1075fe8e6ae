"""``.npy`` mappings are read without unpickling, whichever version of numpy and pickle wrote them."""

from __future__ import annotations

import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy

from muse_fast.errors import UserError
from muse_fast.sources.plain_npy import map_npy, read_npy_mapping


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
