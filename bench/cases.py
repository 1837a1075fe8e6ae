"""What is timed: one entry per op, with the shapes of real runs and a literal version written from the equations.

Every case has two baselines: ``literal``, the equation as one would first write it (a set intersection in Python, a
loop over images, a stored log-softmax), and ``reference``, the batched PyTorch of ``muse_fast.ops.reference``. A ratio
against the literal one alone would flatter us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of one size for one op."""

    op: str
    name: str
    inputs: Callable[[torch.Generator, torch.dtype], tuple[Any, ...]]
    literal: Callable[..., Any]
    devices: tuple[str, ...] = ("cpu", "cuda")


def match_inputs(rois: int, views: int, nuclei: int, seen: float) -> Callable[..., tuple[Any, ...]]:
    """Every view of a ROI sees each of ``nuclei / seen`` nuclei with probability ``seen``."""

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        visible = torch.rand(views * rois, round(nuclei / seen), generator=random) < seen
        offsets = F.pad(visible.sum(1).cumsum(0), (1, 0)).int()
        return visible.nonzero()[:, 1].int(), offsets, rois, 2

    return build


def sample_inputs(images: int, size: int, channels: int, nuclei: int) -> Callable[..., tuple[Any, ...]]:
    """Four decoder levels at strides 4 to 32 of ``size`` pixels, the same number of nuclei in each image."""

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        sides = [size // stride for stride in (4, 8, 16, 32)]
        levels = [torch.randn(images, channels, side, side, generator=random).to(dtype) for side in sides]
        xy = torch.rand(images * nuclei, 2, generator=random) * size
        return levels, xy, torch.arange(images).repeat_interleave(nuclei), size

    return build


def loss_inputs(students: int, teachers: int, prototypes: int, pairs: int, width: int = 0) -> Callable[..., Any]:
    """Logits, or with a ``width`` the features and prototypes that give them."""

    def build(random: torch.Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        def unit_rows(count: int, columns: int) -> Tensor:
            return F.normalize(torch.randn(count, columns, generator=random), dim=1)

        if width:
            shapes = ((students, width), (prototypes, width), (teachers, width), (prototypes, width))
            tensors = [unit_rows(*shape).to(dtype) for shape in shapes]
        else:
            tensors = [(torch.rand(n, prototypes, generator=random) * 2 - 1).to(dtype) for n in (students, teachers)]
        center = torch.randn(prototypes, generator=random) * 0.1
        rows = [torch.randint(count, (pairs,), generator=random) for count in (teachers, students)]
        return *tensors, center, *rows, STUDENT_TEMP, TEACHER_TEMP

    return build


def literal_match(index: Tensor, offsets: Tensor, num_rois: int, num_globals: int) -> tuple[Tensor, Tensor]:
    bounds, ids = offsets.tolist(), index.tolist()
    rows = [{ids[row]: row for row in range(start, stop)} for start, stop in pairwise(bounds)]
    teacher, student = [], []
    for g in range(num_globals):
        for v in range(len(rows) // num_rois):
            for b in range(num_rois if v != g else 0):
                of_teacher, of_student = rows[g * num_rois + b], rows[v * num_rois + b]
                for nucleus in sorted(of_teacher.keys() & of_student.keys()):
                    teacher.append(of_teacher[nucleus])
                    student.append(of_student[nucleus])
    return torch.tensor(teacher, device=index.device), torch.tensor(student, device=index.device)


def literal_sample(levels: list[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    size = levels[0].shape[-2:]
    unified = torch.cat([F.interpolate(level, size, mode="bilinear", align_corners=True) for level in levels], dim=1)
    counts = torch.bincount(image_index, minlength=len(unified)).tolist()
    rows = []
    for image, points in enumerate(xy.split(counts)):
        grid = (2 * points / view_size - 1).view(1, -1, 1, 2).to(unified.dtype)
        rows.append(F.grid_sample(unified[image : image + 1], grid, align_corners=True)[0, :, :, 0].T)
    return torch.cat(rows)


def literal_loss(
    student: Tensor, teacher: Tensor, center: Tensor, teacher_rows: Tensor, student_rows: Tensor, ts: float, tt: float
) -> Tensor:
    log_prediction = F.log_softmax(student[student_rows].float() / ts, dim=-1)
    target = F.softmax((teacher.detach()[teacher_rows].float() - center) / tt, dim=-1)
    return torch.sum(-target * log_prediction, dim=-1)


def literal_linear_loss(z: Tensor, weight: Tensor, teacher_z: Tensor, teacher_weight: Tensor, *rest: Any) -> Tensor:
    return literal_loss(z @ weight.T, teacher_z @ teacher_weight.T, *rest)


# A rank of 16 ROIs, 2 globals of 224 px and 8 locals of 96 px, about 60 nuclei in a view, ViT-S, 65,536 prototypes.
CASES = [
    Case(op="match_nuclei", name="160 views x 60", inputs=match_inputs(16, 10, 60, 0.5), literal=literal_match),
    Case(op="match_nuclei", name="160 views x 300", inputs=match_inputs(16, 10, 300, 0.5), literal=literal_match),
    Case(op="sample_nuclei", name="8 globals x 60", inputs=sample_inputs(8, 224, 96, 60), literal=literal_sample),
    Case(op="sample_nuclei", name="32 locals x 12", inputs=sample_inputs(32, 96, 96, 12), literal=literal_sample),
    Case(
        op="sample_nuclei",
        name="32 globals x 60",
        inputs=sample_inputs(32, 224, 96, 60),
        literal=literal_sample,
        devices=("cuda",),
    ),
    Case(op="dino_loss", name="160 rows, K 65536", inputs=loss_inputs(160, 32, 65536, 288), literal=literal_loss),
    Case(op="dino_loss", name="500 rows, K 4096", inputs=loss_inputs(500, 250, 4096, 750), literal=literal_loss),
    Case(
        op="dino_loss",
        name="2000 rows, K 65536",
        inputs=loss_inputs(2000, 1000, 65536, 3000),
        literal=literal_loss,
        devices=("cuda",),
    ),
    Case(
        op="linear_dino_loss",
        name="500 rows, K 4096",
        inputs=loss_inputs(500, 250, 4096, 750, width=256),
        literal=literal_linear_loss,
    ),
    Case(
        op="linear_dino_loss",
        name="2000 rows, K 65536",
        inputs=loss_inputs(2000, 1000, 65536, 3000, width=256),
        literal=literal_linear_loss,
        devices=("cuda",),
    ),
]
