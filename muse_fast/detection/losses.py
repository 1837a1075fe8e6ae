"""The losses of fine-tuning (paper, equation 9) and the weight of the third.

They accept rows of proposals from any images, and are 0 with zero gradients without rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

UNKNOWN = -1
"""Target of a proposal whose class is unknown; the loss ignores it."""


def regression_loss(points: Tensor, nuclei: Tensor) -> Tensor:
    """Mean squared distance between matched predictions and nuclei, both ``[M, 2]``, in pixels squared."""
    return (points - nuclei).square().sum() / max(1, len(points))


def mean_distance(points: Tensor, nuclei: Tensor) -> Tensor:
    """Mean distance of ``points`` from ``nuclei``, both ``[M, 2]``, in pixels; 0 without any.

    Of matched predictions and of their proposals on the same nuclei, it says what the offsets are worth.
    """
    return (points - nuclei).norm(dim=1).sum() / max(1, len(points))


def type_loss(logits: Tensor, target: Tensor, background_weight: float) -> Tensor:
    """Weighted mean ``[]`` of the cross-entropy: weight ``background_weight`` for background, 1 for other classes.

    Args:
        logits: ``[M, C + 1]``, background last.
        target: ``[M]`` int64, ``UNKNOWN`` for rows to ignore.
    """
    weight = logits.new_ones(logits.shape[1])
    weight[-1] = background_weight
    total = F.cross_entropy(logits, target, weight, ignore_index=UNKNOWN, reduction="sum")
    total_weight = torch.where(target == UNKNOWN, 0, weight[target]).sum()
    return total / total_weight.clamp_min(torch.finfo(logits.dtype).tiny)


def pseudo_labels(logits: Tensor, threshold: float) -> Tensor:
    """Most probable class ``[M]`` of each row, including background; ``UNKNOWN`` unless above ``threshold``."""
    confidence, label = logits.softmax(dim=1).max(dim=1)
    return torch.where(confidence > threshold, label, UNKNOWN)


def consistency_weight(epoch: int, epochs: int, maximum: float) -> float:
    """Weight of the consistency loss: ``1 - cos(pi * epoch / epochs)`` of the paper, scaled to end at ``maximum``."""
    return maximum * (1 - math.cos(math.pi * epoch / epochs)) / 2
