"""Metrics of nucleus classification against scikit-learn and hand-worked cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, recall_score

from muse_fast.classification.features import NucleusSet
from muse_fast.classification.metrics import METRICS, Scores, majority, score
from muse_fast.errors import UserError


def scores_of(predicted: Sequence[int], truth: Sequence[int], slides: Sequence[int], num_classes: int) -> Scores:
    """Scores of a classifier that is sure of each class it predicts."""
    probabilities = torch.eye(num_classes, dtype=torch.float64)[torch.tensor(predicted)]
    return score(probabilities, NucleusSet(torch.empty(len(truth), 0), torch.tensor(truth), torch.tensor(slides)))


def test_scores_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    truth, predicted = rng.choice(3, 500, p=[0.7, 0.2, 0.1]), rng.integers(0, 3, 500)
    found = scores_of(predicted, truth, rng.integers(0, 20, 500), 3)
    assert found["accuracy"] == pytest.approx((truth == predicted).mean(), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted), abs=1e-12)
    assert found["recall"] == pytest.approx(recall_score(truth, predicted, average=None), abs=1e-12)
    assert found["confusion"] == confusion_matrix(truth, predicted).tolist()
    assert found["count"] == 500
    assert found["accuracy_ci95"][0] < found["accuracy"] < found["accuracy_ci95"][1]


def test_scores_of_a_hand_worked_case() -> None:
    # Class 0: 3 of 4 right; class 1: 1 of 2 right; class 2 does not occur.
    found = scores_of([0, 0, 0, 2, 1, 0], [0, 0, 0, 0, 1, 1], [0] * 6, 3)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["recall"] == (0.75, 0.5, None)
    assert found["balanced_accuracy"] == 0.625
    assert found["confusion"] == [[3, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert found["accuracy_ci95"] == pytest.approx((4 / 6, 4 / 6))  # one slide: every draw is the same
    assert METRICS["recall"].show(found["recall"]) == "75.0 / 50.0 / -"
    assert METRICS["accuracy"].show(found["accuracy"]) == "66.67"


def test_of_equally_probable_classes_the_first_is_predicted() -> None:
    probabilities = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.3, 0.3, 0.4]], dtype=torch.float64)
    nuclei = NucleusSet(torch.empty(3, 0), torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64))
    assert score(probabilities, nuclei)["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_interval_is_over_slides_not_nuclei() -> None:
    """Two slides, one all right and one all wrong: a bootstrap of slides sees 0 and 1, one of nuclei about 0.5."""
    slides = np.arange(200) // 100
    assert scores_of(slides, [0] * 200, slides, 2)["accuracy_ci95"] == (0.0, 1.0)


def test_nan_is_refused() -> None:
    nuclei = NucleusSet(torch.empty(1, 0), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(UserError, match=r"probabilities are NaN.*check its weights"):
        score(torch.tensor([[torch.nan, 0.5]]), nuclei)


def test_majority_of_a_hand_worked_case() -> None:
    # Train is mostly class 1, of which test has 2 in 6; test is mostly class 0, 4 in 6.
    found = majority([1, 2, 0], [4, 2, 0])
    assert found == {"test_majority_share": pytest.approx(4 / 6), "train_majority_accuracy": pytest.approx(2 / 6)}
