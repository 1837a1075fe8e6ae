"""A small DINO training script with the loss of kernels/."""

import copy

import torch
from torch import nn

import kernels

CROPS, IMAGES, PROTOTYPES, EPOCH = 6, 16, 4096, 10  # crops of an image, two of them global; steps of an epoch


def train(steps):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, PROTOTYPES, bias=False))
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    teacher_temps = torch.linspace(0.04, 0.07, 1 + steps // EPOCH).tolist()
    dino_loss = kernels.DINOLoss(PROTOTYPES, CROPS)
    losses = []
    for step in range(steps):
        epoch = step // EPOCH
        images = torch.randn(IMAGES, 32)
        crops = torch.cat([images + 0.3 * torch.randn_like(images) for _ in range(CROPS)])
        teacher_output = teacher(crops[: 2 * IMAGES])
        student_output = student(crops)
        loss = dino_loss(student_output, teacher_output, teacher_temp=teacher_temps[epoch], update_center=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
        losses.append(loss.item())
    return losses
