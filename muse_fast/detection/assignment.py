"""Matching of proposals with annotated nuclei: a one-to-one assignment of minimal total cost.

The cost of a pair is that of P2PNet (Song et al., 2021): ``distance_weight * distance - probability``, with the
distance in pixels between the predicted point and the nucleus, and the predicted probability of the nucleus' class. For
a nucleus of unknown class, it is the probability of not being background.
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
"""Rows in the proposals and in the nuclei, pair by pair, nuclei ascending."""

_FAR = 1e6  # pixels; replaces non-finite coordinates, which the loss reports


def match(
    points: NDArray[Any],
    probabilities: NDArray[Any],
    xy: NDArray[Any],
    label: NDArray[Any],
    *,
    distance_weight: float,
    neighbours: int = NEIGHBOURS,
) -> Assignment:
    """Match every nucleus with its own proposal, or every proposal with its own nucleus if there are fewer proposals.

    At first, only the predicted points nearest to a nucleus are its candidates, which takes a fortieth of the dense
    problem's time at 16,384 proposals and 1,500 nuclei. Prices of the proposals show whether a point farther away could
    lower the total; if so, the number of candidates doubles, and finally the dense problem is solved. The total is
    always minimal.

    Args:
        points: ``[P, 2]`` predicted points.
        probabilities: ``[P, C + 1]``, background last.
        xy: ``[N, 2]`` nuclei.
        label: ``[N]`` int, the class, -1 if unknown.
        distance_weight: cost of one pixel, relative to probabilities.
        neighbours: initial number of candidates per nucleus.
    """
    if not len(points) or not len(xy):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    points = np.nan_to_num(points.astype(np.float64), nan=_FAR, posinf=_FAR, neginf=-_FAR)
    probabilities = np.nan_to_num(probabilities.astype(np.float64), nan=0.0)
    # Unknown classes (-1) select the last column, which here is 1 - background.
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
    """Return the best assignment among candidates, and whether it is optimal among all proposals."""
    distance, proposal = cKDTree(points).query(xy, k=range(1, neighbours + 1))  # both [N, neighbours]
    cost = distance_weight * distance - of_class[proposal, column[:, None]]
    # Shifted to 1 or more, since sparse entries of 0 are not edges. Every nucleus pays the shift once.
    start = np.arange(0, cost.size + 1, neighbours)
    candidates = csr_array((cost.ravel() + 2, proposal.ravel(), start), shape=(len(xy), len(points)))
    try:
        _, chosen = min_weight_full_bipartite_matching(candidates)  # rows are in order
    except ValueError:  # scipy's "no full matching exists"
        return (np.zeros(0, np.int64), np.zeros(0, np.int64)), False
    found = chosen.astype(np.int64), np.arange(len(xy))
    beyond = distance_weight * distance[:, -1] - of_class.max(axis=0)[column]  # lower bound for other proposals
    paid = cost[proposal == chosen[:, None]]
    return found, bool((paid - _prices(cost, proposal, chosen, paid)[chosen] <= beyond + 1e-12).all())


def _prices(
    cost: NDArray[Any], proposal: NDArray[Any], chosen: NDArray[Any], paid: NDArray[Any]
) -> NDArray[np.float64]:
    """Dual variables of the proposals, 0 or below: how much the total would rise without each proposal.

    No candidate costs a nucleus less than ``paid`` minus the price of the chosen one, plus its own price. They are
    shortest paths of exchanges, computed by the Bellman-Ford algorithm.
    """
    price = np.zeros(int(proposal.max()) + 1)
    extra = cost - paid[:, None]
    for _ in range(len(chosen)):
        before = price.copy()
        np.minimum.at(price, proposal, before[chosen][:, None] + extra)
        if np.allclose(price, before, rtol=0, atol=1e-13):
            break
    return price
