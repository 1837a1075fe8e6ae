"""Useful FLOPs of a training step in closed form, two per multiply-add, for MFU.

Convolutions, linear layers, prototypes and attention count. Recomputed activations and logits count once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from muse_fast.config import HeadConfig, PretrainConfig
from muse_fast.models.archs import find_arch
from muse_fast.models.decoder import decoder_flops, dense_dim
from muse_fast.models.encoder import conv_flops


def step_flops(config: PretrainConfig, rows_per_roi: tuple[float, float], train_encoder: bool = True) -> float:
    """Return the FLOPs per ROI of a step: student forward and backward over all views, teacher forward over globals.

    A backward counts as two forwards, as usual. Images need no gradient, so this is up to 0.2 % too high.

    Args:
        rows_per_roi: mean number of nuclei per ROI that enter the heads: of the student (in all views) and of the
            teacher (in the globals).
        train_encoder: whether the student's encoder is not frozen; otherwise it has no backward.
    """
    views, model = config.views, config.model
    arch = find_arch(model.arch, taps=model.taps)
    of_view = partial(view_flops, model.arch, decoder_dim=model.decoder_dim, taps=model.taps)
    globals_ = views.num_globals * of_view(views.global_size)
    locals_ = views.num_locals * of_view(views.local_size) if views.num_locals else 0
    per_image = head_flops(arch.image_dim, config.head)
    per_nucleus = head_flops(dense_dim(arch.widths, arch.strides, model.decoder_dim), config.head)
    student_rows, teacher_rows = rows_per_roi

    student = globals_ + locals_ + (views.num_globals + views.num_locals) * per_image + student_rows * per_nucleus
    teacher = globals_ + views.num_globals * per_image + teacher_rows * per_nucleus
    if train_encoder:
        return 3 * student + teacher
    encoder = views.num_globals * arch.flops(views.global_size)
    encoder += views.num_locals * arch.flops(views.local_size) if views.num_locals else 0
    return 3 * student - 2 * encoder + teacher


def view_flops(name: str, size: int, decoder_dim: int = 0, taps: Sequence[int] = ()) -> int:
    """Return the FLOPs of one forward of encoder, decoder and 1x1 projections over an image of ``size`` pixels."""
    arch = find_arch(name, taps=taps)
    return arch.flops(size) + decoder_flops(arch.widths, arch.strides, size, decoder_dim)


def head_flops(in_dim: int, head: HeadConfig) -> int:
    """Return the FLOPs of one forward of a head over one row, including its logits."""
    widths = (in_dim, head.hidden_dim, head.hidden_dim, head.bottleneck_dim, head.prototypes)
    return sum(conv_flops(1, a, b) for a, b in pairwise(widths))
