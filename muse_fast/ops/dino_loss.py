"""The cross-entropy of DINO over pairs of rows, from stored logits."""

from __future__ import annotations

import torch
from torch import Tensor

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

    (Caron et al. 2021, equation 2.) The values are not reduced: the caller divides by the pairs of all ranks.

    Args:
        student_logits: ``[Ns, K]`` floating point.
        teacher_logits: ``[Nt, K]`` floating point.
        center: ``[K]``.
        teacher_rows, student_rows: ``[P]`` int64, rows of the two, which must exist (not checked on CUDA).
        student_temp, teacher_temp: temperatures, above 0.
        backend: a name of ``backends.BACKENDS`` to force one.

    Returns:
        ``[P]`` float32 (float64 for float64 students). The gradient flows to ``student_logits`` alone.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    _check(student_logits, teacher_logits, center, teacher_rows, student_rows, student_temp, teacher_temp)
    arguments = (student_logits, teacher_logits, center, teacher_rows, student_rows, student_temp, teacher_temp)
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    if backends.choose("dino_loss", student_logits.device.type, backend, dtype) == "triton":
        from muse_fast.kernels import dino_loss as fused  # with its fake and autograd; needs triton

        return fused.dino_loss(*arguments)
    return reference.dino_loss(*arguments)


def _check(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> None:
    if student_logits.dim() != 2 or teacher_logits.dim() != 2 or center.dim() != 1:
        raise ValueError(
            "dino_loss: expected student_logits [Ns, K], teacher_logits [Nt, K], center [K], got "
            f"{tuple(student_logits.shape)}, {tuple(teacher_logits.shape)}, {tuple(center.shape)}"
        )
    if not student_logits.shape[1] == teacher_logits.shape[1] == center.shape[0]:
        raise ValueError(
            f"dino_loss: the student has {student_logits.shape[1]} prototypes, the teacher "
            f"{teacher_logits.shape[1]}, the centre {center.shape[0]}"
        )
    tensors = (student_logits, teacher_logits, center)
    check_pairs("dino_loss", tensors, teacher_rows, student_rows, student_temp, teacher_temp)


def check_pairs(
    op: str,
    tensors: tuple[Tensor, ...],
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> None:
    """What the two losses ask of their pairs, temperatures and devices."""
    if teacher_rows.dtype != torch.int64 or student_rows.dtype != torch.int64:
        raise ValueError(f"{op}: rows must be int64, got {teacher_rows.dtype} and {student_rows.dtype}")
    if teacher_rows.dim() != 1 or teacher_rows.shape != student_rows.shape:
        raise ValueError(
            f"{op}: teacher_rows and student_rows must be [P], got "
            f"{tuple(teacher_rows.shape)} and {tuple(student_rows.shape)}"
        )
    devices = {str(tensor.device) for tensor in (*tensors, teacher_rows, student_rows)}
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {', '.join(sorted(devices))}")
    if student_temp <= 0 or teacher_temp <= 0:
        raise ValueError(f"{op}: temperatures must be positive, got {student_temp} and {teacher_temp}")
