"""Useful FLOPs of a training step in closed form, two per multiply-add, for MFU.

Convolutions, linear layers, prototypes and attention count. Recomputed activations and logits count once.
"""

from __future__ import annotations

from itertools import pairwise

from muse_fast.config import HeadConfig, PretrainConfig
from muse_fast.models.archs import find_arch
from muse_fast.models.decoder import decoder_flops
from muse_fast.models.encoder import conv_flops


def step_flops(config: PretrainConfig, rows_per_roi: tuple[float, float]) -> float:
    """Return the FLOPs per ROI of a step: student forward and backward over all views, teacher forward over globals.

    A backward counts as two forwards, as usual. Images need no gradient, so this is up to 0.2 % too high.

    Args:
        rows_per_roi: mean number of nuclei per ROI that enter the heads: of the student (in all views) and of the
            teacher (in the globals).
    """
    views, name = config.views, config.model.arch
    globals_ = views.num_globals * view_flops(name, views.global_size)
    locals_ = views.num_locals * view_flops(name, views.local_size)
    arch = find_arch(name)
    per_image, per_nucleus = head_flops(arch.image_dim, config.head), head_flops(arch.dense_dim, config.head)
    student_rows, teacher_rows = rows_per_roi

    student = globals_ + locals_ + (views.num_globals + views.num_locals) * per_image + student_rows * per_nucleus
    teacher = globals_ + views.num_globals * per_image + teacher_rows * per_nucleus
    return 3 * student + teacher


def view_flops(name: str, size: int) -> int:
    """Return the FLOPs of one forward of encoder, decoder and 1x1 projections over an image of ``size`` pixels."""
    arch = find_arch(name)
    return arch.flops(size) + decoder_flops(arch.widths, arch.strides, size)


def head_flops(in_dim: int, head: HeadConfig) -> int:
    """Return the FLOPs of one forward of a head over one row, including its logits."""
    widths = (in_dim, head.hidden_dim, head.hidden_dim, head.bottleneck_dim, head.prototypes)
    return sum(conv_flops(1, a, b) for a, b in pairwise(widths))
