"""Reading the files of `embed` by blocks of rows, so that memory does not depend on the number of nuclei."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError
from muse_fast.runtime.folders import find_files
from muse_fast.runtime.names import text_of

SUFFIX = ".h5ad"
RECORD = "muse_fast"  # in uns: how the vectors were made
_NEEDED = ("weights", "weights_sha256", "protocol", "mpp", "slide_path", "slide_mpp")  # in the record
_SAME_MPP = 0.05  # relative difference: slides of one command may differ by 4 %, as near levels are used as they are
_BLOCK_BYTES = 32 << 20  # of a block in float64
_POSITIONS = 1 << 18  # positions, or classes, read at a time


class Block(NamedTuple):
    """Consecutive rows of a file."""

    first: int  # row of the file
    vectors: NDArray[np.floating]  # [b, D] as stored
    xy: NDArray[np.float64]  # [b, 2] level-0 pixels


class Nucleus(NamedTuple):
    """What a file says about a nucleus beside its vector."""

    name: str
    kind: str  # its class; "" if it has none
    score: float
    x: float  # level-0 pixels
    y: float


@dataclass(frozen=True, slots=True)
class VectorFile:
    """The nuclei of a slide in a ``.h5ad``; `open_vectors` returns it.

    Attributes:
        slide: its name.
        count: number of nuclei.
        dim: width D of a vector.
        classes: number of nuclei of each class.
        record: how the vectors were made, from ``uns``.
    """

    path: Path
    slide: str
    count: int
    dim: int
    classes: Mapping[str, int]
    record: Mapping[str, Any]

    @property
    def slide_mpp(self) -> float:
        """um per level-0 pixel."""
        return float(np.mean(self.record["slide_mpp"]))

    def blocks(self, rows: int | None = None) -> Iterator[Block]:
        """All nuclei, ``rows`` at a time; None: as many as take 32 MiB in float64.

        Raises:
            UserError: a vector is not finite, or the file is damaged; names the file.
        """
        step = rows or max(1, _BLOCK_BYTES // (8 * self.dim))
        with _reading(self.path) as file:
            for first in range(0, self.count, step):
                vectors = file["X"][first : first + step]
                finite = np.isfinite(vectors).all(axis=1)
                if not finite.all():
                    row = first + int(finite.argmin())
                    raise UserError(f"{self.path}: the vector in row {row} is not finite; embed the slide again")
                yield Block(first, vectors, file["obsm/spatial"][first : first + step])

    def vector(self, row: int) -> NDArray[np.float64]:
        """The vector ``[D]`` of a nucleus."""
        with _reading(self.path) as file:
            return file["X"][row].astype(np.float64)

    def positions(self) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """All positions, in blocks: the first row and ``[b, 2]`` level-0 pixels."""
        with _reading(self.path) as file:
            for first in range(0, self.count, _POSITIONS):
                yield first, file["obsm/spatial"][first : first + _POSITIONS]

    def nuclei(self, rows: Sequence[int]) -> list[Nucleus]:
        """What the file says about some nuclei."""
        with _reading(self.path) as file:
            obs = file["obs"]
            names, codes, score, xy = obs[obs.attrs["_index"]], obs["class/codes"], obs["score"], file["obsm/spatial"]
            labels = [*_texts(obs["class/categories"]), ""]  # code -1: no class
            return [
                Nucleus(_text(names[row]), labels[int(codes[row])], float(score[row]), *map(float, xy[row]))
                for row in rows
            ]


def find_vectors(paths: Sequence[Path]) -> list[Path]:
    """The ``.h5ad`` files among ``paths`` and in the folders among them.

    Raises:
        UserError: a path does not exist, is another kind of file, or is a folder without such files.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_file() and path.suffix != SUFFIX:
            raise UserError(f"{path}: expected a {SUFFIX} file of embed, or a folder with such files")
        files = [path] if path.is_file() else find_files(path, f"**/*{SUFFIX}")
        if not files:
            raise UserError(f"{path}: " + (f"contains no {SUFFIX}" if path.is_dir() else "no such file or folder"))
        found |= {file.resolve(): file for file in files}
    return list(found.values())


def open_vectors(paths: Sequence[Path]) -> list[VectorFile]:
    """The files of one encoder, sorted by the names of their slides, whatever the order of ``paths``.

    Raises:
        UserError: no files, a file was not written by ``embed`` or is damaged, two have the same slide, or they cannot
            be compared: their vectors have other weights, um/px or another protocol. Names the files.
    """
    files = sorted((_open(path) for path in paths), key=lambda file: file.slide)
    if not files:
        raise UserError(f"no {SUFFIX} files")
    for before, file in pairwise(files):
        if before.slide == file.slide:
            raise UserError(f"{before.path} and {file.path} are both of the slide {text_of(file.slide)}; give one")
        if difference := _difference(before, file):
            raise UserError(
                f"{before.path} and {file.path} cannot be compared: {difference}; give files of one encoder and its "
                "settings"
            )
    return files


def _difference(one: VectorFile, other: VectorFile) -> str:
    """Why the vectors of two files cannot be compared; "" if they can."""
    (name, sha256), (other_name, other_sha256) = _weights(one), _weights(other)
    if (sha256 or name) != (other_sha256 or other_name):  # random weights have no hash
        return f"their weights are {name} and {other_name}, sha256 {sha256 or 'none'} and {other_sha256 or 'none'}"
    if one.record["protocol"] != other.record["protocol"]:
        return f"their protocols are {one.record['protocol']} and {other.record['protocol']}"
    ours, theirs = float(one.record["mpp"]), float(other.record["mpp"])
    if abs(ours - theirs) > _SAME_MPP * min(ours, theirs):
        return f"their encoder saw {ours:g} and {theirs:g} um/px"
    return f"their vectors have {one.dim} and {other.dim} numbers" if one.dim != other.dim else ""


def _weights(file: VectorFile) -> tuple[str, str]:
    """Name and SHA-256 of the weights."""
    return file.record["weights"], file.record["weights_sha256"]


def _open(path: Path) -> VectorFile:
    with _reading(path) as file:
        if RECORD not in file.get("uns", {}):
            raise UserError(f"{path}: not a file of muse_fast.embed, uns has no {RECORD!r}")
        record = {key: _value(value[()]) for key, value in file["uns"][RECORD].items()}
        if lacking := [key for key in _NEEDED if key not in record]:
            raise UserError(f"{path}: uns[{RECORD!r}] has no {', '.join(lacking)}; embed the slide again")
        vectors, obs = file["X"], file["obs"]
        if not isinstance(vectors, h5py.Dataset) or vectors.ndim != 2:
            raise UserError(f"{path}: X is not a dense matrix; expected the file as embed wrote it")
        slides = _texts(obs["slide"]["categories"])
        if len(slides) > 1:
            raise UserError(f"{path}: has nuclei of {len(slides)} slides; expected one, as embed wrote it")
        slide = slides[0] if slides else path.stem
        count, dim = vectors.shape
        return VectorFile(path, slide, count, dim, _count(obs["class"]), record)


def _count(kinds: h5py.Group) -> dict[str, int]:
    """Number of nuclei of each class of a categorical column; those without a class are not counted."""
    codes, names = kinds["codes"], _texts(kinds["categories"])
    counts = np.zeros(len(names), np.int64)
    for first in range(0, len(codes), _POSITIONS):
        block = codes[first : first + _POSITIONS]
        counts += np.bincount(block[block >= 0], minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))


@contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    """Open a file; what h5py cannot find or read is a `UserError`."""
    try:
        with h5py.File(path) as file:
            yield file
    except UserError:
        raise
    except (OSError, KeyError, ValueError) as error:  # ValueError: a part of the file is of another kind
        raise UserError(f"{path}: not a file of muse_fast.embed, or damaged ({error})") from error


def _texts(data: h5py.Dataset) -> list[str]:
    return [_text(value) for value in data[()]]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
