"""The DINO loss of linear logits in plain PyTorch, a block of prototypes at a time: see logit_free.py for the maths.

Products are float32 (float64 for float64 students) for any input dtype: a 16-bit product would round logits at a
temperature of 0.04 to the second decimal place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import logit_free
from ..arguments import LinearDinoLoss
from ..logit_free import PairSums, Passes, Side, cast_for_autocast, padding
from ..namespace import NAMESPACE
from ..registration import LINEAR_DINO_LOSS_BWD, LINEAR_DINO_LOSS_FWD, register_linear_dino_loss

CPU_TILE = 512, 1024  # 2 MB in float32, which fits in a core's cache
GPU_TILE = 2048, 8192  # 64 MB: enough work per launch


def linear_dino_loss(arguments: LinearDinoLoss) -> Tensor:
    """Compute ``dino_loss`` of the logits ``z @ W.T``: ``[P]`` float32 (float64 for float64 students), not reduced.

    The gradient flows to ``student_z`` and ``student_W``. Memory holds the rows, one block of logits, and the
    gradients.
    """
    return linear_dino_loss_fwd(*cast_for_autocast(arguments))[0]


@torch.library.custom_op(f"{NAMESPACE}::blocked_linear_dino_loss_fwd", mutates_args=(), schema=LINEAR_DINO_LOSS_FWD)
def linear_dino_loss_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    return logit_free.forward(PASSES, LinearDinoLoss(*arguments))


@torch.library.custom_op(f"{NAMESPACE}::blocked_linear_dino_loss_bwd", mutates_args=(), schema=LINEAR_DINO_LOSS_BWD)
def linear_dino_loss_bwd(loss_gradient: Tensor, *saved_and_arguments: Any) -> tuple[Tensor, Tensor]:
    saved, arguments = saved_and_arguments[:4], saved_and_arguments[4:]
    return logit_free.backward(PASSES, loss_gradient, *saved, LinearDinoLoss(*arguments))


register_linear_dino_loss(linear_dino_loss_fwd, linear_dino_loss_bwd)


def attend(queries: Tensor, keys: Tensor, values: Tensor, center: Tensor | None, temp: float) -> tuple[Tensor, Tensor]:
    queries = queries.to(torch.promote_types(values.dtype, torch.float32))
    num_rows, _ = tile_size(queries)
    parts = [attend_rows(rows, keys, values, center, temp) for rows in queries.split(num_rows)]
    stats, mean = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return stats, mean


def attend_rows(
    queries: Tensor, keys: Tensor, values: Tensor, center: Tensor | None, temp: float
) -> tuple[Tensor, Tensor]:
    """Softmax with a running maximum: when a block has a larger logit, the sums are rescaled to it."""
    peak = queries.new_full((len(queries), 1), -torch.inf)
    total, mean = torch.zeros_like(peak), torch.zeros_like(queries)
    for block in blocks_of(keys):
        x = logits(queries, keys, center, block)
        new_peak = torch.maximum(peak, x.amax(1, keepdim=True))
        shrink = ((peak - new_peak) / temp).exp_()
        p = x.sub_(new_peak).div_(temp).exp_()
        total.mul_(shrink).add_(p.sum(1, keepdim=True))
        mean.mul_(shrink).add_(p @ values[block].to(p.dtype))
        peak = new_peak
    return torch.cat([peak, total], dim=1), mean.div_(total)


def pair_loss(student_stats: Tensor, teacher_mean: Tensor, arguments: LinearDinoLoss) -> Tensor:
    teacher_rows, student_rows = arguments.teacher_rows, arguments.student_rows
    i, j = student_rows.clamp(min=0), teacher_rows.clamp(min=0)
    peak, total = student_stats[i].unbind(1)
    score = (arguments.student_z[i] * teacher_mean[j]).sum(1)
    loss = (peak - score) / arguments.student_temp + total.log()
    return loss.masked_fill(padding(teacher_rows, student_rows), 0)


def pair_sums(
    loss_gradient: Tensor,
    student_stats: Tensor,
    student_mean: Tensor,
    teacher_stats: Tensor,
    teacher_mean: Tensor,
    arguments: LinearDinoLoss,
) -> PairSums:
    student_z, _, teacher_z, _, _, teacher_rows, student_rows, student_temp, _ = arguments
    i, j = student_rows.clamp(min=0), teacher_rows.clamp(min=0)
    weight = loss_gradient.masked_fill(padding(teacher_rows, student_rows), 0) / student_temp
    of_student, of_teacher = group(student_rows, len(student_z)), group(teacher_rows, len(teacher_z))
    z_gradient = of_student.sum(weight.unsqueeze(1) * (student_mean[i] - teacher_mean[j]))
    teacher_weight = of_teacher.sum(weight.abs()).clamp(min=torch.finfo(weight.dtype).tiny)
    return PairSums(
        z_gradient.to(student_z.dtype),
        of_student.sum(weight) / student_stats[:, 1],
        -teacher_weight / teacher_stats[:, 1],
        of_teacher.sum(weight.unsqueeze(1) * student_z[i]) / teacher_weight.unsqueeze(1),
    )


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


def prototype_gradient(student: Side, teacher: Side, dtype: torch.dtype) -> Tensor:
    precision = teacher.values.dtype
    gradient = student.prototypes.new_empty(student.prototypes.shape, dtype=dtype)
    tiles = [*tiles_of(student, precision), *tiles_of(teacher, precision)]
    for block in blocks_of(student.prototypes):
        total = torch.zeros_like(gradient[block], dtype=precision)
        for side in tiles:
            x = logits(side.rows, side.prototypes, side.center, block)
            p = x.sub_(side.stats[:, :1]).div_(side.temp).exp_()
            total += p.T @ side.values
        gradient[block] = total
    return gradient


PASSES = Passes(attend, pair_loss, pair_sums, prototype_gradient)


def logits(rows: Tensor, prototypes: Tensor, center: Tensor | None, block: slice) -> Tensor:
    """``[N, block]``. Both passes use the same tiles, for identical bits: else probabilities would not sum to 1."""
    x = rows @ prototypes[block].to(rows.dtype).T
    if center is not None:
        x -= center[block]
    return x


def tiles_of(side: Side, precision: torch.dtype) -> list[Side]:
    """Split a side into tiles of rows, with the coefficients multiplied into the values."""
    num_rows, _ = tile_size(side.rows)
    values = side.coefficients.unsqueeze(1) * side.values
    pieces = (tensor.split(num_rows) for tensor in (side.rows.to(precision), side.stats, values))
    return [side._replace(rows=rows, stats=stats, values=values) for rows, stats, values in zip(*pieces, strict=True)]


def blocks_of(prototypes: Tensor) -> Iterator[slice]:
    _, size = tile_size(prototypes)
    for start in range(0, len(prototypes), size):
        yield slice(start, start + size)


def tile_size(tensor: Tensor) -> tuple[int, int]:
    """Return how many rows and prototypes to compute logits of at a time."""
    return CPU_TILE if tensor.device.type == "cpu" else GPU_TILE
