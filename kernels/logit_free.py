"""The DINO loss of linear logits as attention, so that no logit is stored: everything but the two passes over W and V.

With student rows s and prototypes W, teacher rows t and prototypes V, centre c, and softmaxes over the K prototypes

    P_i = softmax(W s_i / ts)            o_i = sum_k P_ik W_k
    Q_j = softmax((V t_j - c) / tt)      m_j = sum_k Q_jk W_k

o and m are what attention returns for queries s and t, keys W and V, values W, and a bias -c on the keys. Then

    loss_p        = logsumexp(W s_i / ts) - s_i . m_j / ts            (j, i) = (teacher_rows[p], student_rows[p])
    d loss / ds_i = 1/ts sum_{p of i} g_p (o_i - m_j)
    d loss / dW_k = 1/ts (sum_i P_ik (sum_{p of i} g_p) s_i - sum_j Q_jk (sum_{p of j} g_p s_i))

where g is the gradient of the loss. A pair costs d operations instead of K, the gradient of s needs no pass over the
prototypes, and that of W needs one, in which each prototype has one owner. A backend implements the two passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import LinearDinoLoss
from .registration import empty_linear_outputs

# (queries [N, d], keys [K, d], values [K, d], center [K] or None, temp) -> for every query, the largest logit and the
# sum of exponentials after subtracting it [N, 2], and the mean of the values under its softmax [N, d].
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


class Side(NamedTuple):
    """Student or teacher in the gradient of the prototypes, ``sum_n coefficient_n exp((x_nk - peak_n) / temp) value_n``
    with logits ``x = rows @ prototypes.T - center``."""

    rows: Tensor  # [N, d]
    prototypes: Tensor  # [K, d]
    center: Tensor | None  # [K]
    temp: float
    peaks: Tensor  # [N]
    coefficients: Tensor  # [N]
    values: Tensor  # [N, d]


# (student, teacher, dtype) -> the sum over both sides [K, d] in that dtype.
PrototypeGradient = Callable[[Side, Side, torch.dtype], Tensor]


def forward(attend: Attend, arguments: LinearDinoLoss) -> tuple[Tensor, ...]:
    """Return the loss and the tensors saved for the backward, see ``empty_linear_outputs``."""
    student_z, student_W, teacher_z, teacher_W, center, teacher_rows, student_rows = arguments[:7]
    student_temp, teacher_temp = arguments[7:]
    if any_is_empty(student_z, teacher_z, teacher_rows):  # then all pairs are padding
        return tuple(output.zero_() for output in empty_linear_outputs(arguments))
    with torch.autocast(student_z.device.type, enabled=False):  # it would also apply inside the op
        student_stats, student_mean = attend(student_z, student_W, student_W, None, student_temp)
        teacher_stats, teacher_mean = attend(teacher_z, teacher_W, student_W, center, teacher_temp)
    i, j = student_rows.clamp(min=0), teacher_rows.clamp(min=0)
    peak, total = student_stats[i].unbind(1)
    score = (student_z[i] * teacher_mean[j]).sum(1)
    loss = (peak - score) / student_temp + total.log()
    loss = loss.masked_fill(padding(teacher_rows, student_rows), 0)
    return loss, student_stats, student_mean, teacher_stats, teacher_mean


def backward(
    prototype_gradient: PrototypeGradient,
    loss_gradient: Tensor,
    student_stats: Tensor,
    student_mean: Tensor,
    teacher_stats: Tensor,
    teacher_mean: Tensor,
    arguments: LinearDinoLoss,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``student_z`` and ``student_W``, contiguous, in their dtypes."""
    student_z, student_W, teacher_z, teacher_W, center, teacher_rows, student_rows = arguments[:7]
    student_temp, teacher_temp = arguments[7:]
    if any_is_empty(student_z, teacher_z, teacher_rows):
        return zeros_like(student_z), zeros_like(student_W)
    i, j = student_rows.clamp(min=0), teacher_rows.clamp(min=0)
    weight = loss_gradient.masked_fill(padding(teacher_rows, student_rows), 0) / student_temp
    of_student, of_teacher = group(student_rows, len(student_z)), group(teacher_rows, len(teacher_z))
    z_gradient = of_student.sum(weight.unsqueeze(1) * (student_mean[i] - teacher_mean[j]))
    # A teacher's values are a mean of students, so they are no larger than those, whatever the weights are.
    teacher_weight = of_teacher.sum(weight.abs()).clamp(min=torch.finfo(weight.dtype).tiny)
    teacher_values = of_teacher.sum(weight.unsqueeze(1) * student_z[i]) / teacher_weight.unsqueeze(1)
    student_peaks, student_totals = student_stats.unbind(1)
    teacher_peaks, teacher_totals = teacher_stats.unbind(1)
    student_coefficients = of_student.sum(weight) / student_totals
    teacher_coefficients = -teacher_weight / teacher_totals
    with torch.autocast(student_z.device.type, enabled=False):
        W_gradient = prototype_gradient(
            Side(student_z, student_W, None, student_temp, student_peaks, student_coefficients, student_z),
            Side(teacher_z, teacher_W, center, teacher_temp, teacher_peaks, teacher_coefficients, teacher_values),
            student_W.dtype,
        )
    return z_gradient.to(student_z.dtype), W_gradient


def cast_for_autocast(arguments: LinearDinoLoss) -> LinearDinoLoss:
    """Cast z and W as autocast does for a matrix product; the centre does not change."""
    device = arguments.student_z.device.type
    if not torch.is_autocast_enabled(device):
        return arguments
    dtype = torch.get_autocast_dtype(device)
    features = (tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in arguments[:4])
    return LinearDinoLoss(*features, *arguments[4:])


def padding(teacher_rows: Tensor, student_rows: Tensor) -> Tensor:
    return (teacher_rows < 0) | (student_rows < 0)


class Groups(NamedTuple):
    """The pairs sorted by their teacher or student row: ``order[offsets[n] : offsets[n + 1]]`` are those of row n."""

    order: Tensor  # [P]
    offsets: Tensor  # [N + 1]

    def sum(self, values: Tensor) -> Tensor:
        """Sum the values ``[P, ...]`` of the pairs of every row: ``[N, ...]``. No atomics."""
        return torch.segment_reduce(values[self.order], "sum", offsets=self.offsets, axis=0, initial=0, unsafe=True)


def group(rows: Tensor, num_rows: int) -> Groups:
    """Group the pairs by ``rows [P]``, skipping negative ones. Sorts on the device, without a host synchronisation."""
    sorted_rows, order = rows.int().sort(stable=True)  # half the passes of a sort of int64
    first = torch.searchsorted(sorted_rows, torch.arange(num_rows + 1, dtype=torch.int32, device=rows.device))
    return Groups(order, first)


def any_is_empty(*tensors: Tensor) -> bool:
    return any(len(tensor) == 0 for tensor in tensors)


def zeros_like(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.shape)  # contiguous, whatever the strides of the tensor are
