"""Intervals of accuracy and balanced accuracy, and of their differences, by bootstrap over patients.

Nuclei of one patient are not independent, so whole patients are drawn with replacement, as many as there are (Efron and
Tibshirani, 1993), each with its confusion matrix. Intervals are the percentiles 2.5 and 97.5 of 2,000 draws. All
classifiers of the same nuclei are scored on the same draws: the difference between two networks varies much less over
draws than their scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
Interval = tuple[float, float]
Scores = Mapping[str, Any]  # with ``confusion_by_patient [P][C][C]``
Confusions = NDArray[np.float64]  # [..., C, C] numbers of nuclei: rows are true classes, columns predicted ones


class Difference(NamedTuple):
    """How much higher one classifier scores than another: over all patients, and its 95 % interval."""

    mean: float
    low: float
    high: float


def accuracies(confusions: Confusions) -> NDArray[np.float64]:
    """``[...]`` share of nuclei on the diagonal."""
    return np.trace(confusions, axis1=-2, axis2=-1) / confusions.sum(axis=(-2, -1))


def balanced_accuracies(confusions: Confusions) -> NDArray[np.float64]:
    """``[...]`` mean share on the diagonal over the rows that have nuclei."""
    of_class = confusions.sum(axis=-1)
    recall = np.diagonal(confusions, axis1=-2, axis2=-1) / np.maximum(of_class, 1)
    return recall.sum(axis=-1) / (of_class > 0).sum(axis=-1)


FIGURES: dict[str, Callable[[Confusions], NDArray[np.float64]]] = {
    "accuracy": accuracies,
    "balanced_accuracy": balanced_accuracies,
}


def interval(by_patient: ArrayLike, figure: str) -> Interval:
    """95 % interval of a figure (key of `FIGURES`) of the confusion matrices ``[P, C, C]`` of P > 0 patients."""
    low, high = np.quantile(FIGURES[figure](_resampled(by_patient)), (0.025, 0.975))
    return float(low), float(high)


def paired_difference(ours: Scores, theirs: Scores, figure: str) -> Difference:
    """How much higher ``ours`` scores than ``theirs``, with a 95 % interval over the same draws of patients.

    Args:
        ours, theirs: of the same nuclei; see `muse_fast.classification.metrics.score`. A report's will do.
        figure: key of `FIGURES`.

    Raises:
        ValueError: the scores are not of the same nuclei: numbers per patient and class differ.
    """
    return mean_paired_difference([(ours, theirs)], figure)


def mean_paired_difference(pairs: Sequence[tuple[Scores, Scores]], figure: str) -> Difference:
    """`paired_difference` of each of ``pairs``, such as two variants with several seeds, averaged in every draw.

    The interval is for these networks on other patients; how much seeds vary is not in it.

    Raises:
        ValueError: the scores are not of the same nuclei: numbers per patient and class differ.
    """
    matrices = [[np.asarray(one["confusion_by_patient"], np.float64) for one in pair] for pair in pairs]
    nuclei = [one.sum(axis=-1) for pair in matrices for one in pair]
    if any(not np.array_equal(one, nuclei[0]) for one in nuclei):
        raise ValueError("the scores are of different nuclei: numbers per patient and class differ")
    both = np.array(matrices)  # [n, 2, P, C, C]
    of = FIGURES[figure]

    def difference(confusions: Confusions) -> NDArray[np.float64]:  # [n, 2, ..., C, C] -> [...]
        ours, theirs = of(confusions).mean(axis=0)
        return ours - theirs

    low, high = np.quantile(difference(_resampled(both)), (0.025, 0.975))
    return Difference(float(difference(both.sum(axis=2))), float(low), float(high))


def _resampled(by_patient: ArrayLike) -> Confusions:
    """``[..., P, C, C]`` -> ``[..., DRAWS, C, C]`` sums over drawn patients."""
    by_patient = np.asarray(by_patient, np.float64)
    return np.einsum("dp,...pij->...dij", _times_drawn(by_patient.shape[-3]), by_patient, optimize=True)


@lru_cache(maxsize=2)
def _times_drawn(patients: int) -> NDArray[np.float64]:
    """``[DRAWS, patients]`` how often each patient is in each draw."""
    drawn = np.random.default_rng(0).integers(patients, size=(DRAWS, patients))
    return np.stack([np.bincount(row, minlength=patients) for row in drawn]).astype(np.float64)
