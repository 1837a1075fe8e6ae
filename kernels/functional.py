"""The losses as functions: Triton where it can run, plain PyTorch everywhere else.

``backend="torch"`` or ``backend="triton"`` forces one. Triton's interpreter (``TRITON_INTERPRET=1`` and CPU tensors) is
slow and meant for tests: it runs only when forced.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from . import reference
from .arguments import DinoLoss, LinearDinoLoss, check_soft_cross_entropy
from .blocked.linear_dino_loss import linear_dino_loss as blocked_linear_dino_loss


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
    r"""Compute the cross-entropy between the centred, sharpened teacher and the student, one value per pair of rows.

    .. math:: \ell_p = -\sum_k \mathrm{softmax}\big((t_j - c) / \tau_t\big)_k \,
              \log \mathrm{softmax}\big(s_i / \tau_s\big)_k,  \qquad (j, i) = (teacher\_rows_p, student\_rows_p)

    (Caron et al. 2021, equation 2.)

    Args:
        student_logits: ``[Ns, K]`` floating point.
        teacher_logits: ``[Nt, K]`` floating point.
        center: ``[K]``, or ``[1, K]`` or ``[1, 1, K]`` as checkpoints of DINO and iBOT have it.
        teacher_rows, student_rows: ``[P]`` int64, valid rows of the two (not checked on CUDA). A row may be in any
            number of pairs; a pair with a negative row is padding, and its loss is 0.
        student_temp, teacher_temp: temperatures, above 0.
        backend: ``"torch"`` or ``"triton"`` to force one.

    Returns:
        ``[P]`` float32 (float64 for float64 students), not reduced. The gradient flows only to ``student_logits``.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    center = _as_vector(center)
    arguments = DinoLoss(student_logits, teacher_logits, center, teacher_rows, student_rows, student_temp, teacher_temp)
    arguments.check()
    if runs_triton("dino_loss", backend, student_logits, teacher_logits, center):
        from .fused.dino_loss import dino_loss_fwd

        return dino_loss_fwd(*arguments)[0]
    return reference.dino_loss(*arguments)


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
    """Compute :func:`dino_loss` of the logits ``z @ W.T``, which are never stored.

    Under autocast, z and W are cast to its dtype, as in ``torch.nn.functional.linear``.

    Args:
        student_z: ``[Ns, d]`` floating point, usually L2-normalised bottleneck features.
        student_W: ``[K, d]`` prototypes, the weight of the last layer.
        teacher_z: ``[Nt, d]``.
        teacher_W: ``[K, d]``.
        center, teacher_rows, student_rows, student_temp, teacher_temp, backend: see :func:`dino_loss`.

    Returns:
        ``[P]`` float32 (float64 for float64 students), not reduced. The gradient flows to ``student_z`` and
        ``student_W``.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    features = (student_z, student_W, teacher_z, teacher_W, _as_vector(center))
    arguments = LinearDinoLoss(*features, teacher_rows, student_rows, student_temp, teacher_temp)
    arguments.check()
    if runs_triton("linear_dino_loss", backend, *features):
        from .fused.linear_dino_loss import linear_dino_loss as fused

        return fused(arguments)
    return blocked_linear_dino_loss(arguments)


def soft_cross_entropy(student_logits: Tensor, target: Tensor, temp: float, *, backend: str | None = None) -> Tensor:
    r"""Compute the cross-entropy between given probabilities and the softmax of logits, one value per row.

    .. math:: \ell = -\sum_k t_k \log \mathrm{softmax}(s / \tau)_k

    Rows of the target need not sum to 1: the cross-entropy is linear in its target, so one call with the sum of several
    teachers' probabilities gives the sum of their losses.

    Args:
        student_logits: ``[..., K]`` floating point.
        target: ``[..., K]`` floating point, of the same shape; it receives no gradient.
        temp: temperature of the student, above 0.
        backend: ``"torch"`` or ``"triton"`` to force one.

    Returns:
        ``[...]`` float32 (float64 for float64 students), not reduced. The gradient flows only to ``student_logits``.

    Raises:
        ValueError: wrong shape, dtype or device, or a forced backend that cannot run.
    """
    check_soft_cross_entropy(student_logits, target, temp)
    if runs_triton("soft_cross_entropy", backend, student_logits, target):
        from .fused.soft_cross_entropy import soft_cross_entropy as fused

        return fused(student_logits, target, temp)
    return reference.soft_cross_entropy(student_logits, target, temp)


def _as_vector(center: Tensor) -> Tensor:
    """Return ``[1, ..., 1, K]`` as ``[K]``; the checks reject other shapes."""
    return center.flatten() if center.dim() > 1 and center.shape[:-1].numel() == 1 else center


def runs_triton(op: str, backend: str | None, *tensors: Tensor) -> bool:
    """Return True if Triton runs ``op`` on these tensors, False if plain PyTorch does."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return _choose_triton(op, backend, tensors[0].device.type, double)


@torch.compiler.assume_constant_result
def _choose_triton(op: str, backend: str | None, device: str, double: bool) -> bool:
    """Return True if Triton runs ``op``, False if plain PyTorch does.

    Raises:
        ValueError: ``backend`` is unknown, or is "triton" and cannot run; the message says why.
    """
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"{op}: unknown backend {backend!r}; expected torch or triton")
    if backend == "torch":
        return False
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    reason: str | None
    if double:
        reason = "it computes in float32"
    elif device != "cuda" and not interpreted:
        reason = "it takes CUDA tensors, or TRITON_INTERPRET=1 when forced"
    else:
        reason = _triton_error()
    if backend == "triton" and reason is not None:
        raise ValueError(f"{op}: the forced backend 'triton' cannot run on {device} tensors: {reason}")
    return reason is None


@functools.cache
def _triton_error() -> str | None:
    """Return why triton cannot be imported, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return None
