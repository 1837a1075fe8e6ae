"""The cross-entropy of DINO over pairs of rows, from stored logits."""

from __future__ import annotations

import torch
from torch import Tensor

from muse_fast.kernels.arguments import DinoLoss
from muse_fast.kernels.registration import register_dino_loss
from muse_fast.ops import backends, reference


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Cross-entropy between the centred, sharpened teacher and the student, one value per pair.

    .. math:: \ell_p = -\sum_k \mathrm{softmax}\big((t_j - c) / \tau_t\big)_k \,
              \log \mathrm{softmax}\big(s_i / \tau_s\big)_k,  \qquad (j, i) = (teacher\_rows_p, student\_rows_p)

    (Caron et al. 2021, equation 2.) The values are not reduced: the caller divides by the number of pairs on all ranks.

    Memory, in addition to the logits and the gradient ``[Ns, K]``: ``reference`` stores both softmaxes and gathers them
    into pairs, ``2 [P, K] + 2 [Ns, K] + [Nt, K]`` in float32 and more in the backward; ``cpp`` and ``triton`` keep two
    numbers per row and, during the forward, five per pair and 2,048 prototypes. They read the logits in place if the
    columns are contiguous, and copy them otherwise.

    Args:
        student_logits: ``[Ns, K]`` floating point.
        teacher_logits: ``[Nt, K]`` floating point.
        center: ``[K]``.
        teacher_rows, student_rows: ``[P]`` int64, valid rows of the two (not checked on CUDA). A pair with a negative
            row is padding: its loss is 0 and it has no gradient.
        student_temp, teacher_temp: temperatures, above 0.
        backend: ``reference``, ``cpp`` or ``triton`` to force one; the last two compute in float32 and reject float64.

    Returns:
        ``[P]`` float32 (float64 for float64 students). The gradient flows only to ``student_logits``.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run. On the CPU, rows out of range
            raise IndexError (``reference``) or RuntimeError (``cpp``).
    """
    arguments = DinoLoss(student_logits, teacher_logits, center, teacher_rows, student_rows, student_temp, teacher_temp)
    arguments.check()
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    chosen = backends.choose("dino_loss", student_logits.device.type, backend, dtype)
    if chosen == "cpp":
        return torch.ops.muse_fast.dino_loss_fwd(*arguments)[0]
    if chosen == "triton":
        from muse_fast.kernels.fused.dino_loss import dino_loss_fwd  # needs triton

        return dino_loss_fwd(*arguments)[0]
    return reference.dino_loss(*arguments)


if backends.library_error() is None:
    register_dino_loss(torch.ops.muse_fast.dino_loss_fwd.default, torch.ops.muse_fast.dino_loss_bwd.default)
