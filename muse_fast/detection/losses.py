"""The losses of fine-tuning (paper, equation 9) and the weight of the third.

They are sums over rows of proposals from any images, 0 with zero gradients without rows. Each comes with the sum of its
rows' weights, because the mean is over the rows of all ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast.runtime.kept import kept

UNKNOWN = -1
"""Target of a proposal whose class is unknown; the loss ignores it."""


class Sum(NamedTuple):
    """A sum over rows and that of their weights, both ``[]``."""

    total: Tensor
    weight: Tensor


def mean(total: Tensor, weight: Tensor) -> Tensor:
    """``total / weight`` of any shape; 0 where both are 0."""
    return total / weight.clamp_min(torch.finfo(total.dtype).tiny)


def regression_loss(points: Tensor, nuclei: Tensor) -> Sum:
    """Squared distance between matched predictions and nuclei, both ``[M, 2]``, in pixels squared."""
    return Sum((points - nuclei).square().sum(), points.new_full((), len(points)))


def distance(points: Tensor, nuclei: Tensor) -> Sum:
    """Distance of ``points`` from ``nuclei``, both ``[M, 2]``, in pixels.

    Of matched predictions and of their proposals on the same nuclei, it says what the offsets are worth.
    """
    return Sum((points - nuclei).norm(dim=1).sum(), points.new_full((), len(points)))


def type_loss(logits: Tensor, target: Tensor, background_weight: float) -> Sum:
    """Weighted cross-entropy: weight ``background_weight`` for background, 1 for other classes.

    Args:
        logits: ``[M, C + 1]``, background last.
        target: ``[M]`` int64, ``UNKNOWN`` for rows to ignore.
    """
    weight = _class_weights(logits.shape[1], background_weight, logits.dtype, logits.device)
    total = F.cross_entropy(logits, target, weight, ignore_index=UNKNOWN, reduction="sum")
    return Sum(total, torch.where(target == UNKNOWN, 0, weight[target]).sum())


@kept
def _class_weights(classes: int, background_weight: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([*[1.0] * (classes - 1), background_weight], dtype=dtype, device=device)


def pseudo_labels(logits: Tensor, threshold: float) -> Tensor:
    """Most probable class ``[M]`` of each row, including background; ``UNKNOWN`` unless above ``threshold``."""
    confidence, label = logits.softmax(dim=1).max(dim=1)
    return torch.where(confidence > threshold, label, UNKNOWN)


def consistency_weight(epoch: int, epochs: int, maximum: float) -> float:
    """Weight of the consistency loss: ``1 - cos(pi * epoch / epochs)`` of the paper, scaled to end at ``maximum``."""
    return maximum * (1 - math.cos(math.pi * epoch / epochs)) / 2
