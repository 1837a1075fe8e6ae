"""Hand-worked cases in which the rules find different pairs. One pixel is one um; the radius is 3."""

from __future__ import annotations

import numpy as np
import pytest

from muse_fast.images.points import Points
from muse_fast.scoring import pairing
from muse_fast.scoring.pairing import TooManyPointsError, by_total_distance, find_candidates
from muse_fast.scoring.protocols import PROTOCOLS
from muse_fast.scoring.scores import evaluate, evaluate_all


def points(*rows: tuple[float, ...], scores: tuple[float, ...] | None = None) -> Points:
    """Points from rows of x, y and optionally the label."""
    table = np.array([(*row, 0)[:3] for row in rows], np.float64).reshape(-1, 3)
    return Points(table[:, :2], table[:, 2].astype(np.int64), None if scores is None else np.array(scores))


def hits(predictions: Points, truths: Points, classes: int = 1) -> dict[str, int]:
    """True positives over all classes, by protocol."""
    scores, skipped = evaluate_all([predictions], [truths], 1.0, classes, radius_um=3.0, draws=0)
    assert not skipped
    return {name: sum(score.tp for score in one.classes) for name, one in scores.items()}


def test_on_the_border_the_strict_rules_find_nothing() -> None:
    """Distances of 3 along an axis, and of 5 across."""
    for offset in ((3, 0), (0, -3)):
        found = hits(points(offset), points((0, 0)))
        assert found == {name: int(name not in ("mcspatnet", "puma")) for name in PROTOCOLS}, offset
    five, _ = evaluate_all([points((3, 4))], [points((0, 0))], 1.0, 1, radius_um=5.0, draws=0)
    assert {name for name, one in five.items() if one.detection.tp} == set(PROTOCOLS) - {"mcspatnet", "puma"}


def test_the_confident_prediction_takes_what_the_other_needed() -> None:
    """P0 at -2 reaches only A at 0. P1 at 1 reaches A and B at 3.5, A being nearer: the first to choose decides."""
    predictions, truths = ((-2, 0), (1, 0)), points((0, 0), (3.5, 0))
    sure, unsure = points(*predictions, scores=(0.2, 0.9)), points(*predictions, scores=(0.9, 0.2))
    assert hits(sure, truths)["ocelot"] == hits(sure, truths)["promptnucseg"] == 1
    assert hits(unsure, truths)["ocelot"] == hits(unsure, truths)["promptnucseg"] == 2
    # True points choose: A is first and takes the nearest (P1), or by PUMA's rule the most confident.
    assert hits(sure, truths)["mcspatnet"] == hits(unsure, truths)["mcspatnet"] == 1
    assert (hits(sure, truths)["puma"], hits(unsure, truths)["puma"]) == (1, 2)
    assert hits(sure, truths)["max-matching"] == 2


def test_truth_chooses_in_file_order_or_row_by_row() -> None:
    """B can pair only with P0; A, which prefers P0, comes first in the file but is lower in the image."""
    predictions = points((0, 0), (0, 4))
    a, b = (0, 1.5), (0, -2)
    found = hits(predictions, points(a, b))
    assert (found["mcspatnet"], found["puma"]) == (2, 1)
    found = hits(predictions, points(b, a))
    assert (found["mcspatnet"], found["puma"]) == (2, 2)


def test_smallest_total_distance_loses_pairs_that_others_keep() -> None:
    """One extra prediction on the left and one extra true point on the right shift all pairs by one."""
    truths = points((0, 0), (4, 0), (8, 0), (12, 0))
    # In place: 0.5 * 3 + 16 = 17.5. Shifted by one: 4 + 3.5 * 3 = 14.5, every pair beyond the radius.
    predictions = points((-4, 0), (0.5, 0), (4.5, 0), (8.5, 0))
    assert hits(predictions, truths) == {**dict.fromkeys(PROTOCOLS, 3), "hovernet": 0}


def test_candidates_do_not_determine_the_smallest_total_distance() -> None:
    """Why that rule needs the whole matrix: with the same near pairs, points far away change the result."""
    truths, near = [(0, 0), (4, 0), (8, 0)], [(0.5, 0), (4.5, 0), (8.5, 0)]
    assert len(by_total_distance(points(*near), points(*truths), 3.0)) == 3
    far = points((-4, 0), *near), points(*truths, (12, 0))
    assert len(find_candidates(*far, radius=3.0, strict=False).truth) == 3
    assert len(by_total_distance(*far, 3.0)) == 0


def test_classes_first_or_positions_first() -> None:
    """A prediction of the wrong class is nearer: hovernet pairs with it, the others ignore it."""
    predictions, truths = points((0.5, 0, 1), (2, 0, 0)), points((0, 0, 0))
    assert hits(predictions, truths, 2) == {**dict.fromkeys(PROTOCOLS, 1), "hovernet": 0}
    one = evaluate([predictions], [truths], 1.0, 2, "hovernet")
    # Paired with class 1: counts as two false negatives of 0 and two false positives of 1. The other is unpaired.
    assert [(score.tp, score.fp, score.fn) for score in one.classes] == [(0, 1, 2), (0, 2, 0)]
    assert (one.detection.tp, one.detection.fp, one.detection.fn) == (1, 1, 0)
    assert one.mean_f1 == 0.0  # class 1 is not in the truth, so only class 0 counts


def test_a_greedy_choice_loses_what_a_maximum_matching_finds() -> None:
    """A chain: P0 - A - P1 - B, the middle edge the shortest."""
    predictions = points((0, 0), (3.5, 0), scores=(0.1, 0.9))
    truths = points((2, 0), (6, 0))
    found = hits(predictions, truths)
    assert found["ocelot"] == found["mcspatnet"] == 1
    assert found["max-matching"] == 2


def test_duplicates_pair_once_each() -> None:
    twice = points((0, 0), (0, 0), scores=(0.5, 0.5))
    assert set(hits(twice, points((1, 0))).values()) == {1}
    assert set(hits(points((1, 0), scores=(0.5,)), points((0, 0), (0, 0))).values()) == {1}
    assert set(hits(twice, points((1, 0), (0, 0))).values()) == {2}


def test_puma_uses_up_the_first_prediction_at_a_position() -> None:
    """A chooses the confident twin but removes the other, so B sees confidence 0.9 before P2's 0.5."""
    truths = points((0, 0), (2, 0), (4.5, 0))
    predictions = points((1, 0), (1, 0), (3, 0), scores=(0.1, 0.9, 0.5))
    assert hits(predictions, truths)["puma"] == 3
    apart = points((1, 0), (1.001, 0), (3, 0), scores=(0.1, 0.9, 0.5))
    assert hits(apart, truths)["puma"] == 2
    # If their classes differ, they are twins only in detection.
    mixed = points((1, 0, 0), (1, 0, 1), (3, 0, 0), scores=(0.1, 0.9, 0.5))
    assert evaluate([mixed], [truths], 1.0, 2, "puma", radius_um=3.0).detection.tp == 3


@pytest.mark.parametrize("name", PROTOCOLS)
def test_ties_go_to_the_earlier(name: str) -> None:
    """Equal scores have the same result as no scores."""
    rng = np.random.default_rng(3)
    xy, truth = rng.integers(0, 12, (60, 2)), rng.integers(0, 12, (60, 2))
    labels = rng.integers(0, 2, (2, 60))
    tied = Points(xy.astype(float), labels[0], np.full(60, 0.5))
    unscored = Points(xy.astype(float), labels[0])
    true = Points(truth.astype(float), labels[1])
    assert evaluate([tied], [true], 1.0, 2, name) == evaluate([unscored], [true], 1.0, 2, name)


def test_mcspatnet_considers_the_fifty_nearest_predictions() -> None:
    """51 true points at one position and 51 predictions around them: for the last, all fifty are taken."""
    angles = np.linspace(0, 2 * np.pi, 51, endpoint=False)
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.linspace(1, 2, 51)[:, None]
    predictions = Points(around, np.zeros(51, np.int64))
    found = hits(predictions, Points(np.zeros((51, 2)), np.zeros(51, np.int64)))
    assert found["mcspatnet"] == 50
    assert found["ocelot"] == found["puma"] == found["max-matching"] == 51


def test_mcspatnet_takes_equally_near_predictions_in_the_order_of_scipy() -> None:
    """Both predictions are sqrt(5) from A, and SciPy returns the lower one first, the only one that B can pair with."""
    predictions, a, b = points((3, 0), (2, 3)), (4, 2), (3, 3)
    assert hits(predictions, points(a, b))["mcspatnet"] == 1
    assert hits(predictions, points(b, a))["mcspatnet"] == 1  # A is higher in the image and chooses first
    assert hits(points((3.001, 0), (2, 3)), points(a, b))["mcspatnet"] == 2  # the upper one is nearer to A


def test_an_image_too_large_for_all_distances_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "MAX_DISTANCES", 5)
    two, three = points((0, 0), (9, 0)), points((0, 0), (9, 0), (18, 0))
    with pytest.raises(TooManyPointsError, match=r"2 predicted and 3 true points.*hovernet.*cut the image"):
        evaluate([two], [three], 1.0, 1, "hovernet")
    scores, skipped = evaluate_all([two], [three], 1.0, 1, draws=0)
    assert set(scores) == set(PROTOCOLS) - {"hovernet"}
    assert "cut the image" in skipped["hovernet"]
    assert evaluate([two], [two], 1.0, 1, "hovernet").detection.tp == 2


def test_candidates_are_exact_on_the_border() -> None:
    """Integer points, compared with exact integer arithmetic."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 100, (300, 2)), rng.integers(0, 100, (300, 2))
    squares = ((a[:, None] - b[None]) ** 2).sum(axis=-1)
    for strict in (False, True):
        near = find_candidates(points(*a.tolist()), points(*b.tolist()), 5.0, strict)
        expected = np.argwhere(squares < 25 if strict else squares <= 25)
        order = np.lexsort((near.truth, near.prediction))
        np.testing.assert_array_equal(np.stack([near.prediction, near.truth], axis=1)[order], expected)
        assert (squares == 25).any()
