"""Metrics of nucleus classification against scikit-learn and hand-worked cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, recall_score

from muse_fast.classification.features import NucleusSet
from muse_fast.classification.metrics import (
    METRICS,
    Predictions,
    Scores,
    average_precision,
    macro,
    majority,
    roc_auc,
    score,
)
from muse_fast.errors import UserError


def scores_of(predicted: Sequence[int], truth: Sequence[int], slides: Sequence[int], num_classes: int) -> Scores:
    """Scores of a classifier that gives its predicted classes probability 1."""
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


def test_the_first_of_equally_probable_classes_is_predicted() -> None:
    probabilities = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.3, 0.3, 0.4]], dtype=torch.float64)
    nuclei = NucleusSet(torch.empty(3, 0), torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64))
    assert score(probabilities, nuclei)["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_interval_is_over_slides_not_nuclei() -> None:
    """One slide all right and one all wrong: a bootstrap of slides gives 0 and 1, one of nuclei about 0.5."""
    slides = np.arange(200) // 100
    assert scores_of(slides, [0] * 200, slides, 2)["accuracy_ci95"] == (0.0, 1.0)


def predictions(probabilities: np.ndarray, labels: Sequence[int]) -> Predictions:
    return Predictions(probabilities, np.array(labels, np.int64), np.zeros(len(labels), np.int64))


def auc_by_pairs(probability: np.ndarray, is_kind: np.ndarray) -> float:
    """Share of pairs of a nucleus of the class and one of the rest in which the former is more probable."""
    difference = probability[is_kind][:, None] - probability[~is_kind][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def precision_by_thresholds(probability: np.ndarray, is_kind: np.ndarray) -> float:
    """Precision among the nuclei at least as probable, averaged over the nuclei of the class."""
    return float(np.mean([is_kind[probability >= threshold].mean() for threshold in probability[is_kind]]))


@pytest.mark.parametrize("decimals", [1, 16])  # with one decimal most nuclei tie with others
def test_auc_and_average_precision_agree_with_their_definitions(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    labels = rng.choice(4, 300, p=[0.6, 0.3, 0.1, 0])
    probabilities = rng.dirichlet([1, 1, 1, 1], 300) + 0.3 * np.eye(4)[labels]
    probabilities = (probabilities / probabilities.sum(axis=1, keepdims=True)).round(decimals)
    assert (len(np.unique(probabilities[:, 0])) < 30) == (decimals == 1)
    found = score(
        torch.tensor(probabilities), NucleusSet(torch.empty(300, 0), torch.tensor(labels), torch.tensor(labels))
    )
    kinds = [(probabilities[:, kind], labels == kind) for kind in range(3)]
    for name, of_class in (("roc_auc", auc_by_pairs), ("average_precision", precision_by_thresholds)):
        expected = [of_class(*kind) for kind in kinds]
        assert found[name] == (*(pytest.approx(value, abs=1e-12) for value in expected), None)
        assert found[f"mean_{name}"] == pytest.approx(np.mean(expected), abs=1e-12)  # over the classes that occur
        assert 0.2 < min(expected) < max(expected) < 0.99


def test_auc_and_average_precision_of_a_hand_worked_case() -> None:
    # Class 1, most probable first: no, yes, then a tie of yes and no. Pairs won: (1 of 2) and (0 + 1/2 of 2).
    probability = np.array([0.9, 0.7, 0.4, 0.4])
    found = predictions(np.stack([1 - probability, probability], axis=1), [0, 1, 1, 0])
    assert roc_auc(found) == pytest.approx((1.5 / 4, 1.5 / 4))
    assert average_precision(found)[1] == pytest.approx((1 / 2 + 2 / 4) / 2)


@pytest.mark.parametrize("labels", [[1, 1, 1], [1]])
def test_auc_is_undefined_without_other_classes(labels: list[int]) -> None:
    found = predictions(np.full((len(labels), 2), 0.5), labels)
    assert roc_auc(found) == (None, None)
    assert macro(roc_auc(found)) is None
    assert average_precision(found) == (None, 1.0)
    assert METRICS["mean_roc_auc"].show(None) == "-"


def test_no_metric_is_defined_without_nuclei() -> None:
    found = predictions(np.empty((0, 3)), [])
    assert roc_auc(found) == average_precision(found) == (None, None, None)
    assert macro(average_precision(found)) is None


def test_nan_is_refused() -> None:
    nuclei = NucleusSet(torch.empty(1, 0), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(UserError, match=r"probabilities are NaN.*check its weights"):
        score(torch.tensor([[torch.nan, 0.5]]), nuclei)


def test_majority_of_a_hand_worked_case() -> None:
    # Train is mostly class 1, which is 2 of 6 in test; test is mostly class 0, 4 of 6.
    found = majority([1, 2, 0], [4, 2, 0])
    assert found == {"test_majority_share": pytest.approx(4 / 6), "train_majority_accuracy": pytest.approx(2 / 6)}
