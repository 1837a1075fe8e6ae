"""Intervals by bootstrap over patients, against enumeration, a loop over nuclei, and their coverage."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score

from muse_fast.classification.bootstrap import (
    DRAWS,
    FIGURES,
    _resampled,
    interval,
    mean_paired_difference,
    paired_difference,
)
from muse_fast.classification.features import NucleusSet
from muse_fast.classification.metrics import Scores, score


def scores_of(predicted: np.ndarray, truth: np.ndarray, patients: np.ndarray, num_classes: int) -> Scores:
    probabilities = torch.eye(num_classes, dtype=torch.float64)[torch.tensor(predicted)]
    nuclei = NucleusSet(torch.empty(len(truth), 0), torch.tensor(truth), torch.tensor(patients))
    return score(probabilities, nuclei)


def balanced(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(recall_score(truth, predicted, labels=np.unique(truth), average="macro"))


def two_classifiers(seed: int) -> tuple[np.ndarray, ...]:
    """True classes, the answers of two classifiers, and patients of very different sizes; class 3 never occurs."""
    rng = np.random.default_rng(seed)
    patients = rng.choice(9, 240, p=rng.dirichlet(np.ones(9))) * 7 + 3
    truth = rng.choice(3, 240, p=[0.6, 0.3, 0.1])
    first = np.where(rng.random(240) < 0.5, truth, rng.integers(0, 4, 240))
    second = np.where(rng.random(240) < 0.3, truth, first)
    return truth, first, second, patients


@pytest.mark.parametrize(("figure", "of"), [("accuracy", accuracy_score), ("balanced_accuracy", balanced)])
def test_agrees_with_a_loop_over_draws_of_nuclei(figure: str, of: object) -> None:
    """Every draw written out as a list of nuclei and scored by scikit-learn."""
    truth, first, second, patients = two_classifiers(1)
    rows = [np.flatnonzero(patients == one) for one in np.unique(patients)]
    values = []
    for drawn in np.random.default_rng(0).integers(len(rows), size=(DRAWS, len(rows)))[:40]:
        nuclei = np.concatenate([rows[i] for i in drawn])
        values.append([of(truth[nuclei], answer[nuclei]) for answer in (first, second)])
    ours, theirs = (scores_of(answer, truth, patients, 4) for answer in (first, second))
    for column, scores in enumerate((ours, theirs)):
        found = FIGURES[figure](_resampled(scores["confusion_by_patient"]))[:40]
        np.testing.assert_allclose(found, np.array(values)[:, column], rtol=0, atol=1e-12)
    difference = paired_difference(ours, theirs, figure)
    assert difference.mean == pytest.approx(of(truth, first) - of(truth, second), abs=1e-12)
    assert difference.low < difference.mean < difference.high


@pytest.mark.parametrize("figure", FIGURES)
def test_agrees_with_all_draws_of_four_patients(figure: str) -> None:
    """Of four patients there are 256 equally likely draws, whose percentiles are known exactly."""
    rng = np.random.default_rng(5)
    a = rng.integers(1, 40, (4, 3, 3))
    b = np.stack([[rng.permutation(row) for row in one] for one in a])  # the same nuclei, other answers
    found = paired_difference({"confusion_by_patient": a}, {"confusion_by_patient": b.tolist()}, figure)
    draws = [list(one) for one in product(range(4), repeat=4)]
    exact = [FIGURES[figure](a[one].sum(0)) - FIGURES[figure](b[one].sum(0)) for one in draws]
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        below, above = np.quantile(exact, (share - 0.01, share + 0.01))  # three standard errors of 2,000 draws
        assert below <= end <= above
    assert found.mean == FIGURES[figure](a.sum(0)) - FIGURES[figure](b.sum(0))


def test_one_patient_and_two_patients() -> None:
    """With one, every draw is the same; with two, a quarter of the draws has only the first and as many the second."""
    truth, patients = np.zeros(6, np.int64), np.array([4, 4, 4, 9, 9, 9])
    ours = scores_of(np.array([0, 0, 0, 0, 1, 1]), truth, patients, 2)
    theirs = scores_of(np.array([0, 1, 1, 0, 0, 0]), truth, patients, 2)
    assert paired_difference(ours, theirs, "accuracy") == pytest.approx((0, -2 / 3, 2 / 3))
    alone = scores_of(np.array([0, 0, 1]), truth[:3], patients[:3], 2)
    other = scores_of(np.array([0, 1, 1]), truth[:3], patients[:3], 2)
    assert paired_difference(alone, other, "balanced_accuracy") == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert paired_difference(ours, ours, "accuracy") == (0, 0, 0)


@pytest.mark.parametrize("figure", FIGURES)
def test_the_mean_over_seeds_is_that_of_every_draw(figure: str) -> None:
    truth, first, second, patients = two_classifiers(1)
    third = np.where(np.arange(240) % 3 == 0, truth, second)
    a, b, c = (scores_of(answer, truth, patients, 4) for answer in (first, second, third))
    of_draws = [FIGURES[figure](_resampled(one["confusion_by_patient"])) for one in (a, b, c)]
    found = mean_paired_difference([(c, a), (b, a)], figure)
    expected = (of_draws[2] + of_draws[1]) / 2 - of_draws[0]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(expected, (0.025, 0.975))), abs=1e-12)
    assert found.mean == pytest.approx((c[figure] + b[figure]) / 2 - a[figure], abs=1e-12)


def test_the_interval_of_a_difference_is_paired() -> None:
    """Patients differ much and the classifiers little: unpaired intervals would overlap widely."""
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(40), 100)
    truth = np.zeros(4000, np.int64)
    wrong = rng.random(4000) > np.repeat(rng.uniform(0.2, 0.9, 40), 100)
    ours, theirs = (
        scores_of(answer.astype(int), truth, patients, 2) for answer in (wrong, wrong | (rng.random(4000) < 0.05))
    )
    found = paired_difference(ours, theirs, "accuracy")
    assert 0 < found.low < found.high < 0.05
    (low, high), (other_low, other_high) = ours["accuracy_ci95"], theirs["accuracy_ci95"]
    assert other_low < low < other_high < high
    assert interval(ours["confusion_by_patient"], "accuracy") == (low, high)


def test_intervals_cover_the_truth_in_95_of_100_studies() -> None:
    """Patients differ in their share of hits, which is known: of 400 intervals about 380 contain the mean."""
    rng = np.random.default_rng(11)
    covered = {"paired": 0, "of nuclei": 0}
    for _ in range(400):
        rate = rng.beta(6, 4, 60)  # mean 0.6; the second classifier has 0.1 less for every patient
        hits = rng.binomial(50, rate), rng.binomial(50, 0.5 * rate + 0.2)
        confusions = [[[[int(h), int(50 - h)], [0, 0]] for h in one] for one in hits]
        ours, theirs = ({"confusion_by_patient": one} for one in confusions)
        found = paired_difference(ours, theirs, "accuracy")
        covered["paired"] += found.low <= 0.1 <= found.high
        # As if the 3,000 nuclei were independent.
        p, half = hits[0].sum() / 3000, 1.96 * np.sqrt(0.24 / 3000)
        covered["of nuclei"] += abs(p - 0.6) <= half
    assert 0.92 < covered["paired"] / 400 < 0.975
    assert covered["of nuclei"] / 400 < 0.75


def test_scores_of_other_nuclei_are_refused() -> None:
    truth, first, _, patients = two_classifiers(1)
    ours = scores_of(first, truth, patients, 4)
    for other in (
        scores_of(first[1:], truth[1:], patients[1:], 4),
        scores_of(first, 1 - truth.clip(0, 1), patients, 4),
    ):
        with pytest.raises(ValueError, match="different nuclei"):
            paired_difference(ours, other, "accuracy")
