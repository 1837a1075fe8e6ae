"""One-to-one pairs of predicted and true points, by the rules of published evaluations.

The rules differ in which points choose first and which partner they prefer, so they find different numbers of pairs for
the same points. Those of type `Rule` choose among candidates, the pairs within the radius.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

from muse_fast.errors import UserError
from muse_fast.images.points import Points

MAX_DISTANCES = 100_000_000
"""Entries of the matrix in `by_total_distance`: 10,000 x 10,000 need 800 MB and half a minute."""


class TooManyPointsError(UserError):
    """An image has too many points for a rule."""


Pairs = NDArray[np.int64]
"""``[k, 2]``: row in the predictions, row in the truth."""


class Candidates(NamedTuple):
    """Pairs of a predicted and a true point within the radius, in no particular order."""

    prediction: NDArray[np.int64]  # [E] rows in the predictions
    truth: NDArray[np.int64]  # [E] rows in the truth
    distance: NDArray[np.float64]  # [E] pixels

    def take(self, which: NDArray[Any]) -> Candidates:
        return Candidates(self.prediction[which], self.truth[which], self.distance[which])


Rule = Callable[[Candidates, Points, Points], Pairs]
"""Arguments: candidates, each within one class or all of them across classes; all predictions; all true points."""


def find_candidates(predictions: Points, truths: Points, radius: float, strict: bool) -> Candidates:
    """Find pairs at a distance of at most ``radius`` pixels, or below it if ``strict``; distances in float64."""
    predicted, true = (np.asarray(points.xy, np.float64) for points in (predictions, truths))
    if not len(predicted) or not len(true):
        return Candidates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    # The trees compare squared distances, which round differently at the border, so search slightly beyond the radius.
    found = KDTree(predicted).sparse_distance_matrix(KDTree(true), radius * (1 + 1e-9), output_type="ndarray")
    prediction, truth = found["i"].astype(np.int64), found["j"].astype(np.int64)
    distance = np.sqrt(((predicted[prediction] - true[truth]) ** 2).sum(axis=1))
    near = Candidates(prediction, truth, distance)
    return near.take(distance < radius if strict else distance <= radius)


def by_confidence(near: Candidates, predictions: Points, truths: Points) -> Pairs:
    """Predictions choose, the most confident first; each takes the nearest free true point.

    Ties: at equal confidence, the earlier prediction; at equal distance, the earlier true point.
    """
    first = -predictions.confidence()[near.prediction]
    order = np.lexsort((near.truth, near.distance, near.prediction, first))
    return _greedy(near.take(order))


def by_raster(predictions: Points, truths: Points, radius: float) -> Pairs:
    """True points choose, in raster order; each takes the nearest free prediction closer than ``radius`` pixels.

    A true point considers only its 50 nearest predictions, free or not. As in MCSpatNet's code, SciPy's query ranks
    them, and equally near ones come in its order, which depends on the tree: predictions as (y, x) in raster order.
    """
    if not len(predictions.xy) or not len(truths.xy):
        return _as_pairs([])
    rows, chooses = _raster_order(predictions.xy), _raster_order(truths.xy)
    yx, true_yx = (np.asarray(xy[:, ::-1], np.float64) for xy in (predictions.xy[rows], truths.xy[chooses]))
    _, nearest = KDTree(yx, leafsize=2048).query(true_yx, k=50, distance_upper_bound=radius)  # closer than that
    free = np.ones(len(rows) + 1, bool)
    free[-1] = False  # what the query returns when there are no more
    pairs = []
    for truth, candidates in zip(chooses.tolist(), nearest, strict=True):
        for candidate in candidates[free[candidates]][:1].tolist():
            free[candidate] = False
            pairs.append((int(rows[candidate]), truth))
    return _as_pairs(pairs)


def by_truth(near: Candidates, predictions: Points, truths: Points) -> Pairs:
    """True points choose, in their order; each takes the most confident free prediction.

    Ties: at equal confidence, the nearer prediction; at equal distance as well, the earlier one. If several predictions
    of one class have the same position, choosing any of them uses up the earliest, as in PUMA's code.
    """
    order = np.lexsort((near.prediction, near.distance, -predictions.confidence()[near.prediction], near.truth))
    rows = np.column_stack([predictions.xy, predictions.classes()])
    place = np.unique(rows, axis=0, return_inverse=True)[1].ravel().tolist()  # one number per position and class
    waiting: list[list[int]] = [[] for _ in place]  # by place, the earliest row last
    for row in reversed(range(len(place))):
        waiting[place[row]].append(row)
    pairs, taken = [], set()
    for prediction, truth in zip(near.prediction[order].tolist(), near.truth[order].tolist(), strict=True):
        there = waiting[place[prediction]]
        if truth not in taken and there and there[-1] <= prediction:
            pairs.append((there.pop(), truth))
            taken.add(truth)
    return _as_pairs(pairs)


def as_many_as_possible(near: Candidates, predictions: Points, truths: Points) -> Pairs:
    """A maximum matching of the graph of candidates (Hopcroft and Karp, 1973): no rule finds more pairs.

    The number of pairs is unique, the pairs are not.
    """
    edges = np.ones(len(near.truth), bool), (near.prediction, near.truth)
    graph = csr_array(edges, shape=(len(predictions.xy), len(truths.xy)))
    truth = maximum_bipartite_matching(graph, perm_type="column")  # per prediction, -1 for none
    matched = np.flatnonzero(truth >= 0)
    return np.stack([matched, truth[matched]], axis=1).astype(np.int64)


def by_total_distance(predictions: Points, truths: Points, radius: float) -> Pairs:
    """Assign all points at the smallest total distance, then drop pairs beyond ``radius``.

    Points without a partner nearby are assigned too and can take the partners of others, so near pairs are lost that
    every other rule finds. The solution therefore depends on the whole matrix of distances; candidates within a radius
    are not enough. Ties are broken as by `scipy.optimize.linear_sum_assignment` with one row per true point.

    Raises:
        TooManyPointsError: the matrix would have more than ``MAX_DISTANCES`` entries.
    """
    if len(predictions.xy) * len(truths.xy) > MAX_DISTANCES:
        raise TooManyPointsError(
            f"{len(predictions.xy)} predicted and {len(truths.xy)} true points in one image: the hovernet protocol "
            f"needs all distances, at most {MAX_DISTANCES:,}; cut the image into parts, or remove it"
        )
    distance = cdist(np.asarray(truths.xy, np.float64), np.asarray(predictions.xy, np.float64))
    truth, prediction = linear_sum_assignment(distance)
    near = distance[truth, prediction] <= radius
    return np.stack([prediction[near], truth[near]], axis=1)


def _greedy(near: Candidates) -> Pairs:
    """Accept candidates in order, skipping those with a point that is already paired."""
    predictions, truths, pairs = set(), set(), []
    for prediction, truth in zip(near.prediction.tolist(), near.truth.tolist(), strict=True):
        if prediction not in predictions and truth not in truths:
            predictions.add(prediction)
            truths.add(truth)
            pairs.append((prediction, truth))
    return _as_pairs(pairs)


def _as_pairs(pairs: list[tuple[int, int]]) -> Pairs:
    return np.array(pairs, np.int64).reshape(-1, 2)


def _raster_order(xy: NDArray[Any]) -> NDArray[np.int64]:
    """The rows of ``xy`` from top to bottom, and from left to right at equal height."""
    return np.lexsort((xy[:, 0], xy[:, 1]))
