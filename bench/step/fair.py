"""The *fair* training step: the batched eager PyTorch that a careful engineer would write, without custom kernels.

It uses ``F.scaled_dot_product_attention``, samples all nuclei of a resolution at once (the fastest eager form of `bench
ops`), matches by binary search on the device, computes every softmax and log-softmax once per row, uses fused AdamW,
and clips and averages all parameters at once. Logits are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.ops.baselines import sample_by_matmul
from bench.step.networks import Network, student_and_teacher
from muse_fast.batch import Views
from muse_fast.config import PretrainConfig
from muse_fast.ops.reference import match_nuclei
from muse_fast.training.schedules import schedule_at


class FairTrainer:
    """``train_step(views)`` -> the losses."""

    def __init__(self, config: PretrainConfig, state: dict[str, Tensor], device: torch.device) -> None:
        self.config, self.device, self.step = config, device, 0
        self.student, self.teacher = student_and_teacher(config, state, device, F.scaled_dot_product_attention)
        parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim <= 1]}],
            fused=True,
        )
        self.image_center, self.nucleus_center = torch.zeros(2, config.head.prototypes, device=device)

    def train_step(self, views: Views) -> dict[str, Tensor]:
        config, schedule = self.config, schedule_at(self.step, self.config)
        weights, biases = self.optimizer.param_groups
        weights["lr"] = biases["lr"] = schedule.lr
        weights["weight_decay"], biases["weight_decay"] = schedule.weight_decay, 0.0

        globals_, locals_, nuclei = views.global_images, views.local_images, views.nuclei
        image_index = nuclei.image_index()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            with torch.no_grad():
                teacher = forward(self.teacher, [globals_], nuclei.xy, image_index)
            student = forward(self.student, [globals_, locals_][: 1 + bool(len(locals_))], nuclei.xy, image_index)

        temps = config.loss.student_temp, schedule.teacher_temp
        pairs = match_nuclei(nuclei.index, nuclei.offsets, views.num_rois, views.num_globals)
        image = image_loss(student[0], teacher[0], self.image_center, *temps, views.num_globals)
        nucleus = nucleus_loss(student[1], teacher[1], self.nucleus_center, *temps, *pairs)
        loss = config.loss.lambda_image * image + config.loss.lambda_nucleus * nucleus

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not schedule.train_prototypes:
            self.student.image_head.prototypes_v.grad = self.student.nucleus_head.prototypes_v.grad = None
        if config.optim.clip_grad:
            parameters = list(self.student.parameters())
            for clipped in [[p] for p in parameters] if config.optim.clip == "per_tensor" else [parameters]:
                nn.utils.clip_grad_norm_(clipped, config.optim.clip_grad)
        self.optimizer.step()

        with torch.no_grad():
            update = 1 - schedule.ema_momentum
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), update)
            for center, logits in ((self.image_center, teacher[0]), (self.nucleus_center, teacher[1])):
                if len(logits):
                    center.lerp_(logits.mean(dim=0, dtype=torch.float32), 1 - config.loss.center_momentum)
        self.step += 1
        return {"loss": loss.detach(), "loss_image": image.detach(), "loss_nucleus": nucleus.detach()}


def forward(network: Network, groups: Sequence[Tensor], xy: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor]:
    """Return image logits ``[images, K]`` and nucleus logits ``[N, K]``; the heads run once for all resolutions."""
    cls, rows, first = [], [], 0
    for images in groups:
        features, levels = network.backbone(images)
        inside = (image_index >= first) & (image_index < first + len(images))
        cls.append(features)
        with torch.autocast(images.device.type, enabled=False):  # positions need more than bfloat16's 8 bits
            rows.append(sample_by_matmul(levels, xy[inside], image_index[inside] - first, images.shape[-1]))
        first += len(images)
    return network.image_head(torch.cat(cls)), network.nucleus_head(torch.cat(rows))


def image_loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float, num_globals: int
) -> Tensor:
    """Equation 3: all teacher views against all student views in one product, excluding a view against itself."""
    num_rois = len(teacher) // num_globals
    target = F.softmax((teacher.float() - center) / teacher_temp, dim=-1).unflatten(0, (-1, num_rois))
    log_prediction = F.log_softmax(student.float() / student_temp, dim=-1).unflatten(0, (-1, num_rois))
    loss = -torch.einsum("gbk,vbk->gv", target, log_prediction)
    return (loss.sum() - loss.diagonal().sum()) / (num_rois * num_globals * (loss.shape[1] - 1))


def nucleus_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    teacher_rows: Tensor,
    student_rows: Tensor,
) -> Tensor:
    """Equations 6 and 7. The targets of a student row are summed first, so its log-softmax is read once."""
    if not len(teacher_rows):
        return student.float().sum() * 0
    target = F.softmax((teacher.float() - center) / teacher_temp, dim=-1)
    log_prediction = F.log_softmax(student.float() / student_temp, dim=-1)
    targets = torch.zeros_like(log_prediction).index_add_(0, student_rows, target[teacher_rows])
    return -(targets * log_prediction).sum() / len(teacher_rows)
