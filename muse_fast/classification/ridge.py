"""Ridge regression on the classes: a linear probe in closed form, without a learning rate or a seed.

It minimises, over weights W and an intercept b that is not penalised,

    1/N sum_i s_i |y_i - W x_i - b|^2 + lambda |W|^2

with one-hot classes y_i and features x_i standardised by the nuclei it is trained on (Hoerl and Kennard, 1970). The
plain probe has s_i = 1. The balanced one weights all C classes equally: s_i = N / (C n_c) for a class of n_c nuclei.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast.classification.metrics import Scores, score
from muse_fast.classification.splits import Pair, Splits
from muse_fast.errors import UserError

LAMBDAS = tuple(10.0**power for power in range(-5, 2))
LEAST_LAMBDA = 1e-8  # far above the rounding of the normal equations in float64


@dataclass(frozen=True, slots=True)
class RidgeResult:
    """Scores of a ridge probe and how lambda was chosen."""

    held_out: dict[float, Scores]  # by lambda: on val, or on all folds
    test: Scores
    chosen: float  # lambda


def ridge_probe(splits: Splits, num_classes: int, *, balanced: bool, lambdas: Sequence[float] = LAMBDAS) -> RidgeResult:
    """Choose lambda on val or on folds, by accuracy or by balanced accuracy, and score that probe on test.

    Of equally good values the largest is chosen. The scores' class probabilities are the outputs ``W x + b``: they sum
    to 1 but may leave 0..1, and metrics use only their order.

    Raises:
        UserError: features are not finite.
    """
    by_trial = [predictions(pair, num_classes, lambdas, balanced=balanced) for pair in splits.trials()]
    outputs = (torch.cat(parts) for parts in zip(*by_trial, strict=True))
    truth = splits.held_out
    scores = {value: score(output, truth) for value, output in zip(lambdas, outputs, strict=True)}
    figure = "balanced_accuracy" if balanced else "accuracy"
    chosen = max(sorted(scores, reverse=True), key=lambda value: scores[value][figure])
    final = splits.final()
    (output,) = predictions(final, num_classes, [chosen], balanced=balanced)
    return RidgeResult(scores, score(output, final.other), chosen)


def predictions(pair: Pair, num_classes: int, lambdas: Sequence[float], *, balanced: bool) -> list[Tensor]:
    """Train on ``pair.train`` and return the outputs ``[N, C]`` float64 for ``pair.other``, for each lambda."""
    train, other = pair.standardised()
    fits = ridge(train.features, train.labels, num_classes, lambdas, balanced=balanced)
    features = other.features.double()
    return [features @ weight + intercept for weight, intercept in fits]


def ridge(
    features: Tensor, labels: Tensor, num_classes: int, lambdas: Sequence[float], *, balanced: bool
) -> list[tuple[Tensor, Tensor]]:
    """Solve the normal equations in float64 for each lambda.

    Args:
        features: ``[N, D]`` float.
        labels: ``[N]`` int64; classes without nuclei have no influence.
        lambdas: at least `LEAST_LAMBDA`.

    Returns:
        Weights ``[D, C]`` and intercept ``[C]`` for each lambda.

    Raises:
        UserError: features are not finite.
    """
    x, y = features.double(), F.one_hot(labels, num_classes).double()
    if not torch.isfinite(x).all():
        raise UserError("the network's features are not finite; check its weights")
    share = y.mean(0)  # of the nuclei, by class
    weight = 1 / (len(x) * (share > 0).sum() * share[labels]) if balanced else x.new_full((len(x),), 1 / len(x))
    x_mean, y_mean = weight @ x, weight @ y  # the weights sum to 1
    x, y = x - x_mean, y - y_mean
    weighted = (x * weight[:, None]).T
    gram, target = weighted @ x, weighted @ y
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solutions = [torch.cholesky_solve(target, torch.linalg.cholesky(gram + value * eye)) for value in lambdas]
    return [(found, y_mean - x_mean @ found) for found in solutions]
