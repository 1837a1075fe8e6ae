"""ImageNet's mean and standard deviation, by which images are normalised for every encoder."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(views: Tensor) -> Tensor:
    """uint8 ``[..., 3, R, R]`` -> float32, normalised with ImageNet's mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=views.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=views.device).view(3, 1, 1)
    return (views.float() / 255 - mean) / std


def denormalise(views: Tensor) -> Tensor:
    """The inverse of :func:`normalise`, to uint8."""
    mean = torch.tensor(IMAGENET_MEAN, device=views.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=views.device).view(3, 1, 1)
    return ((views.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
