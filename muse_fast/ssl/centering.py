"""Centring: what keeps the teacher from answering always the same.

Both kinds come down to a vector ``c`` with targets ``softmax((t - c) / temp)``, so the loss has one form:

- ``ema``: a running mean of the teacher's logits (DINO, equation 4 there).
- ``sinkhorn``: of the batch at hand. Sinkhorn-Knopp scales rows and columns of ``exp(t / temp)`` in turn; with rows
  scaled last, the result is a softmax over ``t / temp + log v`` whose column scale ``v`` is all that the batch adds:
  ``c = -temp * log v`` (SwAV, DINOv2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SINKHORN_ITERATIONS = 3


@torch.no_grad()
def sinkhorn_center(logits: Tensor, temp: float, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """The centre ``[K]`` (float32) under which the rows of ``logits`` ``[N, K]`` use all prototypes evenly.

    In the log domain throughout, hence free of overflow at any temperature. No rows give a centre of zeros.
    """
    rows, prototypes = logits.shape
    if rows == 0:
        return torch.zeros(prototypes, device=logits.device)
    scores = logits.float() / temp
    row_scale = torch.zeros(rows, 1, device=logits.device)
    log_share = math.log(rows / prototypes)  # what each column sums to when the use is even
    column_scale = torch.zeros(1, prototypes, device=logits.device)
    for _ in range(iterations):
        column_scale = log_share - torch.logsumexp(scores + row_scale, dim=0, keepdim=True)
        row_scale = -torch.logsumexp(scores + column_scale, dim=1, keepdim=True)
    return (-temp * column_scale).squeeze(0)


@torch.no_grad()
def update_center(center: Tensor, features: Tensor, prototypes: Tensor, momentum: float) -> None:
    """Move ``center`` ``[K]`` towards the mean teacher logit, in place.

    The mean logit is the mean feature times the prototypes, one matrix-vector product.

    Args:
        features: teacher bottleneck rows ``[N, d]``; N = 0 leaves the centre as it is.
        prototypes: ``[K, d]``.
    """
    if features.shape[0]:
        center.lerp_(prototypes.float() @ features.float().mean(dim=0), 1 - momentum)
