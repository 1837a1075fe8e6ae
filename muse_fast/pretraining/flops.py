"""Useful FLOPs of a training step in closed form, two per multiply-add: what MFU is measured by.

Convolutions, linear layers, prototypes and attention count. What a backend computes twice, activations or logits,
counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from muse_fast.config import HeadConfig, PretrainConfig
from muse_fast.models import resnet
from muse_fast.models.backbone import VIT_DIMS_AND_HEADS
from muse_fast.models.vit import DEPTH, PATCH

_RESNET50_BLOCKS = (3, 4, 6, 3)


def step_flops(config: PretrainConfig, rows_per_roi: tuple[float, float]) -> float:
    """FLOPs per ROI of one step: student forward and backward over all views, teacher forward over the globals.

    A backward counts as two forwards, as is usual. As the images take no gradient, that is up to 0.2 % too many.

    Args:
        rows_per_roi: nuclei per ROI that the heads are fed, on average: the student's (in all views) and the
            teacher's (in the globals).
    """
    views, arch = config.views, config.model.arch
    globals_ = views.num_globals * view_flops(arch, views.global_size)
    locals_ = views.num_locals * view_flops(arch, views.local_size)
    image_dim, dense_dim = _feature_dims(arch)
    per_image, per_nucleus = head_flops(image_dim, config.head), head_flops(dense_dim, config.head)
    student_rows, teacher_rows = rows_per_roi

    student = globals_ + locals_ + (views.num_globals + views.num_locals) * per_image + student_rows * per_nucleus
    teacher = globals_ + views.num_globals * per_image + teacher_rows * per_nucleus
    return 3 * student + teacher


def view_flops(arch: str, size: int) -> int:
    """FLOPs of one forward of encoder, decoder and 1x1 projections over an image of ``size`` pixels."""
    level_dim = _feature_dims(arch)[1] // 4
    if arch == "resnet50":
        return _resnet50(size) + _decoder(resnet.WIDTHS, _resnet_sides(size), level_dim)
    dim, grid = _feature_dims(arch)[0], size // PATCH
    widths, sides = (dim // 4, dim // 2, dim, 2 * dim), (4 * grid, 2 * grid, grid, grid // 2)
    pyramid = sum(_conv(grid, dim, width) for width in widths)
    return _vit(dim, grid) + pyramid + _decoder(widths, sides, level_dim)


def head_flops(in_dim: int, head: HeadConfig) -> int:
    """FLOPs of one forward of a head over one row, its logits included."""
    widths = (in_dim, head.hidden_dim, head.hidden_dim, head.bottleneck_dim, head.prototypes)
    return sum(_conv(1, a, b) for a, b in pairwise(widths))


def _feature_dims(arch: str) -> tuple[int, int]:
    """Widths of the image feature and of a nucleus row."""
    if arch == "resnet50":
        return resnet.WIDTHS[3], resnet.WIDTHS[3] // 2
    return VIT_DIMS_AND_HEADS[arch][0], VIT_DIMS_AND_HEADS[arch][0]


def _conv(side: int, in_channels: int, out_channels: int, kernel: int = 1) -> int:
    """A convolution that gives ``side * side`` positions; a linear layer over a row where both are 1."""
    return 2 * side**2 * in_channels * out_channels * kernel**2


def _vit(dim: int, grid: int) -> int:
    tokens = grid**2 + 1
    linear = 2 * tokens * 12 * dim**2  # qkv 3, output 1, MLP 4 + 4
    attention = 2 * 2 * tokens**2 * dim  # scores, and the mean of the values
    return _conv(grid, 3, dim, PATCH) + DEPTH * (linear + attention)


def _resnet_sides(size: int) -> list[int]:
    return [-(-size // stride) for stride in (4, 8, 16, 32)]


def _resnet50(size: int) -> int:
    total, in_channels, in_side = _conv(size // 2, 3, 64, 7), 64, size // 4
    for width, side, blocks in zip(resnet.WIDTHS, _resnet_sides(size), _RESNET50_BLOCKS, strict=True):
        inner = width // 4
        total += _conv(in_side, in_channels, inner) + _conv(side, in_channels, width)  # first block, its shortcut
        total += (blocks - 1) * _conv(side, width, inner)
        total += blocks * (_conv(side, inner, inner, 3) + _conv(side, inner, width))
        in_channels, in_side = width, side
    return total


def _decoder(widths: Sequence[int], sides: Sequence[int], level_dim: int) -> int:
    # An up block mixes the joined maps of two levels at the finer width, with two more convolutions behind.
    ups = sum(
        _conv(side, coarse + 3 * fine, fine, 3) for side, (fine, coarse) in zip(sides, pairwise(widths), strict=False)
    )
    return ups + sum(_conv(side, width, level_dim) for side, width in zip(sides, widths, strict=True))
