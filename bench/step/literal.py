"""The *literal* training step: MUSE as its publications describe it, in the style of DINO's public recipe.

Views go through the network one resolution at a time with outputs that grow by ``torch.cat``, attention stores its
weights, the unified map is stored, nuclei are sampled image by image and matched by set intersection in Python, logits
and log-softmaxes are stored for every pair of views, and gradients are clipped and the teacher is updated parameter by
parameter. Written for this benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.baselines import literal_sample
from bench.step.networks import Network, stored_softmax, student_and_teacher
from muse_fast.batch import Views
from muse_fast.config import PretrainConfig
from muse_fast.training.schedules import schedule_at


class LiteralTrainer:
    """``train_step(views)`` -> the losses."""

    def __init__(self, config: PretrainConfig, state: dict[str, Tensor], device: torch.device) -> None:
        self.config, self.device, self.step = config, device, 0
        self.student, self.teacher = student_and_teacher(config, state, device, stored_softmax)
        parameters = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim <= 1]}]
        )
        self.image_center, self.nucleus_center = torch.zeros(2, 1, config.head.prototypes, device=device)

    def train_step(self, views: Views) -> dict[str, Tensor]:
        config, schedule = self.config, schedule_at(self.step, self.config)
        weights, biases = self.optimizer.param_groups
        weights["lr"] = biases["lr"] = schedule.lr
        weights["weight_decay"], biases["weight_decay"] = schedule.weight_decay, 0.0

        crops = [list(views.global_images.chunk(views.num_globals))]
        crops += [list(views.local_images.chunk(views.num_locals))] if views.num_locals else []
        nuclei = per_image(views)
        seen_by_teacher = views.num_globals * views.num_rois
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            with torch.no_grad():
                teacher = multi_crop(self.teacher, crops[:1], nuclei[:seen_by_teacher])
            student = multi_crop(self.student, crops, nuclei)

        temps = config.loss.student_temp, schedule.teacher_temp
        image = image_loss(student[0], teacher[0], self.image_center, *temps, views.num_globals)
        nucleus = nucleus_loss(student[1], teacher[1], self.nucleus_center, *temps, nuclei, views)
        loss = config.loss.lambda_image * image + config.loss.lambda_nucleus * nucleus

        self.optimizer.zero_grad()
        loss.backward()
        if not schedule.train_prototypes:
            self.student.image_head.prototypes_v.grad = self.student.nucleus_head.prototypes_v.grad = None
        if config.optim.clip_grad:
            clip_gradients(self.student, config.optim.clip_grad, config.optim.clip == "per_tensor")
        self.optimizer.step()

        with torch.no_grad():
            for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                k.mul_(schedule.ema_momentum).add_((1 - schedule.ema_momentum) * q.detach())
            momentum = config.loss.center_momentum
            for center, logits in ((self.image_center, teacher[0]), (self.nucleus_center, teacher[1])):
                if len(logits):
                    batch_center = torch.sum(logits.float(), dim=0, keepdim=True) / len(logits)
                    center.copy_(center * momentum + batch_center * (1 - momentum))
        self.step += 1
        return {"loss": loss.detach(), "loss_image": image.detach(), "loss_nucleus": nucleus.detach()}


def per_image(views: Views) -> list[tuple[Tensor, Tensor]]:
    """Return positions ``[n, 2]`` and identities ``[n]`` of the nuclei of every image."""
    counts = views.nuclei.offsets.diff().tolist()
    return list(zip(views.nuclei.xy.split(counts), views.nuclei.index.split(counts), strict=True))


def multi_crop(
    network: Network, crops: Sequence[list[Tensor]], nuclei: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return image logits ``[images, K]`` and nucleus logits ``[N, K]``: a pass per resolution, then the heads once."""
    device = crops[0][0].device
    cls, rows, first = torch.empty(0, device=device), torch.empty(0, device=device), 0
    for of_one_size in crops:
        images = torch.cat(of_one_size)
        features, levels = network.backbone(images)
        points = [xy for xy, _ in nuclei[first : first + len(images)]]
        image = torch.arange(len(images)).repeat_interleave(torch.tensor([len(xy) for xy in points]))
        cls = torch.cat((cls, features))
        rows = torch.cat((rows, literal_sample(levels, torch.cat(points), image.to(device), images.shape[-1])))
        first += len(images)
    return network.image_head(cls), network.nucleus_head(rows)


def image_loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float, num_globals: int
) -> Tensor:
    """Equation 3: every teacher view against every other student view."""
    num_rois = len(teacher) // num_globals
    student_views = (student.float() / student_temp).split(num_rois)
    teacher_views = F.softmax((teacher.float() - center) / teacher_temp, dim=-1).detach().split(num_rois)
    total, terms = torch.zeros((), device=student.device), 0
    for g, q in enumerate(teacher_views):
        for v, s in enumerate(student_views):
            if v == g:
                continue
            total = total + torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).mean()
            terms += 1
    return total / terms


def nucleus_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    nuclei: Sequence[tuple[Tensor, Tensor]],
    views: Views,
) -> Tensor:
    """Equations 6 and 7: the same over the nuclei in both views of a ROI."""
    student_rows = student.float() / student_temp
    teacher_rows = F.softmax((teacher.float() - center) / teacher_temp, dim=-1).detach()
    first, row_of = 0, []  # nucleus -> row, for every image
    for _, index in nuclei:
        row_of.append({nucleus: first + place for place, nucleus in enumerate(index.tolist())})
        first += len(index)
    total, pairs = torch.zeros((), device=student.device), 0
    for g in range(views.num_globals):
        for v in range(views.num_globals + views.num_locals):
            if v == g:
                continue
            in_teacher, in_student = [], []
            for b in range(views.num_rois):
                of_teacher, of_student = row_of[g * views.num_rois + b], row_of[v * views.num_rois + b]
                for nucleus in set(of_teacher) & set(of_student):
                    in_teacher.append(of_teacher[nucleus])
                    in_student.append(of_student[nucleus])
            q, s = teacher_rows[in_teacher], student_rows[in_student]
            total = total + torch.sum(-q * F.log_softmax(s, dim=-1), dim=-1).sum()
            pairs += len(in_teacher)
    return total / max(1, pairs)


def clip_gradients(model: torch.nn.Module, clip: float, per_tensor: bool) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = [gradient.norm(2).item() for gradient in gradients]
    if not per_tensor:
        norms = [sum(norm**2 for norm in norms) ** 0.5] * len(norms)
    for gradient, norm in zip(gradients, norms, strict=True):
        coefficient = clip / (norm + 1e-6)
        if coefficient < 1:
            gradient.mul_(coefficient)
