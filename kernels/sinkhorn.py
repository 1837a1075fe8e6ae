"""Sinkhorn-Knopp: targets that use all prototypes evenly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor,
    temp: float,
    n_iterations: int = 3,
    *,
    num_rows: int | Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Scale columns and rows of ``exp(logits / temp)`` in turn, until all columns have almost the same sum.

    .. math:: Q_{nk} \leftarrow Q_{nk} \Big/ \sum_n Q_{nk}, \qquad Q_{nk} \leftarrow Q_{nk} \Big/ \sum_k Q_{nk}

    (Caron et al. 2020, *Unsupervised Learning of Visual Features by Contrasting Cluster Assignments*, section 3.1; the
    factors 1/K and 1/N there cancel.) Columns are summed over all processes, which may have different numbers of rows.
    It computes with logarithms, so that no logit is too large for its exponential.

    Args:
        logits: ``[N, K]`` floating point, the teacher's.
        temp: the teacher's temperature, above 0.
        n_iterations: at least 1.
        num_rows: rows from this one on are padding: they do not change the others, and their result is 0. A tensor has
            one element; the host does not wait for it.
        group: the processes that take part; by default all, if ``torch.distributed`` is initialised.

    Returns:
        ``[N, K]`` float32 (float64 for float64 logits); each row sums to 1. No gradient.

    Raises:
        ValueError: wrong shape, temperature or number of iterations.
    """
    if logits.dim() != 2 or temp <= 0 or n_iterations < 1:
        raise ValueError(
            "sinkhorn_knopp: expected logits [N, K], a temperature above 0 and at least one iteration, got "
            f"{tuple(logits.shape)}, {temp} and {n_iterations}"
        )
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temp
    padding = None if num_rows is None else torch.arange(len(scores), device=scores.device).unsqueeze(1) >= num_rows
    over_ranks = partial(_logsumexp_over_ranks, group=group)
    row_scale, column_scale = log_scales(scores, n_iterations, over_ranks, padding=padding)
    targets = torch.exp(scores + column_scale + row_scale)
    return targets if padding is None else targets.masked_fill(padding, 0)


def log_scales(
    scores: Tensor,
    n_iterations: int,
    logsumexp_over_ranks: Callable[[Tensor], Tensor],
    *,
    log_share: float | Tensor = 0.0,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the factors of rows ``[N, 1]`` and columns ``[K]`` that `sinkhorn_knopp` applies.

    Args:
        scores: ``[N, K]``, logits over temperature.
        logsumexp_over_ranks: from ``[K]`` of each process to that of all.
        log_share: logarithm of the sum that columns are scaled to; rows are scaled to 1.
        padding: ``[N, 1]`` bool, rows that do not count.
    """
    row_scale = scores.new_zeros(len(scores), 1)
    column_scale = scores.new_zeros(scores.shape[1])
    for _ in range(n_iterations):
        counted = row_scale if padding is None else row_scale.masked_fill(padding, -torch.inf)
        column_scale = log_share - logsumexp_over_ranks(torch.logsumexp(scores + counted, dim=0))
        row_scale = -torch.logsumexp(scores + column_scale, dim=1, keepdim=True)
    return row_scale, column_scale


def _logsumexp_over_ranks(values: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    if not is_distributed():
        return values
    largest = values.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    total = torch.exp(values - largest)
    dist.all_reduce(total, group=group)
    return largest + total.log()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
