"""Named protocols for scoring nucleus detection, each as in its published code.

| name | radius | pairs | figures |
|---|---|---|---|
| ``ocelot`` | <= 3 um (15 px at 0.2) | per class, by confidence | of sums over images, rounded to 4 decimals |
| ``mcspatnet`` | < 6 px at 20x (about 3 um) | per class, true points row by row | of sums |
| ``promptnucseg`` | <= 3 um (12 px at 0.25) | per class, by confidence | of sums |
| ``puma`` | < 3.75 um (15 px at 0.25) | per class, true points in their order | means over files, of seen classes |
| ``hovernet`` | <= 3 um (12 px at 0.25) | any class, least total distance | of sums, see below |
| ``max-matching`` | <= 3 um (each data set's own there) | per class, as many as possible | of sums |

Detection ignores classes. ``ocelot`` and ``puma`` do not publish such a figure; here it is their rule with all points
in one class. ``hovernet`` (also used by CellViT) finds pairs once. A pair of different classes is then a false positive
of one class and a false negative of the other, and each counts twice: ``F1 = 2 TP / (2 TP + FP + FN)`` with those
weights in FP and FN.

A figure of 0 / 0 is set to 0, or to 1 for ``mcspatnet``, as in the published code (``hovernet`` and ``max-matching``
return NaN there). The mean of F1 is over all classes; for ``puma`` over those that occur in any file, true or
predicted; for ``hovernet`` over those that occur in the truth.

Not reproduced:

- ``mcspatnet``: an image without predictions of a class adds its missed nuclei six times, because two nested loops run
  over the radii from 1 to 6 px; here they count once. Points are rounded to pixels there, which merges those in one.
- ``hovernet``: a placeholder at the origin for images without nuclei.
- ``ocelot``, ``promptnucseg``: float32 distances and figures.

The 6 px of ``mcspatnet`` are pixels, not um: 6 for every image whose um/px is closest to that of 20x (0.5), 12 at 40x,
3 at 10x. PUMA's scores were computed on ROIs at 40x; if these have 0.23 um/px, its 15 px are 3.45 um.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError, did_you_mean
from muse_fast.images.points import Points
from muse_fast.scoring.pairing import (
    Pairs,
    Rule,
    as_many_as_possible,
    by_confidence,
    by_raster,
    by_total_distance,
    by_truth,
    find_candidates,
)

Counts = NDArray[np.int64]
"""``[..., 3]``: true positives, false positives and false negatives, with the protocol's weights."""

Figures = NDArray[np.float64]
"""``[..., 3]``: precision, recall and F1."""

MPP_AT_20X = 0.5


@dataclass(frozen=True, slots=True)
class Protocol:
    """How points are counted, and how figures are computed from the counts."""

    name: str
    radius_um: float
    """Maximal distance of a pair."""
    count: Callable[[Points, Points, float, int], Counts]
    """Predictions and truth of one image, radius in pixels, number of classes -> ``[classes + 1, 3]``; the last row is
    detection."""
    figures: Callable[[NDArray[Any]], Figures]
    """Counts ``[..., 3]`` -> figures ``[..., 3]``."""
    per_file: bool = False
    """Average figures over images instead of computing them from summed counts."""
    occurs: Callable[[NDArray[Any]], NDArray[np.bool_]] = lambda counts: np.ones(counts.shape[:-1], bool)
    """Which classes are included in the mean F1, from their counts ``[..., 3]`` over all images."""
    pixels_at_20x: float | None = None
    """For a radius in pixels, not um: that of an image at 20x; half as many at 10x, twice as many at 40x."""

    def radius(self, mpp: float, radius_um: float | None = None) -> float:
        """Radius in pixels of an image at ``mpp`` um per pixel, by default the protocol's own."""
        if radius_um is None and self.pixels_at_20x is not None:
            return self.pixels_at_20x * 2.0 ** round(math.log2(MPP_AT_20X / mpp))
        # Rounded, so that 3 um at 0.2 um/px are exactly 15 px.
        return round((self.radius_um if radius_um is None else radius_um) / mpp, 9)


def find_protocol(name: str) -> Protocol:
    """Look up a protocol by name; the UserError for an unknown name suggests the closest one."""
    if name not in PROTOCOLS:
        raise UserError(f"no protocol '{name}' among {', '.join(PROTOCOLS)}{did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]


# ----------------------------------------------------------------------------------------------------------- counting


def _per_class(
    predictions: Points, truths: Points, radius: float, num_classes: int, *, rule: Rule, strict: bool
) -> Counts:
    """Count pairs within each class, and for detection pairs of any class."""
    near = find_candidates(predictions, truths, radius, strict)
    # Points of different classes share no candidates, so one call equals one call per class.
    alike = near.take(predictions.classes()[near.prediction] == truths.classes()[near.truth])
    pairs = rule(alike, predictions, truths)
    detected = rule(near, Points(predictions.xy, score=predictions.score), Points(truths.xy))
    tp = np.bincount(truths.classes()[pairs[:, 1]], minlength=num_classes)
    return _counts(
        tp, _sizes(predictions, num_classes) - tp, _sizes(truths, num_classes) - tp, detected, predictions, truths
    )


def _class_by_class(predictions: Points, truths: Points, radius: float, num_classes: int) -> Counts:
    """Count the pairs `by_raster` of each class by itself, and for detection those of all points."""
    tp = np.zeros(num_classes, np.int64)
    for number in range(num_classes):
        predicted, true = (points.take(points.classes() == number) for points in (predictions, truths))
        tp[number] = len(by_raster(predicted, true, radius))
    fp, fn = (_sizes(points, num_classes) - tp for points in (predictions, truths))
    return _counts(tp, fp, fn, by_raster(predictions, truths, radius), predictions, truths)


def _positions_first(predictions: Points, truths: Points, radius: float, num_classes: int) -> Counts:
    """Count pairs of any class; a pair of different classes counts twice against both."""
    pairs = by_total_distance(predictions, truths, radius)
    predicted, true = predictions.classes()[pairs[:, 0]], truths.classes()[pairs[:, 1]]
    tp = np.bincount(true[predicted == true], minlength=num_classes)
    confused_as = np.bincount(predicted[predicted != true], minlength=num_classes)
    confused = np.bincount(true[predicted != true], minlength=num_classes)
    fp = _sizes(predictions, num_classes) - tp + confused_as
    fn = _sizes(truths, num_classes) - tp + confused
    return _counts(tp, fp, fn, pairs, predictions, truths)


def _counts(
    tp: NDArray[Any], fp: NDArray[Any], fn: NDArray[Any], detected: Pairs, predictions: Points, truths: Points
) -> Counts:
    hits = len(detected)
    detection = np.array([[hits, len(predictions.xy) - hits, len(truths.xy) - hits]])
    return np.concatenate([np.stack([tp, fp, fn], axis=1), detection])


def _sizes(points: Points, num_classes: int) -> NDArray[np.int64]:
    return np.bincount(points.classes(), minlength=num_classes)


# ------------------------------------------------------------------------------------------------------------ figures


def _harmonic(counts: NDArray[Any], *, epsilon: float = 0.0, undefined: float = 0.0) -> Figures:
    """F1 as the harmonic mean of precision and recall; these are ``undefined`` if 0 / 0."""
    tp, fp, fn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    precision = _divide(tp, tp + fp + epsilon, undefined)
    recall = _divide(tp, tp + fn + epsilon, undefined)
    f1 = _divide(2 * precision * recall, precision + recall + epsilon, 0.0)
    return np.stack([precision, recall, f1], axis=-1)


def _rounded(counts: NDArray[Any]) -> Figures:
    """`_harmonic` rounded to 4 decimals by Python's exact rounding."""
    figures = _harmonic(counts, epsilon=1e-7)
    return np.array([round(value, 4) for value in figures.ravel().tolist()]).reshape(figures.shape)


def _weighted(counts: NDArray[Any]) -> Figures:
    tp, fp, fn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    figures = _divide(tp, tp + fp, 0.0), _divide(tp, tp + fn, 0.0), _divide(2 * tp, 2 * tp + fp + fn, 0.0)
    return np.stack(figures, axis=-1)


def _divide(a: NDArray[Any], b: NDArray[Any], undefined: float) -> NDArray[np.float64]:
    return np.divide(a, b, out=np.full_like(b, undefined), where=b > 0)


PROTOCOLS = {
    one.name: one
    for one in (
        Protocol("ocelot", 3.0, partial(_per_class, rule=by_confidence, strict=False), _rounded),
        Protocol(
            "mcspatnet",
            3.0,
            _class_by_class,
            partial(_harmonic, undefined=1.0),
            pixels_at_20x=6,
        ),
        Protocol(
            "promptnucseg",
            3.0,
            partial(_per_class, rule=by_confidence, strict=False),
            partial(_harmonic, epsilon=1e-7),
        ),
        Protocol(
            "puma",
            3.75,
            partial(_per_class, rule=by_truth, strict=True),
            _harmonic,
            per_file=True,
            occurs=lambda counts: counts.sum(axis=-1) > 0,
        ),
        Protocol(
            "hovernet", 3.0, _positions_first, _weighted, occurs=lambda counts: counts[..., 0] + counts[..., 2] > 0
        ),
        Protocol("max-matching", 3.0, partial(_per_class, rule=as_many_as_possible, strict=False), _harmonic),
    )
}
