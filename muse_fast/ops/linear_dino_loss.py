"""The cross-entropy of DINO over pairs of rows, from bottleneck features and prototypes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from muse_fast.kernels.arguments import LinearDinoLoss
from muse_fast.kernels.blocked import linear_dino_loss as blocked
from muse_fast.ops import backends, reference


def linear_dino_loss(
    student_z: Tensor,
    student_W: Tensor,
    teacher_z: Tensor,
    teacher_W: Tensor,
    center: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
    *,
    backend: str | None = None,
) -> Tensor:
    r""":func:`muse_fast.ops.dino_loss` of the logits ``z @ W.T``.

    .. math:: \ell_p = \log \sum_k \exp(W_k \cdot s_i / \tau_s) - s_i \cdot m_j / \tau_s, \qquad
              m_j = \sum_k \mathrm{softmax}\big((V t_j - c) / \tau_t\big)_k W_k

    with students s, W, teachers t, V and ``(j, i) = (teacher_rows_p, student_rows_p)``.

    Memory, in addition to the gradients: ``reference`` stores logits and softmaxes, several ``[N, K]`` and ``[P, K]``;
    ``blocked`` and ``triton`` store a few ``[N, d]`` and ``[P, d]``, and ``blocked`` 4 MB of logits (128 MB on a GPU).
    The price is that both compute the logits twice: ``8 K d`` operations per row, where ``reference`` needs ``6 K d``
    for a student's row and ``2 K d`` for a teacher's.

    Under autocast, z and W are cast to its dtype, as in ``torch.nn.functional.linear``; the centre is not.
    ``reference`` rounds its logits to the dtype of the features; the others keep them in float32.

    Args:
        student_z: ``[Ns, d]`` floating point, usually L2-normalised.
        student_W: ``[K, d]`` prototypes, K at least 1.
        teacher_z: ``[Nt, d]``.
        teacher_W: ``[K, d]``.
        center: ``[K]``.
        teacher_rows, student_rows: ``[P]`` int64, valid rows of the two (not checked on CUDA). A pair with a negative
            row is padding: its loss is 0 and it has no gradient.
        student_temp, teacher_temp: temperatures, above 0.
        backend: ``reference``, ``blocked`` or ``triton`` to force one; ``triton`` rejects float64, and passes features
            wider than 256 on to ``blocked``.

    Returns:
        ``[P]`` float32 (float64 for float64 students), not reduced. The gradient flows to ``student_z`` and
        ``student_W``.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run. On the CPU, rows out of range
            raise IndexError.
    """
    features = (student_z, student_W, teacher_z, teacher_W)
    arguments = LinearDinoLoss(*features, center, teacher_rows, student_rows, student_temp, teacher_temp)
    arguments.check()
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in features])
    chosen = backends.choose("linear_dino_loss", student_z.device.type, backend, dtype)
    if chosen == "triton":
        from muse_fast.kernels.fused.linear_dino_loss import linear_dino_loss as fused  # needs triton

        return fused(arguments)
    if chosen == "blocked":
        return blocked.linear_dino_loss(arguments)
    return reference.linear_dino_loss(*arguments)
