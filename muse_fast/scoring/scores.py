"""Scores of nucleus detection and classification: predicted points against true ones, by a named protocol.

On the same points, the choice of protocol changes F1 by ten points or more, so a number means little without the name
of its protocol. `evaluate_all` computes all of them; `muse_fast.scoring.protocols` describes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from muse_fast.errors import UserError, require
from muse_fast.images.points import Points
from muse_fast.runtime.progress_bar import ShowProgress
from muse_fast.scoring.pairing import TooManyPointsError
from muse_fast.scoring.protocols import PROTOCOLS, Counts, Figures, Protocol, find_protocol

__all__ = ["Interval", "Score", "Scores", "evaluate", "evaluate_all", "figures_table", "scores_table"]

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Score:
    """Scores of one class, or of detection. Counts are sums over images; other values are in [0, 1]."""

    tp: int
    fp: int  # hovernet: a prediction paired with a nucleus of another class counts twice
    fn: int  # hovernet: a nucleus paired with a prediction of another class counts twice
    precision: float
    recall: float
    f1: float
    f1_ci95: Interval | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of predictions by one protocol."""

    protocol: str
    radius_um: float
    images: int
    classes: tuple[Score, ...]
    mean_f1: float
    mean_f1_ci95: Interval | None
    detection: Score  # ignores classes


def evaluate(
    predictions: Sequence[Points],
    truths: Sequence[Points],
    mpp: float | Sequence[float],
    num_classes: int,
    protocol: str = "ocelot",
    radius_um: float | None = None,
    *,
    draws: int = 0,
    seed: int = 0,
) -> Scores:
    """Score the points of a set of images.

    Args:
        predictions: per image; predictions without scores count as equally confident, in their order.
        truths: per image, in the same order of images; scores are ignored.
        mpp: um per pixel, one value for all images or one per image.
        num_classes: labels are 0 to ``num_classes - 1``. Without classes: 1, and all labels 0.
        protocol: a name in `muse_fast.scoring.protocols`.
        radius_um: maximal distance of a pair; None uses the protocol's own.
        draws: bootstrap samples for the intervals of F1; 0 computes no intervals. Images are drawn with replacement,
            and the interval is from the 2.5th to the 97.5th percentile. Points are paired only once.
        seed: seeds those draws, which are the same for every protocol.

    Raises:
        UserError: no such protocol, no images, sequences of different lengths, an array of the wrong shape, a label
            out of range, a non-finite coordinate, a NaN score, or a radius or mpp that is not above 0.
        TooManyPointsError: an image is too large for ``hovernet``.
    """
    chosen = find_protocol(protocol)
    _check(predictions, truths, num_classes, radius_um)
    return _evaluate(chosen, predictions, truths, _scales(mpp, len(truths)), num_classes, radius_um, draws, seed)


def evaluate_all(
    predictions: Sequence[Points],
    truths: Sequence[Points],
    mpp: float | Sequence[float],
    num_classes: int,
    radius_um: float | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    progress: ShowProgress | None = None,
) -> tuple[dict[str, Scores], dict[str, str]]:
    """`evaluate` by every protocol; return scores by name, and reasons by name of skipped protocols."""
    _check(predictions, truths, num_classes, radius_um)
    scales = _scales(mpp, len(truths))
    scores, skipped = {}, {}
    for done, (name, chosen) in enumerate(PROTOCOLS.items(), start=1):
        try:
            scores[name] = _evaluate(chosen, predictions, truths, scales, num_classes, radius_um, draws, seed)
        except TooManyPointsError as error:
            skipped[name] = str(error)
        if progress is not None:
            progress(done, len(PROTOCOLS), "protocols")
    return scores, skipped


def _evaluate(
    protocol: Protocol,
    predictions: Sequence[Points],
    truths: Sequence[Points],
    scales: Sequence[float],
    num_classes: int,
    radius_um: float | None,
    draws: int,
    seed: int,
) -> Scores:
    images = zip(predictions, truths, (protocol.radius(mpp, radius_um) for mpp in scales), strict=True)
    counts = np.stack([protocol.count(*image, num_classes) for image in images])  # [images, classes + 1, 3]
    once = np.ones((1, len(counts)), np.int64)
    (figures,), (mean_f1,) = _figures(protocol, counts, once)
    intervals: list[Interval | None] = [None] * len(figures)
    mean_interval = None
    if draws:
        drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=draws)
        sampled, sampled_means = _figures(protocol, counts, drawn)
        intervals = [_interval(f1) for f1 in sampled[..., 2].T]
        mean_interval = _interval(sampled_means)
    *classes, detection = (
        Score(int(tp), int(fp), int(fn), float(precision), float(recall), float(f1), interval)
        for (tp, fp, fn), (precision, recall, f1), interval in zip(counts.sum(axis=0), figures, intervals, strict=True)
    )
    radius = protocol.radius_um if radius_um is None else radius_um
    return Scores(protocol.name, radius, len(counts), tuple(classes), float(mean_f1), mean_interval, detection)


def _figures(protocol: Protocol, counts: Counts, weights: NDArray[np.int64]) -> tuple[Figures, NDArray[np.float64]]:
    """Figures ``[draws, classes + 1, 3]`` and mean F1 ``[draws]`` of images, each counted ``weights`` times.

    ``counts`` is ``[images, classes + 1, 3]``, ``weights`` is ``[draws, images]``.
    """
    sums = np.tensordot(weights, counts, axes=1)
    if protocol.per_file:
        figures = np.tensordot(weights, protocol.figures(counts), axes=1) / len(counts)
    else:
        figures = protocol.figures(sums)
    occurs = protocol.occurs(sums[:, :-1])
    f1 = np.where(occurs, figures[:, :-1, 2], 0.0)
    return figures, f1.sum(axis=1) / np.maximum(occurs.sum(axis=1), 1)


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------------------- checks


def _scales(mpp: float | Sequence[float], images: int) -> Sequence[float]:
    scales = [float(mpp)] * images if isinstance(mpp, (int, float)) else [float(one) for one in mpp]
    if len(scales) != images:
        raise UserError(f"{len(scales)} values of mpp for {images} images; pass one per image, or one for all")
    for scale in scales:
        require(0 < scale < np.inf, "mpp", scale, "um per pixel above 0, such as 0.5")
    return scales


def _check(predictions: Sequence[Points], truths: Sequence[Points], num_classes: int, radius_um: float | None) -> None:
    if len(predictions) != len(truths) or not len(truths):
        raise UserError(
            f"predictions for {len(predictions)} images, truth for {len(truths)}; expected the same number, at least 1"
        )
    require(num_classes >= 1, "num_classes", num_classes, "1 or more")
    require(radius_um is None or 0 < radius_um < np.inf, "radius_um", radius_um, "um above 0, such as 3")
    for what, images in (("predictions", predictions), ("truth", truths)):
        for i, points in enumerate(images):
            _check_points(points, num_classes, f"{what} of image {i}")


def _check_points(points: Points, num_classes: int, where: str) -> None:
    count = len(points.xy)
    if points.xy.shape != (count, 2) or not np.isfinite(points.xy).all():
        raise UserError(f"{where}: xy is {list(points.xy.shape)}; expected [n, 2] finite pixels")
    label = points.classes()
    integers = label.shape == (count,) and np.issubdtype(label.dtype, np.integer)
    if not integers or (count and not 0 <= label.min() <= label.max() < num_classes):
        raise UserError(f"{where}: labels must be [{count}] whole numbers from 0 to {num_classes - 1}")
    if points.score is not None and (points.score.shape != (count,) or np.isnan(points.score).any()):
        raise UserError(f"{where}: scores must be [{count}] numbers, not NaN")


# -------------------------------------------------------------------------------------------------------------- table


def scores_table(scores: Mapping[str, Scores], class_names: Sequence[str]) -> Table:
    """Table of F1 in percent, protocols as rows and classes as columns, with intervals if computed.

    Without ``class_names``, only detection is shown.
    """
    intervals = any(one.mean_f1_ci95 for one in scores.values())
    table = Table(title="F1, %, with 95 % intervals over images" if intervals else "F1, %")
    table.add_column("protocol")
    for column in ("radius, um", *class_names, *(["mean"] if class_names else []), "detection"):
        table.add_column(column, justify="right")
    for name, one in scores.items():
        shown = [(score.f1, score.f1_ci95) for score in one.classes] + [(one.mean_f1, one.mean_f1_ci95)]
        shown = (shown if class_names else []) + [(one.detection.f1, one.detection.f1_ci95)]
        table.add_row(name, f"{one.radius_um:g}", *(_cell(*f1) for f1 in shown))
    return table


def figures_table(scores: Scores, class_names: Sequence[str]) -> Table:
    """Table of counts, precision, recall and F1 of one protocol, classes as rows."""
    table = Table(title=f"{scores.protocol}, {scores.radius_um:g} um")
    table.add_column("class")
    for column in ("TP", "FP", "FN", "precision, %", "recall, %", "F1, %"):
        table.add_column(column, justify="right")
    rows = [*zip(class_names, scores.classes, strict=True)] if class_names else []
    for name, one in [*rows, ("detection", scores.detection)]:
        shares = (f"{100 * share:.2f}" for share in (one.precision, one.recall, one.f1))
        table.add_row(name, str(one.tp), str(one.fp), str(one.fn), *shares)
    return table


def _cell(f1: float, interval: Interval | None) -> str:
    return f"{100 * f1:.2f}" + (f" ({100 * interval[0]:.1f} .. {100 * interval[1]:.1f})" if interval else "")
