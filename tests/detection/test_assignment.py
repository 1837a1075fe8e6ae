"""Assignment of proposals to nuclei, compared with the dense problem and brute force."""

from itertools import permutations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from muse_fast.detection.assignment import match
from muse_fast.detection.detector import grid

WEIGHT = 0.05


def case(side: int, nuclei: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Randomly moved proposals of a square of ``side`` pixels, and nuclei, some of unknown class."""
    rng = np.random.default_rng(seed)
    points = grid(side, 8).numpy() + rng.normal(0, 3, ((side // 8) ** 2, 2))
    probabilities = rng.dirichlet(np.ones(classes + 1), len(points))
    return points, probabilities, rng.uniform(0, side, (nuclei, 2)), rng.integers(-1, classes, nuclei)


def costs(points: np.ndarray, probabilities: np.ndarray, xy: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Costs ``[P, N]`` by definition."""
    of_class = [1 - probabilities[:, -1] if kind < 0 else probabilities[:, kind] for kind in label]
    return WEIGHT * cdist(points, xy) - np.stack(of_class, axis=1)


@pytest.mark.parametrize(("side", "nuclei"), [(16, 1), (64, 20), (256, 300), (256, 1000), (512, 40), (64, 64)])
def test_the_total_cost_equals_the_dense_problem(side: int, nuclei: int) -> None:
    for seed in range(5 if nuclei < 1000 else 1):
        points, probabilities, xy, label = case(side, nuclei, seed=seed)
        cost = costs(points, probabilities, xy, label)
        proposal, nucleus = match(points, probabilities, xy, label, distance_weight=WEIGHT)
        assert sorted(nucleus) == list(range(nuclei)) and len(set(proposal)) == nuclei
        best = cost[linear_sum_assignment(cost)].sum()
        assert cost[proposal, nucleus].sum() == pytest.approx(best, rel=1e-12)


def test_the_total_cost_is_minimal_over_all_assignments() -> None:
    for seed in range(20):
        points, probabilities, xy, label = case(24, 4, seed=seed)
        cost = costs(points, probabilities, xy, label)
        best = min(cost[list(p), range(4)].sum() for p in permutations(range(len(points)), 4))
        found = match(points, probabilities, xy, label, distance_weight=WEIGHT)
        assert cost[found].sum() == pytest.approx(best, rel=1e-12)


def test_more_nuclei_than_proposals() -> None:
    points, probabilities, xy, label = case(16, 11)
    cost = costs(points, probabilities, xy, label)
    proposal, nucleus = match(points, probabilities, xy, label, distance_weight=WEIGHT)
    assert sorted(proposal) == [0, 1, 2, 3] and len(set(nucleus)) == 4
    assert cost[proposal, nucleus].sum() == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-12)


def test_too_few_candidates_at_first() -> None:
    """Forty nuclei at the same position have the same few candidates."""
    points, probabilities, _, _ = case(128, 1)
    xy, label = np.full((40, 2), 60.0), np.zeros(40, np.int64)
    cost = costs(points, probabilities, xy, label)
    proposal, nucleus = match(points, probabilities, xy, label, distance_weight=WEIGHT)
    assert len(set(proposal)) == 40
    assert cost[proposal, nucleus].sum() == pytest.approx(cost[linear_sum_assignment(cost)].sum(), rel=1e-12)


def test_no_nuclei_or_no_proposals() -> None:
    points, probabilities, xy, label = case(64, 5)
    for found in (
        match(points, probabilities, xy[:0], label[:0], distance_weight=WEIGHT),
        match(points[:0], probabilities[:0], xy, label, distance_weight=WEIGHT),
    ):
        assert [len(rows) for rows in found] == [0, 0]


def test_the_class_outweighs_only_a_short_distance() -> None:
    points = np.array([[0.0, 0.0], [4.0, 0.0], [60.0, 0.0]])
    probabilities = np.array([[0.1, 0.9, 0.0], [0.8, 0.2, 0.0], [1.0, 0.0, 0.0]])
    one = np.zeros((1, 2))
    for label, expected in ((0, 1), (1, 0), (-1, 0)):  # unknown class: probabilities are equal, so the nearest
        assert match(points, probabilities, one, np.array([label]), distance_weight=WEIGHT)[0].tolist() == [expected]


def test_non_finite_proposals_are_not_matched() -> None:
    points, probabilities, xy, label = case(64, 10)
    points[3], points[4], probabilities[5] = np.nan, np.inf, np.nan
    proposal, nucleus = match(points, probabilities, xy, label, distance_weight=WEIGHT)
    assert len(set(proposal)) == len(set(nucleus)) == 10 and not {3, 4} & set(proposal.tolist())
