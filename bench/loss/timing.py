"""Time the two forms of the distillation loss: from stored logits, and without storing them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.measure import Call, evaluate, extra_memory, interleaved, quantiles, relative_error
from bench.ops.cases import loss_inputs
from muse_fast.batch import Pairs
from muse_fast.models.heads import HeadOutput
from muse_fast.pretraining.losses import Temperatures, distillation_loss

FORMS = {"stored": False, "logit-free": True}  # name -> the argument logit_free
WIDTH = 256  # of the bottleneck
TOLERANCE = 1e-4  # relative L2 between the forms; an error of 1 % fails

Row = dict[str, Any]


def loss(
    student_z: Tensor, student_W: Tensor, teacher_z: Tensor, teacher_W: Tensor, center: Tensor,
    teacher_rows: Tensor, student_rows: Tensor, *temps: float, logit_free: bool,
) -> Tensor:  # fmt: skip
    """The loss as a step computes it, from the arguments of the op `linear_dino_loss`."""
    student, teacher = HeadOutput(student_z, student_W), HeadOutput(teacher_z, teacher_W)
    pairs = Pairs(teacher_rows, student_rows)
    return distillation_loss(student, teacher, center, pairs, Temperatures(*temps), logit_free=logit_free)


def run(rows: int, prototypes: int) -> Row:
    """Time forward and backward of both forms alternately on the CPU, in float32, and measure their memory.

    As in a step, there are half as many teacher rows as student rows, and 1.5 pairs per student row. If the results or
    gradients differ, there are no times, but the reason under ``wrong``.
    """
    build = loss_inputs(rows, max(1, rows // 2), prototypes, 3 * rows // 2, width=WIDTH)
    arguments = build(torch.Generator().manual_seed(0), torch.float32)
    calls: dict[str, Call] = {name: partial(loss, logit_free=logit_free) for name, logit_free in FORMS.items()}
    results = [evaluate(call, arguments) for call in calls.values()]  # also warms up
    error = relative_error(*results)
    del results
    row: Row = {"rows": rows, "prototypes": prototypes, "relative_error": error}
    if not error <= TOLERANCE:
        return row | {"wrong": f"the forms differ by {error:.0e}, above {TOLERANCE:.0e}"}
    for name, times in interleaved(calls, arguments, "cpu").items():
        row[name] = quantiles(times) | {"extra_bytes": extra_memory(calls[name], arguments, "cpu")}
    return row | {"speedup_stored": row["logit-free"]["median_ms"] / row["stored"]["median_ms"]}
