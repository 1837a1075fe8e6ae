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
    branch_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Add a branch to the residual stream and normalise the sum over its columns.

    .. math:: t = x + s \, b, \qquad n = \frac{t - \mathrm{mean}(t)}{\sqrt{\mathrm{var}(t) + \epsilon}} \, w + \beta

    (Ba et al. 2016, with the biased variance.) The sum has the dtype that torch gives ``x + branch * scale``: a float32
    stream stays float32 even if branches are bfloat16. The norm is cast to the dtype of autocast where that is enabled,
    as the linear layer after it does, and else has the dtype of the sum. Arithmetic is float32 (float64 for float64).

    ``triton`` reads and writes every matrix once, forward and backward; ``reference`` takes four passes.

    Args:
        x: ``[M, C]`` floating point; C at most 4096 for ``triton``.
        branch: ``[M, C]`` floating point, or None to normalise x itself.
        scale: ``[M, 1]``, the factor of each row of the branch (stochastic depth), or None for 1. It has no gradient.
        weight, bias: ``[C]``.
        eps: epsilon.
        branch_bias: ``[C]``, the bias of the linear layer that made the branch, already added there without a gradient,
            or None. Its values are not used; it gets its gradient here, the column sums of that of the branch, as
            ``triton`` has these in registers when it writes the gradient of the branch.
        backend: ``reference`` or ``triton`` to force one.

    Returns:
        ``(t, n)``, both ``[M, C]``; without a branch, t is ``x``. Both carry gradients to all inputs but ``scale``.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    _check(x, branch, scale, weight, bias, branch_bias)
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    chosen = backends.choose("add_layer_norm", x.device.type, backend, dtype)
    if chosen == "triton":
        from muse_fast.kernels.fused.add_layer_norm import add_layer_norm as fused  # needs triton

        to = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        return fused(x, branch, scale, weight, bias, eps, to, branch_bias)
    return reference.add_layer_norm(x, branch, scale, weight, bias, eps, branch_bias)


def _check(
    x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None
) -> None:
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
    if branch_bias is not None and (branch is None or branch_bias.shape != weight.shape):
        given = "without a branch" if branch is None else f"got {tuple(branch_bias.shape)}"
        raise ValueError(
            f"add_layer_norm: branch_bias must be [C] = {tuple(weight.shape)} and belongs to a branch; {given}"
        )
    tensors = {"x": x, "branch": branch, "scale": scale, "weight": weight, "bias": bias, "branch_bias": branch_bias}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"add_layer_norm: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"add_layer_norm: x is on {x.device}, {name} on {tensor.device}")
