"""Which proposal is matched with which annotated nucleus: a one-to-one assignment of least total cost.

The cost of a pair is P2PNet's (Song et al., 2021): ``distance_weight * distance - probability``, with the distance in
pixels between the predicted point and the nucleus, and the predicted probability of the nucleus' class. Of a nucleus of
unknown class it is the probability of not being background.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

NEIGHBOURS = 32

Assignment = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Rows of the proposals and of the nuclei, pair by pair, nuclei ascending."""

_FAR = 1e6  # pixels: replaces a coordinate that is not finite, which the loss reports


def match(
    points: NDArray[Any],
    probabilities: NDArray[Any],
    xy: NDArray[Any],
    label: NDArray[Any],
    *,
    distance_weight: float,
    neighbours: int = NEIGHBOURS,
) -> Assignment:
    """Match every nucleus with a proposal of its own; if proposals are fewer, match every proposal with a nucleus.

    Only the predicted points nearest to a nucleus are its candidates at first: a fortieth of the dense problem's time
    at 16,384 proposals and 1,500 nuclei. Prices of the proposals tell whether a point farther away could lower the
    total; if so, candidates double, and in the end the dense problem is solved. The total is always minimal.

    Args:
        points: ``[P, 2]`` predicted points.
        probabilities: ``[P, C + 1]``, background last.
        xy: ``[N, 2]`` nuclei.
        label: ``[N]`` int, the class, -1 where it is unknown.
        distance_weight: cost of a pixel, against probabilities.
        neighbours: candidates of a nucleus at first.
    """
    if not len(points) or not len(xy):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    points = np.nan_to_num(points.astype(np.float64), nan=_FAR, posinf=_FAR, neginf=-_FAR)
    probabilities = np.nan_to_num(probabilities.astype(np.float64), nan=0.0)
    # Column -1 of the classes is the background, so an unknown class must not index them.
    of_class = np.concatenate([probabilities[:, :-1], 1 - probabilities[:, -1:]], axis=1)
    column = np.where(label < 0, of_class.shape[1] - 1, label)
    xy = xy.astype(np.float64)
    while len(xy) <= len(points) and neighbours <= len(points) // 2:
        found, is_optimal = _sparse(points, of_class, xy, column, distance_weight, neighbours)
        if is_optimal:
            return found
        neighbours *= 2
    nucleus, proposal = linear_sum_assignment(distance_weight * cdist(xy, points) - of_class[:, column].T)
    return proposal.astype(np.int64), nucleus.astype(np.int64)


def _sparse(
    points: NDArray[Any],
    of_class: NDArray[Any],
    xy: NDArray[Any],
    column: NDArray[Any],
    distance_weight: float,
    neighbours: int,
) -> tuple[Assignment, bool]:
    """The best assignment among candidates, and whether there is no better one at all."""
    distance, proposal = cKDTree(points).query(xy, k=range(1, neighbours + 1))  # both [N, neighbours]
    cost = distance_weight * distance - of_class[proposal, column[:, None]]
    # Shifted to 1 and more, for an entry of 0 would be no candidate. Every nucleus pays the shift once.
    start = np.arange(0, cost.size + 1, neighbours)
    candidates = csr_array((cost.ravel() + 2, proposal.ravel(), start), shape=(len(xy), len(points)))
    try:
        _, chosen = min_weight_full_bipartite_matching(candidates)  # rows come in their order
    except ValueError:  # scipy's "no full matching exists"
        return (np.zeros(0, np.int64), np.zeros(0, np.int64)), False
    found = chosen.astype(np.int64), np.arange(len(xy))
    beyond = distance_weight * distance[:, -1] - of_class.max(axis=0)[column]  # least cost of what is no candidate
    paid = cost[proposal == chosen[:, None]]
    return found, bool((paid - _prices(cost, proposal, chosen, paid)[chosen] <= beyond + 1e-12).all())


def _prices(
    cost: NDArray[Any], proposal: NDArray[Any], chosen: NDArray[Any], paid: NDArray[Any]
) -> NDArray[np.float64]:
    """Dual variables of the proposals, 0 or below: how much the total would rise without one.

    With them no candidate costs a nucleus less than ``paid`` less the price of the chosen one. They are the shortest
    paths of exchanges, found by Bellman and Ford's relaxation.
    """
    price = np.zeros(int(proposal.max()) + 1)
    extra = cost - paid[:, None]
    for _ in range(len(chosen)):
        before = price.copy()
        np.minimum.at(price, proposal, before[chosen][:, None] + extra)
        if np.allclose(price, before, rtol=0, atol=1e-13):
            break
    return price
