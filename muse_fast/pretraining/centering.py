"""Centring, which keeps the teacher from collapsing to one answer.

Both kinds are a vector ``c`` with targets ``softmax((t - c) / temp)``, so the loss has one form:

- ``ema``: a running mean of the teacher's logits (DINO, equation 4 there).
- ``sinkhorn``: from the current batch. Sinkhorn-Knopp alternately scales the columns and rows of ``exp(t / temp)``.
  Rows are scaled last, so the result is a softmax over ``t / temp + log v``, where only the column scale ``v`` depends
  on the batch: ``c = -temp * log v`` (SwAV, DINOv2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muse_fast.kernels.sinkhorn import log_scales
from muse_fast.runtime.distributed import gather_over_ranks, sum_over_ranks

SINKHORN_ITERATIONS = 3


@torch.no_grad()
def sinkhorn_center(logits: Tensor, temp: float, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """Return the centre ``[K]`` with which the rows of ``logits`` ``[N, K]`` of all ranks use all prototypes evenly.

    Everything is in the log domain, so nothing overflows at any temperature. N may differ between ranks; without any
    rows the centre is zero. The result is float32 (float64 for float64) and the same on every rank. Columns are summed
    over ranks by gathering the logarithms of their sums, because an all-reduce would first need their maximum.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temp
    rows = sum_over_ranks(scores.new_full((), logits.shape[0]))
    log_share = torch.log(rows / logits.shape[1])  # the sum of each column when all are used evenly
    _, column_scale = log_scales(scores, iterations, _logsumexp_over_ranks, log_share=log_share)
    return torch.where(rows > 0, -temp * column_scale, 0)


def _logsumexp_over_ranks(values: Tensor) -> Tensor:
    return torch.logsumexp(gather_over_ranks(values), dim=0)


@torch.no_grad()
def update_centers(
    centers: Sequence[Tensor],
    feature_sums: Tensor,
    counts: Tensor,
    prototypes: Sequence[Tensor],
    momentum: float,
    found_inf: Tensor,
) -> None:
    """Move the centre ``[K]`` of each head towards its mean teacher logit, in place.

    The mean logit is the mean feature times the prototypes, one matrix-vector product, so ranks only need to sum
    features.

    Args:
        feature_sums: ``[heads, d]``, sums of the teacher's bottleneck rows over all ranks.
        counts: ``[heads]``, numbers of rows; 0 leaves a centre as it is.
        prototypes: ``[K, d]`` of each head.
        found_inf: 0-dim; 1 also leaves the centres as they are.
    """
    moves = (counts > 0) & (found_inf == 0)
    means = feature_sums / counts.clamp(min=1).unsqueeze(1)
    for center, mean, of_head, head_moves in zip(centers, means, prototypes, moves, strict=True):
        target = of_head @ mean.to(of_head.dtype)
        center.lerp_(torch.where(head_moves, target, center), 1 - momentum)
