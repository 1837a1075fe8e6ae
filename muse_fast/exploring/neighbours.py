"""Exact nearest neighbours of nuclei by cosine similarity, over files of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from muse_fast.exploring.vectors import Block, Nucleus, VectorFile


class Place(NamedTuple):
    """A nucleus: its file, as a position in the list of files, and its row there."""

    file: int
    row: int


class Neighbours(NamedTuple):
    """The nuclei most similar to a query, most similar first."""

    places: list[Place]
    similarity: NDArray[np.float64]  # [n], cosine


class _Query:
    """One query and the best nuclei so far."""

    def __init__(self, files: Sequence[VectorFile], place: Place, top: int, apart_um: float) -> None:
        file = files[place.file]
        self.place, self.top = place, top
        self.vector, (nucleus,) = file.vector(place.row), file.nuclei([place.row])
        self.xy = nucleus.x, nucleus.y
        self.apart = apart_um / file.slide_mpp  # level-0 pixels
        self.norm = _norms(self.vector[None])[0]
        self.similarity, self.found = np.empty(0), np.empty((0, 2), np.int64)

    def add(self, number: int, block: Block, vectors: NDArray[np.float64], norms: NDArray[np.float64]) -> None:
        """Compare with a block of file ``number``."""
        # Each row is summed on its own, so a similarity does not depend on the block, and equal vectors tie.
        dots, scale = np.einsum("nd,d->n", vectors, self.vector), norms * self.norm
        similarity = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
        rows = np.arange(block.first, block.first + len(vectors))
        allowed = np.ones(len(rows), bool)
        if number == self.place.file:
            allowed = (np.hypot(*(block.xy - self.xy).T) >= self.apart) & (rows != self.place.row)
        if len(self.similarity) == self.top:
            allowed &= similarity > self.similarity[-1]
        found = np.stack([np.full(allowed.sum(), number), rows[allowed]], axis=1)
        similarity = np.concatenate([self.similarity, similarity[allowed]])
        best = np.argsort(-similarity, kind="stable")[: self.top]  # stable: the earlier of equals stays first
        self.similarity, self.found = similarity[best], np.concatenate([self.found, found])[best]


def find_neighbours(
    files: Sequence[VectorFile], queries: Sequence[Place], top: int, *, apart_um: float = 0.0, rows: int | None = None
) -> list[Neighbours]:
    """The ``top`` nuclei with the highest cosine similarity to each query, or all if there are fewer.

    Similarities are computed in float64; 0 for a vector of zeros. Of equally similar nuclei, that of the earlier file
    and then of the earlier row comes first. The query itself is not among them.

    Args:
        apart_um: on the query's own slide, nuclei nearer than this do not count; infinite: only other slides count.
        rows: nuclei read at a time, see `VectorFile.blocks`.
    """
    running = [_Query(files, place, top, apart_um) for place in queries]
    for number, file in enumerate(files):
        for block in file.blocks(rows):
            vectors = block.vectors.astype(np.float64)
            norms = _norms(vectors)
            for query in running:
                query.add(number, block, vectors, norms)
    return [Neighbours([Place(*pair) for pair in query.found.tolist()], query.similarity) for query in running]


def _norms(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors))


def describe(files: Sequence[VectorFile], places: Sequence[Place]) -> list[Nucleus]:
    """What the files say about some nuclei; each file is opened once."""
    rows: dict[int, list[int]] = {}
    for place in places:
        rows.setdefault(place.file, []).append(place.row)
    read = {file: iter(files[file].nuclei(rows[file])) for file in rows}
    return [next(read[place.file]) for place in places]


def nearest_nucleus(file: VectorFile, x: float, y: float) -> tuple[int, float]:
    """Row of the nucleus nearest to a point in level-0 pixels, and its distance in pixels; -1 and infinity if none."""
    row, distance = -1, np.inf
    for first, xy in file.positions():
        distances = np.hypot(*(xy - (x, y)).T)
        nearest = int(distances.argmin())
        if distances[nearest] < distance:
            row, distance = first + nearest, float(distances[nearest])
    return row, distance
