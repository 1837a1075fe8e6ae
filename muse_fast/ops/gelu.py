"""GELU after a linear layer, whose bias gets its gradient in the same pass."""

from __future__ import annotations

from torch import Tensor

from muse_fast.ops import backends, reference


def gelu(hidden: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    r"""The Gaussian error linear unit (Hendrycks & Gimpel, 2016).

    .. math:: y = h \, \Phi(h), \qquad \Phi(h) = \tfrac{1}{2} \left(1 + \mathrm{erf}(h / \sqrt{2})\right)

    ``triton`` reads both inputs of the backward once and writes the gradient of ``hidden`` once; its column sums, the
    gradient of ``bias``, come from registers. ``reference`` reads it again for these.

    Args:
        hidden: ``[M, C]`` floating point, the output of a linear layer.
        bias: ``[C]``, the layer's bias, already added there without a gradient. Its values are not used.
        backend: ``reference`` or ``triton`` to force one.

    Returns:
        ``[M, C]`` in the dtype of ``hidden``. It carries gradients to both.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    _check(hidden, bias)
    if backends.choose("gelu", hidden.device.type, backend, hidden.dtype) == "triton":
        from muse_fast.kernels.fused.gelu import gelu as fused  # needs triton

        return fused(hidden, bias)
    return reference.gelu(hidden, bias)


def _check(hidden: Tensor, bias: Tensor) -> None:
    if hidden.dim() != 2 or bias.shape != hidden.shape[1:]:
        raise ValueError(
            f"gelu: expected hidden [M, C] and bias [C], got {tuple(hidden.shape)} and {tuple(bias.shape)}"
        )
    if not (hidden.dtype.is_floating_point and bias.dtype.is_floating_point):
        raise ValueError(f"gelu: hidden and bias must be floating point, got {hidden.dtype} and {bias.dtype}")
    if hidden.device != bias.device:
        raise ValueError(f"gelu: hidden is on {hidden.device}, bias on {bias.device}")
