"""The cross-entropy of DINO over pairs of rows, from bottleneck features and prototypes."""

from __future__ import annotations

from torch import Tensor

from muse_fast.ops import backends, reference
from muse_fast.ops.dino_loss import check_pairs


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
    """:func:`muse_fast.ops.dino_loss` of the logits ``z @ W.T``.

    Args:
        student_z: ``[Ns, d]`` L2-normalised bottleneck features.
        student_W: ``[K, d]`` L2-normalised prototypes.
        teacher_z: ``[Nt, d]``.
        teacher_W: ``[K, d]``.
        center: ``[K]``.
        teacher_rows, student_rows: ``[P]`` int64, rows of the two.
        student_temp, teacher_temp: temperatures, above 0.
        backend: ``reference`` to force it.

    Returns:
        ``[P]`` float32 (float64 for float64 students). The gradient flows to ``student_z`` and ``student_W``.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    _check(student_z, student_W, teacher_z, teacher_W, center, teacher_rows, student_rows, student_temp, teacher_temp)
    backends.choose("linear_dino_loss", student_z.device.type, backend)
    return reference.linear_dino_loss(
        student_z, student_W, teacher_z, teacher_W, center, teacher_rows, student_rows, student_temp, teacher_temp
    )


def _check(
    student_z: Tensor,
    student_W: Tensor,
    teacher_z: Tensor,
    teacher_W: Tensor,
    center: Tensor,
    teacher_rows: Tensor,
    student_rows: Tensor,
    student_temp: float,
    teacher_temp: float,
) -> None:
    for who, z, weight in (("student", student_z, student_W), ("teacher", teacher_z, teacher_W)):
        if z.dim() != 2 or weight.dim() != 2 or z.shape[1] != weight.shape[1]:
            raise ValueError(
                f"linear_dino_loss: expected {who}_z [N, d] and {who}_W [K, d], "
                f"got {tuple(z.shape)} and {tuple(weight.shape)}"
            )
    if center.dim() != 1 or not student_W.shape[0] == teacher_W.shape[0] == center.shape[0]:
        raise ValueError(
            f"linear_dino_loss: the student has {student_W.shape[0]} prototypes, the teacher {teacher_W.shape[0]}, "
            f"the centre {tuple(center.shape)}"
        )
    tensors = (student_z, student_W, teacher_z, teacher_W, center)
    check_pairs("linear_dino_loss", tensors, teacher_rows, student_rows, student_temp, teacher_temp)
