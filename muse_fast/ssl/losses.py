"""The two losses of MUSE (equations 3, 6 and 7), both a centred-softmax cross-entropy over pairs of rows.

A loss is pure: it reads a centre and returns values. Where the centre comes from is :mod:`muse_fast.ssl.centering`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from muse_fast import ops
from muse_fast.batch import Pairs


def image_pairs(num_rois: int, num_globals: int, num_views: int) -> Pairs:
    """Rows of CLS features to compare: every teacher global g with every student view v != g of the same ROI.

    ``G * (V - 1) * B`` pairs, rows in view-major order.
    """
    teacher, student, roi = torch.meshgrid(
        torch.arange(num_globals),
        torch.arange(num_views),
        torch.arange(num_rois),
        indexing="ij",
    )
    other = teacher != student
    return Pairs(
        teacher=teacher[other] * num_rois + roi[other],
        student=student[other] * num_rois + roi[other],
    )


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    pairs: Pairs,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Mean over ``pairs`` of ``-sum_k softmax((t - c) / tt)_k log softmax(s / ts)_k``, a float32 scalar.

    Without any pair it is a zero that still carries a (zero) gradient, so a batch without nuclei trains the rest.

    Args:
        student_logits: ``[Ns, K]``.
        teacher_logits: ``[Nt, K]``, not differentiated.
        center: ``[K]`` float32.
    """
    per_pair = ops.dino_loss(
        student_logits, teacher_logits, center, pairs.teacher, pairs.student, student_temp, teacher_temp
    )
    return per_pair.sum() / max(1, per_pair.numel())


@torch.no_grad()
def assignment_entropy(logits: Tensor, center: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """Entropy (nats) of the mean assignment, and mean entropy of a row's assignment.

    A collapse to one prototype takes the first to 0; a collapse to the uniform answer takes the second to ln K.

    Args:
        logits: ``[N, K]``, N may be 0 (both are then nan).
        center: ``[K]``, subtracted first; zeros for the student.
    """
    p = torch.softmax((logits.float() - center) / temp, dim=1)
    return torch.special.entr(p.mean(dim=0)).sum(), torch.special.entr(p).sum(dim=1).mean()
