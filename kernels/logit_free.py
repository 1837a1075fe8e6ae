"""The DINO loss of linear logits as attention, so that no logit is stored: everything but the passes.

With student rows s and prototypes W, teacher rows t and prototypes V, centre c, and softmaxes over the K prototypes

    P_i = softmax(W s_i / ts)            o_i = sum_k P_ik W_k
    Q_j = softmax((V t_j - c) / tt)      m_j = sum_k Q_jk W_k

o and m are what attention returns for queries s and t, keys W and V, values W, and a bias -c on the keys. Then

    loss_p        = logsumexp(W s_i / ts) - s_i . m_j / ts            (j, i) = (teacher_rows[p], student_rows[p])
    d loss / ds_i = 1/ts sum_{p of i} g_p (o_i - m_j)
    d loss / dW_k = 1/ts (sum_i P_ik (sum_{p of i} g_p) s_i - sum_j Q_jk (sum_{p of j} g_p s_i))

where g is the gradient of the loss. A pair costs d operations instead of K, the gradient of s needs no pass over the
prototypes, and that of W needs one, in which each prototype has one owner. A backend implements the passes over the
prototypes and those over the pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import LinearDinoLoss
from .registration import empty_linear_outputs


class Side(NamedTuple):
    """Student or teacher in the gradient of the prototypes, ``sum_n coefficient_n exp((x_nk - peak_n) / temp) value_n``
    with logits ``x = rows @ prototypes.T - center``."""

    rows: Tensor  # [N, d]
    prototypes: Tensor  # [K, d]
    center: Tensor | None  # [K]
    temp: float
    stats: Tensor  # [N, 2]: peaks, and the sums of exponentials after subtracting them
    coefficients: Tensor  # [N]
    values: Tensor  # [N, d]


class PairSums(NamedTuple):
    """Sums over the pairs of every row, with weights ``w_p = g_p / ts``."""

    z_gradient: Tensor  # [Ns, d] in the dtype of the students: sum_p w_p (o_i - m_j)
    student_coefficients: Tensor  # [Ns]: sum_p w_p / total of the student
    teacher_coefficients: Tensor  # [Nt]: -sum_p |w_p| / total of the teacher
    teacher_values: Tensor  # [Nt, d]: mean of the students of a teacher; no larger than those, whatever the weights are


class Passes(NamedTuple):
    """What a backend implements."""

    # (queries [N, d], keys [K, d], values [K, d], center [K] or None, temp) -> for every query, the largest logit and
    # the sum of exponentials after subtracting it [N, 2], and the mean of the values under its softmax [N, d].
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    # (student_stats, teacher_mean, arguments) -> the loss of every pair [P].
    pair_loss: Callable[[Tensor, Tensor, LinearDinoLoss], Tensor]
    # (loss_gradient [P], student_stats, student_mean, teacher_stats, teacher_mean, arguments)
    pair_sums: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, LinearDinoLoss], PairSums]
    # (student, teacher, dtype) -> the sum over both sides [K, d] in that dtype.
    prototype_gradient: Callable[[Side, Side, torch.dtype], Tensor]


def forward(passes: Passes, arguments: LinearDinoLoss) -> tuple[Tensor, ...]:
    """Return the loss and the tensors saved for the backward, see ``empty_linear_outputs``."""
    student_z, student_W, teacher_z, teacher_W, center, teacher_rows, *_, student_temp, teacher_temp = arguments
    if any_is_empty(student_z, teacher_z, teacher_rows):  # then all pairs are padding
        return tuple(output.zero_() for output in empty_linear_outputs(arguments))
    with torch.autocast(student_z.device.type, enabled=False):  # it would also apply inside the op
        student_stats, student_mean = passes.attend(student_z, student_W, student_W, None, student_temp)
        teacher_stats, teacher_mean = passes.attend(teacher_z, teacher_W, student_W, center, teacher_temp)
    loss = passes.pair_loss(student_stats, teacher_mean, arguments)
    return loss, student_stats, student_mean, teacher_stats, teacher_mean


def backward(
    passes: Passes,
    loss_gradient: Tensor,
    student_stats: Tensor,
    student_mean: Tensor,
    teacher_stats: Tensor,
    teacher_mean: Tensor,
    arguments: LinearDinoLoss,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``student_z`` and ``student_W``, contiguous, in their dtypes."""
    student_z, student_W, teacher_z, teacher_W, center, teacher_rows, *_, student_temp, teacher_temp = arguments
    if any_is_empty(student_z, teacher_z, teacher_rows):
        return zeros_like(student_z), zeros_like(student_W)
    sums = passes.pair_sums(loss_gradient, student_stats, student_mean, teacher_stats, teacher_mean, arguments)
    student = student_z, student_W, None, student_temp, student_stats, sums.student_coefficients, student_z
    teacher = teacher_z, teacher_W, center, teacher_temp, teacher_stats, sums.teacher_coefficients, sums.teacher_values
    with torch.autocast(student_z.device.type, enabled=False):
        W_gradient = passes.prototype_gradient(Side(*student), Side(*teacher), student_W.dtype)
    return sums.z_gradient, W_gradient


def cast_for_autocast(arguments: LinearDinoLoss) -> LinearDinoLoss:
    """Cast z and W as autocast does for a matrix product; the centre does not change."""
    device = arguments.student_z.device.type
    if not torch.is_autocast_enabled(device):
        return arguments
    dtype = torch.get_autocast_dtype(device)
    features = (tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in arguments[:4])
    return LinearDinoLoss(*features, *arguments[4:])


def padding(teacher_rows: Tensor, student_rows: Tensor) -> Tensor:
    return torch.minimum(teacher_rows, student_rows) < 0


def any_is_empty(*tensors: Tensor) -> bool:
    return any(len(tensor) == 0 for tensor in tensors)


def zeros_like(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.shape)  # contiguous, whatever the strides of the tensor are
