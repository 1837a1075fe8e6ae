"""Mean and variance of a 1x1 convolution in plain PyTorch, a block of positions at a time; its output is never stored.

With y_p = W x_p at each of M positions, and a, b the gradients of mean and variance,

    mean = 1/M sum_p y_p                    var = 1/M sum_p (y_p - mean)^2
    dy_p = (a + 2 b (y_p - mean)) / M       dx_p = W^T dy_p       dW = sum_p dy_p x_p^T

where the backward recomputes y. Squares are summed around the mean of their own block, and blocks are merged by the
rule of Chan, Golub and LeVeque (1979), so that a mean far larger than the deviation does not cost digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..namespace import NAMESPACE
from ..registration import dense, register_projection_stats

BLOCK = 4096  # positions; a block of 96 float32 channels is 1.5 MB


def projection_stats(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance ``[o]`` of ``weight @ x`` over all images and pixels, in at least float32.

    Args:
        x: ``[I, c, h, w]`` floating point, with at least one position.
        weight: ``[o, c]`` in the dtype of ``x``.
    """
    return projection_stats_fwd(x, weight)


@torch.library.custom_op(f"{NAMESPACE}::blocked_projection_stats_fwd", mutates_args=())
def projection_stats_fwd(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    precision = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(precision).contiguous()
    mean = var = weight.new_zeros(weight.shape[0], dtype=torch.float64)
    count = 0
    with torch.autocast(x.device.type, enabled=False):  # it would also apply inside the op and round y
        for block in blocks(positions_of(dense(x))):
            y = block.flatten(0, 1).to(precision) @ weight.T
            center = y.mean(0)
            block_mean = center.double() + y.sub_(center).mean(0)  # the second term corrects the rounding of the first
            block_var = y.square_().mean(0).double()
            count += len(y)
            share, shift = len(y) / count, block_mean - mean
            mean = mean + share * shift
            var = torch.lerp(var, block_var, share) + share * (1 - share) * shift.square()
    return mean.to(precision), var.to(precision)


@torch.library.custom_op(f"{NAMESPACE}::blocked_projection_stats_bwd", mutates_args=())
def projection_stats_bwd(
    mean_gradient: Tensor, var_gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x``, in its layout, and of ``weight``."""
    x = dense(x)
    x_gradient = torch.empty_like(x)
    weight_gradient = torch.zeros(weight.shape, dtype=mean.dtype, device=weight.device)
    exact_weight = weight.to(mean.dtype).contiguous()
    num_positions = x.numel() // x.shape[1]
    offset, slope = mean_gradient / num_positions, 2 * var_gradient / num_positions
    with torch.autocast(x.device.type, enabled=False):
        for block, block_gradient in zip(blocks(positions_of(x)), blocks(positions_of(x_gradient)), strict=True):
            rows = block.flatten(0, 1).to(mean.dtype)
            y_gradient = (rows @ exact_weight.T).sub_(mean).mul_(slope).add_(offset)
            block_gradient.copy_((y_gradient @ exact_weight).view_as(block_gradient))
            weight_gradient.addmm_(y_gradient.T, rows)
    return x_gradient, weight_gradient.to(weight.dtype)


register_projection_stats(projection_stats_fwd, projection_stats_bwd)


def positions_of(x: Tensor) -> Tensor:
    """View a dense ``[I, c, h, w]`` as ``[images, positions, c]``; channels-last memory is one long image."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(1, -1, x.shape[1])
    return x.flatten(2).transpose(1, 2)


def blocks(positions: Tensor) -> Iterator[Tensor]:
    """Split ``[images, positions, c]`` into pieces of at most BLOCK positions: parts of an image, or several images."""
    for images in positions.split(max(1, BLOCK // positions.shape[1])):
        yield from images.split(BLOCK, dim=1)
