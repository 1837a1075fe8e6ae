"""The arguments of the ops and their checks; every error is a ValueError that names the op and the argument."""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor


class DinoLoss(NamedTuple):
    """The arguments of ``dino_loss``, in order."""

    student_logits: Tensor  # [Ns, K]
    teacher_logits: Tensor  # [Nt, K]
    center: Tensor  # [K]
    teacher_rows: Tensor  # [P] int64
    student_rows: Tensor  # [P] int64
    student_temp: float
    teacher_temp: float

    def check(self) -> None:
        student, teacher, center, *pairs = self
        if student.dim() != 2 or teacher.dim() != 2 or center.dim() != 1:
            raise ValueError(
                "dino_loss: expected student_logits [Ns, K], teacher_logits [Nt, K], center [K], got "
                f"{tuple(student.shape)}, {tuple(teacher.shape)}, {tuple(center.shape)}"
            )
        if not student.shape[1] == teacher.shape[1] == center.shape[0] > 0:
            raise ValueError(
                "dino_loss: expected the same number of prototypes, at least 1; the student has "
                f"{student.shape[1]}, the teacher {teacher.shape[1]}, the centre {center.shape[0]}"
            )
        check_pairs("dino_loss", (student, teacher, center), *pairs)


class LinearDinoLoss(NamedTuple):
    """The arguments of ``linear_dino_loss``, in order."""

    student_z: Tensor  # [Ns, d]
    student_W: Tensor  # [K, d]
    teacher_z: Tensor  # [Nt, d]
    teacher_W: Tensor  # [K, d]
    center: Tensor  # [K]
    teacher_rows: Tensor  # [P] int64
    student_rows: Tensor  # [P] int64
    student_temp: float
    teacher_temp: float

    def check(self) -> None:
        student_z, student_W, teacher_z, teacher_W, center, *pairs = self
        for who, z, weight in (("student", student_z, student_W), ("teacher", teacher_z, teacher_W)):
            if z.dim() != 2 or weight.dim() != 2 or z.shape[1] != weight.shape[1]:
                raise ValueError(
                    f"linear_dino_loss: expected {who}_z [N, d] and {who}_W [K, d], "
                    f"got {tuple(z.shape)} and {tuple(weight.shape)}"
                )
        if center.dim() != 1 or not student_W.shape[0] == teacher_W.shape[0] == center.shape[0] > 0:
            raise ValueError(
                "linear_dino_loss: expected the same number of prototypes, at least 1; the student has "
                f"{student_W.shape[0]}, the teacher {teacher_W.shape[0]}, the centre {tuple(center.shape)}"
            )
        check_pairs("linear_dino_loss", self[:5], *pairs)


def schema(arguments: type[tuple[Any, ...]]) -> str:
    """Return the fields in the syntax of torch.library: ``Tensor student_z, ..., float teacher_temp``."""
    return ", ".join(f"{kind.__name__} {name}" for name, kind in get_type_hints(arguments).items())


def check_soft_cross_entropy(student_logits: Tensor, target: Tensor, temp: float) -> None:
    if student_logits.shape != target.shape or student_logits.dim() == 0 or student_logits.shape[-1] == 0:
        raise ValueError(
            "soft_cross_entropy: expected student_logits [..., K] and target [..., K] with K >= 1, got "
            f"{tuple(student_logits.shape)} and {tuple(target.shape)}"
        )
    if not (student_logits.is_floating_point() and target.is_floating_point()):
        raise ValueError(
            "soft_cross_entropy: student_logits and target must be floating point, got "
            f"{student_logits.dtype} and {target.dtype}"
        )
    check_one_device("soft_cross_entropy", (student_logits, target))
    if temp <= 0:
        raise ValueError(f"soft_cross_entropy: temp must be positive, got {temp}")


def check_pairs(
    op: str,
    tensors: tuple[Tensor, ...],
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> None:
    """Check the pairs, temperatures and devices of the two losses over pairs."""
    if teacher_rows.dtype != torch.int64 or student_rows.dtype != torch.int64:
        raise ValueError(
            f"{op}: teacher_rows and student_rows must be int64, got {teacher_rows.dtype} and {student_rows.dtype}"
        )
    if teacher_rows.dim() != 1 or teacher_rows.shape != student_rows.shape:
        raise ValueError(
            f"{op}: teacher_rows and student_rows must be [P], got "
            f"{tuple(teacher_rows.shape)} and {tuple(student_rows.shape)}"
        )
    check_one_device(op, (*tensors, teacher_rows, student_rows))
    if student_temp <= 0 or teacher_temp <= 0:
        raise ValueError(f"{op}: temperatures must be positive, got {student_temp} and {teacher_temp}")


def check_temperature(op: str, name: str, temp: float) -> None:
    """Reject what cannot be a temperature of DINO, above all an epoch."""
    if not 0 < temp <= 1:
        raise ValueError(
            f"{op}: {name} must be above 0 and at most 1, got {temp}; where DINO's own loss takes the epoch, pass the "
            "teacher's temperature in that epoch"
        )


def check_one_device(op: str, tensors: tuple[Tensor, ...]) -> None:
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {', '.join(sorted(devices))}")
