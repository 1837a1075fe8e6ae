"""A small DINO training script with the loss as published (Caron et al. 2021, equations 3 and 4)."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

CROPS, IMAGES, PROTOTYPES, EPOCH = 6, 16, 4096, 10  # crops of an image, two of them global; steps of an epoch


class DINOLoss(nn.Module):
    def __init__(self, out_dim, ncrops, teacher_temps, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.ncrops, self.teacher_temps = ncrops, teacher_temps
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student_output, teacher_output, epoch):
        logits = (teacher_output - self.center) / self.teacher_temps[epoch]
        targets = logits.softmax(dim=-1).detach().chunk(2)
        views = (student_output / self.student_temp).chunk(self.ncrops)
        losses = [
            -(target * F.log_softmax(view, dim=-1)).sum(dim=-1).mean()
            for g, target in enumerate(targets)
            for v, view in enumerate(views)
            if v != g
        ]
        self.update_center(teacher_output)
        return sum(losses) / len(losses)

    @torch.no_grad()
    def update_center(self, teacher_output):
        mean = teacher_output.mean(dim=0, keepdim=True)
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)


def train(steps):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, PROTOTYPES, bias=False))
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    teacher_temps = torch.linspace(0.04, 0.07, 1 + steps // EPOCH).tolist()
    dino_loss = DINOLoss(PROTOTYPES, CROPS, teacher_temps)
    losses = []
    for step in range(steps):
        epoch = step // EPOCH
        images = torch.randn(IMAGES, 32)
        crops = torch.cat([images + 0.3 * torch.randn_like(images) for _ in range(CROPS)])
        teacher_output = teacher(crops[: 2 * IMAGES])
        student_output = student(crops)
        loss = dino_loss(student_output, teacher_output, epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
        losses.append(loss.item())
    return losses
