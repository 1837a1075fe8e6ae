"""Residual addition and LayerNorm in one pass, as between the branches of a transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from muse_fast.ops import backends, reference


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Add a branch to the residual stream and normalise the sum over its columns.

    .. math:: t = x + s \, b, \qquad n = \frac{t - \mathrm{mean}(t)}{\sqrt{\mathrm{var}(t) + \epsilon}} \, w + \beta

    (Ba et al. 2016, with the biased variance.) The sum has the dtype that torch gives ``x + branch * scale``: a float32
    stream stays float32 even if branches are bfloat16. The norm is cast to the dtype of autocast where that is enabled,
    as the linear layer after it does, and else has the dtype of the sum. Arithmetic is float32 (float64 for float64).

    ``triton`` reads and writes every matrix once, forward and backward; ``reference`` takes four passes.

    Args:
        x: ``[M, C]`` floating point; C at most 8192 for ``triton``.
        branch: ``[M, C]`` floating point, or None to normalise x itself.
        scale: ``[M, 1]``, the factor of each row of the branch (stochastic depth), or None for 1. It has no gradient.
        weight, bias: ``[C]``.
        eps: epsilon.
        backend: ``reference`` or ``triton`` to force one.

    Returns:
        ``(t, n)``, both ``[M, C]``; without a branch, t is ``x``. Both carry gradients to ``x``, ``branch``, ``weight``
        and ``bias``.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    _check(x, branch, scale, weight, bias)
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    chosen = backends.choose("add_layer_norm", x.device.type, backend, dtype)
    if chosen == "triton":
        from muse_fast.kernels.fused.add_layer_norm import add_layer_norm as fused  # needs triton

        to = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        return fused(x, branch, scale, weight, bias, eps, to)
    return reference.add_layer_norm(x, branch, scale, weight, bias, eps)


def _check(x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 2 or not weight.shape == bias.shape == x.shape[1:]:
        raise ValueError(
            f"add_layer_norm: expected x [M, C], weight [C] and bias [C], got {tuple(x.shape)}, {tuple(weight.shape)} "
            f"and {tuple(bias.shape)}"
        )
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"add_layer_norm: branch must be {tuple(x.shape)} as x, got {tuple(branch.shape)}")
    if scale is not None and (branch is None or scale.shape != (x.shape[0], 1)):
        given = "without a branch" if branch is None else f"got {tuple(scale.shape)}"
        raise ValueError(f"add_layer_norm: scale must be [M, 1] = {(x.shape[0], 1)} and scales a branch; {given}")
    for name, tensor in (("x", x), ("branch", branch), ("scale", scale), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"add_layer_norm: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"add_layer_norm: x is on {x.device}, {name} on {tensor.device}")
