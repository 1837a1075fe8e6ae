"""Self-attention over packed tokens: images of several resolutions in one matrix, each attending only to itself.

sdpa      one call of torch's scaled_dot_product_attention per resolution; runs everywhere
xformers  one call for all images, with a block-diagonal mask
varlen    one call for all images, with torch's variable-length flash attention
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast import ops
from muse_fast.runtime.kept import kept

_OF_VARLEN = (torch.bfloat16, torch.float16)

Layout = tuple[tuple[int, int], ...]
"""Number of images and tokens per image, for each resolution; rows are ordered by image, then by token."""


def attend(qkv: Tensor, heads: int, layout: Layout, backend: str, bias: Tensor | None = None) -> Tensor:
    """Softmax attention within each image.

    Args:
        qkv: ``[M, 3 * C]``, queries, keys and values of M packed tokens, each C wide with the heads side by side.
        backend: one of ``config.ATTENTION`` for which `why_not` returns None.
        bias: ``[3 * C]``, already added to ``qkv`` without a gradient, which it gets here (`muse_fast.models.linear`).

    Returns:
        ``[M, C]``.
    """
    # Evaluations of a run in 16 bits are in float32, which varlen does not take.
    if backend == "sdpa" or (backend == "varlen" and qkv.dtype not in _OF_VARLEN):
        parts = _Parts.apply(qkv, bias, heads, layout)
        groups = [_attend_sdpa(*parts[first : first + 3]) for first in range(0, len(parts), 3)]
        return torch.cat(groups) if len(groups) > 1 else groups[0]
    q, k, v = _Parts.apply(qkv, bias, heads, ((1, len(qkv)),))  # [1, M, heads, C / heads]
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        mask = _block_diagonal(layout, qkv.device)
        return memory_efficient_attention(q, k, v, attn_bias=mask).squeeze(0).flatten(1)
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = _bounds(layout, qkv.device), max(tokens for _, tokens in layout)
    # Unlike that of q[0], the backward of a squeeze is a view.
    attended = varlen_attn(q.squeeze(0), k.squeeze(0), v.squeeze(0), bounds, bounds, longest, longest)
    assert isinstance(attended, Tensor)  # a tuple only if more outputs are requested
    return attended.flatten(1)


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run in ``dtype`` on ``device``, or None if it can."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"it runs only on CUDA GPUs, and the run is on {device.type}"
    if backend == "varlen":
        if dtype not in _OF_VARLEN:
            return f"it supports only bf16 and fp16, and the run uses {dtype}: set train.precision=bf16"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs a GPU of compute capability 8.0 or more"
    module = "xformers.ops" if backend == "xformers" else "torch.nn.attention.varlen"
    try:
        __import__(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    if dtype == torch.float64:
        return "it does not support fp64"
    return _failure(backend, device, dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
@torch.enable_grad()
def _failure(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a small example fails, or None: a package may be importable but built for another torch or another GPU."""
    qkv = torch.zeros(8, 3 * 64, device=device, dtype=dtype, requires_grad=True)
    try:
        attend(qkv, 1, ((2, 3), (1, 2)), backend).sum().backward()
    except Exception as error:
        return f"a small example fails ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return None


class _Parts(torch.autograd.Function):
    """Queries, keys and values of each resolution in turn, ``[images, tokens, heads, C / heads]``: views of ``qkv``.

    The backward writes their gradients into one matrix, and sums it for the bias. That of torch's splits would copy
    each twice, into a stack of three and into the matrix of all resolutions, and the sums would read them once more.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, heads: int, layout: Layout) -> tuple[Tensor, ...]:
        ctx.dtype = None if bias is None else bias.dtype
        whole = qkv.unflatten(1, (3, heads, -1)).split([images * tokens for images, tokens in layout])
        return tuple(x for part, shape in zip(whole, layout, strict=True) for x in part.unflatten(0, shape).unbind(2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        gradient, sums = ops.join_heads(grads, with_sums=ctx.dtype is not None)
        return gradient, None if sums is None else sums.to(ctx.dtype), None, None


def _attend_sdpa(*parts: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in parts)  # [images, heads, tokens, C / heads]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)


@kept
def _block_diagonal(layout: Layout, device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(_lengths(layout), device=device)


@kept
def _bounds(layout: Layout, device: torch.device) -> Tensor:
    """First row of every image, and the end: ``[images + 1]`` int32."""
    return torch.tensor([0, *accumulate(_lengths(layout))], dtype=torch.int32, device=device)


def _lengths(layout: Layout) -> list[int]:
    return list(chain.from_iterable(repeat(tokens, images) for images, tokens in layout))
