"""Every nucleus exactly once where tiles meet.

A nucleus belongs to the tile whose core contains it. But two tiles may place the same nucleus slightly differently, on
opposite sides of the seam, and then both would claim it or neither. So every tile also reports the points that it finds
within ``radius`` outside its core, as witnesses. Among points of different tiles within ``radius`` of each other one is
kept: one in the core of its tile rather than a witness, then the one with the higher score. A witness that is kept
counts only if a second one confirms it: then each of two tiles has placed the nucleus in the other's core.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Found:
    """Points found in tiles."""

    xy: NDArray[np.float64]  # [n, 2] pixels of the page
    label: NDArray[np.int64]  # [n]
    score: NDArray[np.float64]  # [n]
    tile: NDArray[np.int64]  # [n] number of the tile
    owned: NDArray[np.bool_]  # [n] whether it lies in the core of its tile
    row: NDArray[np.int64]  # [n] of the point among all that were found in the tile

    def __len__(self) -> int:
        return len(self.xy)

    def take(self, which: NDArray[Any]) -> Found:
        return Found(*(getattr(self, field.name)[which] for field in fields(self)))

    @staticmethod
    def concatenate(parts: list[Found]) -> Found:
        return Found(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Found)))

    @staticmethod
    def empty() -> Found:
        none = np.zeros(0, np.int64)
        return Found(np.zeros((0, 2)), none, np.zeros(0), none, np.zeros(0, bool), none)


class Seams:
    """Resolves the points of a page, one row of tiles after the other; keeps only those that the next row can change.

    Args:
        radius: pixels within which two points of different tiles are one nucleus.
    """

    def __init__(self, radius: float) -> None:
        self._radius = radius
        self._open = Found.empty()

    def settle(self, row: list[Found], bottom: float) -> Found:
        """Add a row of tiles; returns the points that later rows cannot change.

        Args:
            row: the points of each tile of the row.
            bottom: y at which the cores of the next row begin; infinite for the last row.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        found = Found.concatenate([self._open, *row])
        pairs = self._pairs(found)
        # These may still pair with points of the next row, and that affects their present pairs.
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
    """Which points are kept: from the highest rank down, each removes the points paired with it."""
    rank = np.empty(len(found), np.int64)
    rank[np.lexsort((found.tile, -found.score, ~found.owned))] = np.arange(len(found))
    pairs = np.where((rank[pairs[:, 0]] < rank[pairs[:, 1]])[:, None], pairs, pairs[:, ::-1])
    kept, confirmed = np.ones(len(found), bool), found.owned.copy()
    for stronger, weaker in pairs[np.argsort(rank[pairs[:, 0]], kind="stable")].tolist():
        if kept[stronger]:
            confirmed[stronger] |= kept[weaker] and not found.owned[weaker]
            kept[weaker] = False
    return kept & confirmed
