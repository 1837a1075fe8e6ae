"""Metrics of nucleus classification: how well class probabilities fit the true classes.

`METRICS` is the only list of them: `score` computes every entry, the report stores each under its name, and those with
a heading are columns of the printed table. Accuracy by itself flatters a classifier that follows the majority class, so
it never appears without balanced accuracy, recall per class, the confusion matrix and a 95 % interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from muse_fast.classification.bootstrap import Interval, interval
from muse_fast.classification.features import NucleusSet
from muse_fast.errors import UserError

Scores = dict[str, Any]
"""A value for each name in `METRICS`."""

PerClass = tuple[float | None, ...]  # None where undefined, such as the recall of a class that does not occur


@dataclass(frozen=True)
class Predictions:
    """Predicted and true classes of the nuclei of one split."""

    probabilities: NDArray[np.float64]  # [N, C]
    labels: NDArray[np.int64]  # [N] true classes
    patients: NDArray[np.int64]  # [N] patient or slide of each nucleus, see `NucleusSet`

    @property
    def num_classes(self) -> int:
        return self.probabilities.shape[1]

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """``[N]`` most probable class; the first of equally probable ones."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def confusions(self) -> NDArray[np.int64]:
        """``[P, C, C]`` counts of the nuclei of every patient, in the order of their numbers: rows are true classes."""
        numbers, patient = np.unique(self.patients, return_inverse=True)
        size = self.num_classes
        cell = (patient * size + self.labels) * size + self.classes
        return np.bincount(cell, minlength=len(numbers) * size**2).reshape(len(numbers), size, size)

    def one_vs_rest(self) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.float64]]]:
        """For each class: which nuclei belong to it ``[N]``, and its predicted probability ``[N]``."""
        for kind, probability in enumerate(self.probabilities.T):
            yield self.labels == kind, probability


def score(probabilities: Tensor, truth: NucleusSet) -> Scores:
    """Every metric of class probabilities ``[N, C]`` float64 against ``truth``.

    Raises:
        UserError: probabilities are NaN.
    """
    predictions = Predictions(probabilities.cpu().numpy(), truth.labels.cpu().numpy(), truth.patients.cpu().numpy())
    if np.isnan(predictions.probabilities).any():
        raise UserError("class probabilities are NaN: the network's features are not finite; check its weights")
    return {name: metric.compute(predictions) for name, metric in METRICS.items()}


# ----------------------------------------------------------------------------------------------------------- metrics


def accuracy(predictions: Predictions) -> float:
    return float((predictions.classes == predictions.labels).mean())


def confusion(predictions: Predictions) -> list[list[int]]:
    """``[C][C]`` counts of nuclei: rows are true classes, columns predicted ones."""
    return predictions.confusions.sum(axis=0).tolist()


def recall(predictions: Predictions) -> PerClass:
    """Share of each class's nuclei that are predicted as that class."""
    return tuple(row[kind] / sum(row) if any(row) else None for kind, row in enumerate(confusion(predictions)))


def roc_auc(predictions: Predictions) -> PerClass:
    """Area under the ROC curve of each class against the rest; None if the class or the rest has no nuclei.

    It is the probability that a nucleus of the class gets a higher probability of that class than another nucleus;
    ties count one half (Fawcett, 2006).
    """
    return tuple(
        float(roc_auc_score(is_kind, probability)) if 0 < is_kind.sum() < len(is_kind) else None
        for is_kind, probability in predictions.one_vs_rest()
    )


def average_precision(predictions: Predictions) -> PerClass:
    """Average precision of each class against the rest; None for a class that does not occur.

    It is the sum of ``(R_n - R_{n-1}) P_n`` over thresholds, with recall R and precision P, without interpolation.
    """
    return tuple(
        float(average_precision_score(is_kind, probability)) if is_kind.any() else None
        for is_kind, probability in predictions.one_vs_rest()
    )


def _interval_of(figure: str) -> Callable[[Predictions], Interval]:
    """A 95 % interval by bootstrap over patients."""
    return lambda predictions: interval(predictions.confusions, figure)


def macro(values: PerClass) -> float | None:
    """Mean over the classes for which the value is defined; None if there are none."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


# ------------------------------------------------------------------------------------------------------------- table


def percent(value: float | None, decimals: int = 2) -> str:
    return "-" if value is None else f"{100 * value:.{decimals}f}"


def percent_interval(value: Interval) -> str:
    return " .. ".join(percent(end, 1) for end in value)


def percent_per_class(values: PerClass) -> str:
    return " / ".join(percent(value, 1) for value in values)


class Metric(NamedTuple):
    """One or more numbers computed from a classifier's predictions."""

    compute: Callable[[Predictions], Any]  # its result can be written as JSON
    heading: str = ""  # of its table column; empty: only in the report. {classes}: names of the classes
    show: Callable[[Any], str] = percent  # formats the value for that column

    def column(self, class_names: Sequence[str]) -> str:
        return self.heading.format(classes=" / ".join(class_names))


METRICS = {
    "accuracy": Metric(accuracy, "ACC"),
    "accuracy_ci95": Metric(_interval_of("accuracy"), "95 % interval", percent_interval),
    "balanced_accuracy": Metric(lambda predictions: macro(recall(predictions)), "balanced"),
    "balanced_accuracy_ci95": Metric(_interval_of("balanced_accuracy")),
    "mean_roc_auc": Metric(lambda predictions: macro(roc_auc(predictions)), "ROC-AUC"),
    "roc_auc": Metric(roc_auc),
    "mean_average_precision": Metric(lambda predictions: macro(average_precision(predictions)), "mAP"),
    "average_precision": Metric(average_precision),
    "recall": Metric(recall, "recall {classes}", percent_per_class),
    "confusion": Metric(confusion),
    "confusion_by_patient": Metric(lambda predictions: predictions.confusions.tolist()),  # for paired differences
    "count": Metric(lambda predictions: len(predictions.labels)),
}


def majority(train: Sequence[int], test: Sequence[int]) -> dict[str, float]:
    """Test accuracy of classifiers that ignore the image, from the number of nuclei of each class."""
    most_frequent = max(range(len(train)), key=lambda kind: train[kind])
    return {
        "test_majority_share": max(test) / sum(test),
        "train_majority_accuracy": test[most_frequent] / sum(test),
    }
