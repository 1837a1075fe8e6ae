"""The losses of MUSE: centred-softmax cross-entropies over pairs of rows (equations 3, 6 and 7), and KoLeo.

A loss is pure: it reads a centre and returns values. `muse_fast.pretraining.centering` updates the centre.

``LOSSES`` is the only list of loss terms. Step, metrics, guard and summary follow it. To add a loss, write a function
here, its line in ``LOSSES`` and its weight ``loss.lambda_NAME`` in `muse_fast.config`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast import ops
from muse_fast.batch import Pairs
from muse_fast.config import LossConfig
from muse_fast.models.heads import HeadOutput
from muse_fast.pretraining.distill import Outputs
from muse_fast.runtime.kept import kept

# Rows whose logits are stored at a time: few fit a CPU's cache, many take a GPU few launches.
_ENTROPY_ROWS = {"cpu": 64, "cuda": 1024}


class Temperatures(NamedTuple):
    student: float
    teacher: float


class LossInputs(NamedTuple):
    """The inputs of a loss: a micro-batch on this rank. Rows of ``image`` are view-major, globals first."""

    num_rois: int
    num_globals: int
    pairs: Mapping[str, Pairs]  # rows that each head compares
    student: Outputs  # of all views
    teacher: Mapping[str, HeadOutput]  # of the globals, without gradients
    centers: Mapping[str, Tensor]  # [K] of each head
    temps: Temperatures
    config: LossConfig


class Loss(NamedTuple):
    """A term of the training loss. Its weight is the setting ``loss.lambda_NAME``."""

    summed: Callable[[LossInputs], Tensor]  # over a micro-batch: a scalar in at least float32
    mean_over: Literal["rois", "image_pairs", "nucleus_pairs"]  # of the whole batch; the sum is divided by their number
    optional: bool = False  # not computed if its weight is 0


@kept
def image_pairs(num_rois: int, num_globals: int, num_views: int, device: torch.device) -> Pairs:
    """Return the rows of CLS features to compare: every teacher global g with every student view v != g of its ROI.

    ``G * (V - 1) * B`` pairs, rows in view-major order.
    """
    teacher, student, roi = torch.meshgrid(
        torch.arange(num_globals),
        torch.arange(num_views),
        torch.arange(num_rois),
        indexing="ij",
    )
    other = teacher != student
    pairs = Pairs(
        teacher_rows=teacher[other] * num_rois + roi[other],
        student_rows=student[other] * num_rois + roi[other],
    )
    return pairs.to(device)


def distillation_loss(
    student: HeadOutput,
    teacher: HeadOutput,
    center: Tensor,
    pairs: Pairs,
    temps: Temperatures,
    *,
    logit_free: bool,
) -> Tensor:
    """Sum over ``pairs`` of ``-sum_k softmax((t - c) / tt)_k log softmax(s / ts)_k`` of the logits t and s.

    Args:
        teacher: receives no gradient.
        center: ``[K]``.
        pairs: negative rows are padding.
        logit_free: compute the logits twice instead of storing them.

    Returns:
        a scalar in at least float32. Without pairs it is a zero with a zero gradient, so a batch without nuclei still
        trains the rest.
    """
    compared = (center, pairs.teacher_rows, pairs.student_rows, temps.student, temps.teacher)
    if logit_free:
        return ops.linear_dino_loss(student.z, student.prototypes, teacher.z, teacher.prototypes, *compared).sum()
    with torch.no_grad():
        teacher_logits = teacher.logits()
    return ops.dino_loss(student.logits(), teacher_logits, *compared).sum()


def _distillation(head: str) -> Callable[[LossInputs], Tensor]:
    def summed(inputs: LossInputs) -> Tensor:
        return distillation_loss(
            inputs.student.heads[head],
            inputs.teacher[head],
            inputs.centers[head],
            inputs.pairs[head],
            inputs.temps,
            logit_free=bool(inputs.config.logit_free),  # the trainer has replaced "auto"
        )

    return summed


def koleo_loss(features: Tensor, rois_per_view: int) -> Tensor:
    """Sum over rows x of ``-log(|x - n(x)| + 1e-8)``, x of length 1 and n(x) the nearest other row of the same view.

    Minimising it raises the Kozachenko-Leonenko estimate of the features' entropy (Sablayrolles et al. 2019, "Spreading
    vectors for similarity search"). As in DINOv2, neighbours are searched within one view of a micro-batch on one rank.
    With one ROI there are none, and the loss is 0.

    Args:
        features: ``[views * rois_per_view, C]``, view-major.

    Returns:
        a scalar in at least float32, even under autocast. Its gradient is finite even for equal rows.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if rois_per_view == 1:
            return 0 * features.sum()
        rows = F.normalize(features, eps=1e-8)
        losses = []
        for view in rows.split(rois_per_view):
            cosines = view.detach() @ view.detach().T
            nearest = cosines.fill_diagonal_(-math.inf).argmax(dim=1)  # not -1, the cosine of opposite rows
            losses.append(-torch.log(F.pairwise_distance(view, view[nearest], eps=1e-8) + 1e-8))
        return torch.cat(losses).sum()


def _koleo(inputs: LossInputs) -> Tensor:
    return koleo_loss(inputs.student.features["image"][: inputs.num_globals * inputs.num_rois], inputs.num_rois)


# The losses of the heads are computed even at weight 0: they are logged, and DDP needs a gradient for every parameter.
LOSSES = {
    "image": Loss(_distillation("image"), mean_over="image_pairs"),
    "nucleus": Loss(_distillation("nucleus"), mean_over="nucleus_pairs"),
    "koleo": Loss(_koleo, mean_over="rois", optional=True),  # sum over global views of their means, as in DINOv2
}


def loss_weights(config: LossConfig) -> dict[str, float]:
    """Return the weights of the losses that a run computes, by name."""
    weights = {name: getattr(config, f"lambda_{name}") for name in LOSSES}
    return {name: weight for name, weight in weights.items() if weight > 0 or not LOSSES[name].optional}


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the training loss."""
    return reduce(torch.add, (weight * losses[name] for name, weight in weights.items()))


@torch.no_grad()
def assignment_entropy(output: HeadOutput, center: Tensor | None, temp: float) -> tuple[Tensor, Tensor]:
    """Return the entropy of the mean assignment and the mean entropy of a row's assignment, as shares of ln K.

    A collapse to one prototype drives the first to 0, a collapse to uniform assignments the second to 1.

    Args:
        output: of a head, with at least one row.
        center: ``[K]``, subtracted from the logits first; None for the student.
    """
    z, prototypes = output
    sum_of_rows, sum_of_entropies = z.new_zeros(len(prototypes)), z.new_zeros(())
    for rows in z.split(_ENTROPY_ROWS[z.device.type]):
        logits = F.linear(rows, prototypes)
        p = torch.softmax((logits if center is None else logits - center) / temp, dim=1)
        sum_of_rows += p.sum(dim=0)
        sum_of_entropies += torch.special.entr(p).sum()
    scale = math.log(len(prototypes))
    return torch.special.entr(sum_of_rows / len(z)).sum() / scale, sum_of_entropies / (len(z) * scale)
