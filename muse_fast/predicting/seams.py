"""One nucleus for one nucleus where tiles meet.

A nucleus belongs to the tile whose core holds it. Two tiles may place the same nucleus a little apart, though, on
different sides of the seam, and then both would claim it or neither. So every tile also gives what it sees within
``radius`` beyond its core, as witness. Of points of different tiles within ``radius`` of each other one is kept: one
that lies in its tile's core before a witness, then the one with the higher score. A witness that is kept counts where
a second one confirms it, for then each of two tiles has placed a nucleus in the other's core.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Found:
    """Points that tiles have found."""

    xy: NDArray[np.float64]  # [n, 2] pixels of the page
    label: NDArray[np.int64]  # [n]
    score: NDArray[np.float64]  # [n]
    tile: NDArray[np.int64]  # [n] number of the tile
    owned: NDArray[np.bool_]  # [n] whether it lies in the core of its tile

    def __len__(self) -> int:
        return len(self.xy)

    def take(self, which: NDArray[Any]) -> Found:
        return Found(*(getattr(self, field.name)[which] for field in fields(self)))

    @staticmethod
    def concatenate(parts: list[Found]) -> Found:
        return Found(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Found)))

    @staticmethod
    def nothing() -> Found:
        return Found(np.zeros((0, 2)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, bool))


class Seams:
    """Settles the points of a page row by row of tiles; holds no more than a row and what touches the next.

    Args:
        radius: pixels within which two points of different tiles are one nucleus.
    """

    def __init__(self, radius: float) -> None:
        self._radius = radius
        self._open = Found.nothing()

    def settle(self, row: list[Found], bottom: float) -> Found:
        """Add a row of tiles; returns the points that later rows cannot change.

        Args:
            row: the points of each tile of the row.
            bottom: y from which on the cores of later rows begin; infinite for the last row.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        found = Found.concatenate([self._open, *row])
        pairs = self._pairs(found)
        # A point may yet meet one of the next row, and what it meets now depends on how that ends.
        undecided = found.xy[:, 1] >= bottom - 2 * self._radius
        links = coo_array((np.ones(len(pairs), bool), pairs.T), shape=(len(found), len(found)))
        group = connected_components(links, directed=False)[1]
        waits = np.isin(group, group[undecided])
        self._open = found.take(waits)
        return found.take(_kept(found, pairs) & ~waits)

    def _pairs(self, found: Found) -> NDArray[np.int64]:
        """``[k, 2]`` rows of points of different tiles within the radius."""
        from scipy.spatial import KDTree

        if not len(found) or not self._radius:
            return np.zeros((0, 2), np.int64)
        pairs = KDTree(found.xy).query_pairs(self._radius, output_type="ndarray").astype(np.int64)
        return pairs[found.tile[pairs[:, 0]] != found.tile[pairs[:, 1]]]


def _kept(found: Found, pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which points stay: from the highest rank down, each removes its partners."""
    rank = np.empty(len(found), np.int64)
    rank[np.lexsort((found.tile, -found.score, ~found.owned))] = np.arange(len(found))
    pairs = np.where((rank[pairs[:, 0]] < rank[pairs[:, 1]])[:, None], pairs, pairs[:, ::-1])
    kept, confirmed = np.ones(len(found), bool), found.owned.copy()
    for stronger, weaker in pairs[np.argsort(rank[pairs[:, 0]], kind="stable")].tolist():
        if kept[stronger]:
            confirmed[stronger] |= kept[weaker] and not found.owned[weaker]
            kept[weaker] = False
    return kept & confirmed
