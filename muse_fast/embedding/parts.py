"""Finished parts of a slide's vectors, from which an interrupted command continues."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from muse_fast.embedding.nuclei import Nuclei
from muse_fast.predicting.inputs import read_record
from muse_fast.runtime import atomic

_MADE_WITH, _NUCLEI = "made_with.json", "nuclei.npz"


class Parts:
    """A folder with the nuclei of a slide and their vectors, in parts that are whole or absent.

    Args:
        folder: what it contains is kept only if it was made with the same ``made_with``.
        made_with: all that the vectors depend on, for JSON.
    """

    def __init__(self, folder: Path, made_with: Mapping[str, Any]) -> None:
        self.folder = folder
        known = json.loads(json.dumps(made_with))
        if folder.is_dir() and read_record(folder / _MADE_WITH) != known:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(folder / _MADE_WITH, known)

    def nuclei(self) -> Nuclei | None:
        """The nuclei, once they are known."""
        path = self.folder / _NUCLEI
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            return Nuclei(file["xy"], file["label"], file["score"], tuple(file["class_names"].tolist()))

    def keep_nuclei(self, nuclei: Nuclei) -> None:
        names = np.array(nuclei.class_names, np.str_)
        arrays: dict[str, Any] = {"xy": nuclei.xy, "label": nuclei.label, "score": nuclei.score, "class_names": names}
        _write(self.folder / _NUCLEI, lambda file: np.savez(file, **arrays))

    def has(self, number: int) -> bool:
        return self._path(number).is_file()

    def keep(self, number: int, rows: NDArray[np.float32], extra: Mapping[str, Any] | None = None) -> None:
        """Keep the vectors ``[n, D]`` of a part, and what belongs to them."""
        if extra is not None:
            _write(self._path(number).with_suffix(".npz"), lambda file: np.savez(file, **extra))
        _write(self._path(number), lambda file: np.save(file, rows))

    def extra(self, number: int) -> dict[str, NDArray[Any]]:
        """What belongs to the vectors of a part."""
        with np.load(self._path(number).with_suffix(".npz"), allow_pickle=False) as file:
            return dict(file)

    def read(self, number: int) -> NDArray[np.float32]:
        """The vectors ``[n, D]`` of a part, mapped from its file."""
        rows: NDArray[np.float32] = np.load(self._path(number), mmap_mode="r", allow_pickle=False)
        return rows

    def lost(self) -> int:
        """Number of nuclei in the parts kept so far that could not be read."""
        return sum(int(np.isnan(self.read(int(path.stem))[:, 0]).sum()) for path in self.folder.glob("*.npy"))

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *raised: object) -> None:
        """Leave no folder without anything from which a later command could continue."""
        if self.folder.is_dir() and [path.name for path in self.folder.iterdir()] == [_MADE_WITH]:
            self.remove()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.npy"


class Rows:
    """The vectors of all nuclei of a slide, in their order.

    Args:
        parts: read through this.
        part: ``[n]`` the part with the vector of each nucleus.
        place: ``[n]`` its row there.
        dim: D.
    """

    def __init__(self, parts: Parts, part: NDArray[np.int32], place: NDArray[np.int64], dim: int) -> None:
        self._parts, self._part, self._place, self.dim = parts, part, place, dim
        self.count = len(part)

    def blocks(self, size: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Blocks of at most ``size`` nuclei, with their vectors; rows of NaN are nuclei that could not be read."""
        for start in range(0, self.count, size):
            block = slice(start, min(start + size, self.count))
            rows = np.empty((block.stop - start, self.dim), np.float32)
            part, place = self._part[block], self._place[block]
            for number in np.unique(part).tolist():
                here = part == number
                rows[here] = self._parts.read(number)[place[here]]
            yield block, rows


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file that is whole or absent, also after a power failure.

    Raises:
        OSError: the disk is full, for example. numpy, which writes past Python, would not say why.
    """
    content = io.BytesIO()
    write(content)
    with atomic.replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())
        atomic.fsync(temporary)
