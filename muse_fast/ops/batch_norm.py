"""BatchNorm in training, residual addition and ReLU, as in the blocks of a convolutional network."""

from __future__ import annotations

import torch
from torch import Tensor

from muse_fast.ops import backends, reference


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Normalise by the statistics of the batch, add a residual, and apply ReLU.

    .. math:: y = \mathrm{relu}\Big(\frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \epsilon}} \, w + \beta + r\Big)

    (Ioffe and Szegedy 2015, with the biased variance, per channel over all images and pixels.) Running statistics are
    updated in place as by torch's BatchNorm, with the unbiased variance. Arithmetic is float32 (float64 for float64).

    ``triton`` reads the maps twice and writes them once, forward and backward, and stores nothing else of their size;
    its sums are deterministic. ``reference`` takes a pass for each step, and rounds after each.

    Args:
        x: ``[N, C]`` or ``[N, C, h, w]`` floating point, with at least two values per channel.
        residual: as x, or None.
        weight, bias: ``[C]``, or both None.
        running_mean, running_var: ``[C]``, without gradient, changed in place; or both None, as then num_batches is.
        num_batches: 0-dim int64, incremented in place.
        momentum: share of this batch in the running statistics.
        eps: epsilon.
        relu: whether negative values become 0.
        backend: ``reference`` or ``triton`` to force one.

    Returns:
        As x, in the dtype that torch gives the sum. It carries gradients to ``x``, ``residual``, ``weight`` and
        ``bias``.

    Raises:
        ValueError: wrong shape, dtype or device, fewer than two values, or a forced backend that cannot run.
    """
    tensors = {"residual": residual, "weight": weight, "bias": bias}
    running = {"running_mean": running_mean, "running_var": running_var, "num_batches": num_batches}
    _check(x, tensors, running)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    arguments = x, residual, weight, bias, running_mean, running_var, num_batches, momentum, eps, relu
    if backends.choose("batch_norm", x.device.type, backend, dtype) == "triton":
        from muse_fast.kernels.fused.batch_norm import batch_norm as fused  # needs triton

        return fused(*arguments)
    return reference.batch_norm(*arguments)


def _check(x: Tensor, tensors: dict[str, Tensor | None], running: dict[str, Tensor | None]) -> None:
    if x.dim() not in (2, 4) or not x.dtype.is_floating_point:
        raise ValueError(f"batch_norm: expected x [N, C] or [N, C, h, w] floating point, got {_kind(x)}")
    if x.numel() < 2 * x.shape[1] or x.shape[1] == 0:
        raise ValueError(f"batch_norm: expected at least two values per channel, got {_kind(x)}")
    if len({tensor is None for tensor in (tensors["weight"], tensors["bias"])}) > 1:
        raise ValueError("batch_norm: give both weight and bias, or None for both")
    if len({tensor is None for tensor in running.values()}) > 1:
        raise ValueError(f"batch_norm: give {', '.join(running)}, or None for all")
    for name, tensor in (tensors | running).items():
        if tensor is None:
            continue
        shape = {"residual": x.shape, "num_batches": ()}.get(name, (x.shape[1],))
        whole = name == "num_batches"
        if tensor.shape != shape or (tensor.dtype != torch.int64 if whole else not tensor.dtype.is_floating_point):
            dtype = "int64" if whole else "floating point"
            raise ValueError(f"batch_norm: {name} must be {list(shape)} {dtype}, got {_kind(tensor)}")
        if tensor.device != x.device:
            raise ValueError(f"batch_norm: x is on {x.device}, {name} on {tensor.device}")


def _kind(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype}"
