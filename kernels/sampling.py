"""The fakes and the autograd of ``sample_nuclei_fwd`` and ``sample_nuclei_bwd``, the same for Triton and C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def register_sample_nuclei(forward: Any, backward: Any) -> None:
    """Registers the fakes of both ops, and the backward one as the gradient of the forward one.

    Args:
        forward: ``(levels, xy, image_index, view_size) -> rows``.
        backward: ``(gradient, xy, image_index, view_size, num_images, shapes, channels_last) -> gradients``, see
            :func:`empty_gradients`.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        levels, xy, image_index, ctx.view_size = inputs
        ctx.save_for_backward(xy, image_index)
        shapes = [size for level in levels for size in level.shape[1:]]
        channels_last = all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)
        ctx.layout = levels[0].shape[0], shapes, channels_last

    def gradients(ctx: Any, gradient: Tensor) -> tuple[list[Tensor], None, None, None]:
        return backward(gradient, *ctx.saved_tensors, ctx.view_size, *ctx.layout), None, None, None

    torch.library.register_fake(forward, empty_rows)
    torch.library.register_fake(backward, empty_gradients)
    torch.library.register_autograd(forward, gradients, setup_context=setup_context)


def empty_rows(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    return levels[0].new_empty(xy.shape[0], sum(level.shape[1] for level in levels))


def empty_gradients(
    gradient: Tensor,
    xy: Tensor,
    image_index: Tensor,
    view_size: int,
    num_images: int,
    shapes: Sequence[int],
    channels_last: bool,
) -> list[Tensor]:
    """One ``[num_images, c, h, w]`` per level, contiguous or channels-last; ``shapes`` is c_0, h_0, w_0, c_1, ..."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.empty(
            (num_images, *shapes[first : first + 3]),
            dtype=gradient.dtype,
            device=gradient.device,
            memory_format=memory_format,
        )
        for first in range(0, len(shapes), 3)
    ]
