"""Mean and variance of a 1x1 convolution without its output (the statistics of the BatchNorm after it)."""

from __future__ import annotations

import torch
from torch import Tensor

from muse_fast.kernels.blocked.projection_stats import projection_stats as blocked
from muse_fast.ops import backends, reference


def projection_stats(x: Tensor, weight: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    r"""Compute the mean and biased variance of ``conv2d(x, weight)`` per output channel, over all images and pixels.

    .. math:: y_p = W x_p, \qquad \mu = \tfrac1M \sum_p y_p, \qquad \sigma^2 = \tfrac1M \sum_p (y_p - \mu)^2

    The fast backends store none of the ``M = I * h * w`` projections, neither forward nor backward. Under autocast both
    arguments are cast to its dtype, as in a convolution; sums are float32 (float64 for float64).

    Args:
        x: ``[I, c, h, w]`` floating point, NCHW or channels-last, with at least one position.
        weight: ``[o, c]`` in the dtype of ``x``.
        backend: ``reference``, ``blocked`` or ``triton`` to force one; ``triton`` passes more than 256 outputs on to
            ``blocked``.

    Returns:
        ``(mean [o], var [o])``, float32 (float64 for float64); both carry gradients to ``x`` and ``weight``.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    _check(x, weight)
    chosen = backends.choose("projection_stats", x.device.type, backend, x.dtype)
    if chosen == "triton":
        from muse_fast.kernels.fused.projection_stats import projection_stats as fused  # needs triton

        return fused(x, weight)
    if chosen == "blocked":
        return blocked(x, weight)
    return reference.projection_stats(x, weight)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"projection_stats: expected x [I, c, h, w] and weight [o, c], got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not x.dtype.is_floating_point or x.dtype != weight.dtype:
        raise ValueError(
            f"projection_stats: x and weight must have the same floating point dtype, got {x.dtype} and {weight.dtype}"
        )
    if x.device != weight.device:
        raise ValueError(f"projection_stats: x is on {x.device}, weight on {weight.device}")
    if x.numel() == 0 or weight.numel() == 0:
        raise ValueError(
            f"projection_stats: x and weight must not be empty, got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
