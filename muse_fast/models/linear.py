"""The linear layers of a transformer layer, with fewer passes and launches than `torch.nn.Linear` under autocast.

Biases get their gradients where the gradients of the layers' outputs are written. Summing such a gradient over its rows
costs a pass over it. The operation after a layer writes it in its backward, so it can sum at the same time:
`muse_fast.ops.gelu`, `muse_fast.ops.add_layer_norm` and `muse_fast.models.attention.attend` take a ``bias`` for this.

All weights are cast together, and their gradients back together, where autocast casts tensor by tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(NamedTuple):
    """``x W^T + b``, of which only ``x`` and ``W`` get a gradient."""

    weight: Tensor  # [o, i], in the dtype of autocast
    added: Tensor  # [o], so is the bias here, without a gradient
    bias: Tensor  # [o], the parameter, for the operation that follows

    def __call__(self, x: Tensor) -> Tensor:  # [M, i] -> [M, o]
        return F.linear(x, self.weight, self.added)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the result in its tanh form, ``h / 2 (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3)))``.

        It has no gradient. On a GPU it costs no pass: cuBLASLt computes it from the float32 sums, which it then rounds.
        """
        return torch._addmm_activation(self.added, x, self.weight.t(), use_gelu=True)


def linears(*layers: nn.Linear) -> list[Linear]:
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    added = [bias.detach() for bias in biases]
    device = weights[0].device.type
    # FSDP gathers weights in the dtype of autocast.
    if torch.is_autocast_enabled(device) and weights[0].dtype == torch.float32:
        dtype, tensors = torch.get_autocast_dtype(device), [*weights, *added]
        # A compiler joins the casts itself. Autocast would not cast for the product with GELU on a GPU.
        compiling = torch.compiler.is_compiling()
        cast = [tensor.to(dtype) for tensor in tensors] if compiling else _Cast.apply(dtype, *tensors)
        weights, added = cast[: len(layers)], cast[len(layers) :]
    return [Linear(*one) for one in zip(weights, added, biases, strict=True)]


class _Cast(torch.autograd.Function):
    """Casts tensors by one launch, and their gradients by another."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = _cast(tensors, dtype)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(copy for copy, need in zip(copies, needed, strict=True) if not need))
        return copies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([gradient for gradient in gradients if gradient is not None], torch.float32))
        return None, *(None if gradient is None else next(cast) for gradient in gradients)


def _cast(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(copies, tensors)
    return copies
