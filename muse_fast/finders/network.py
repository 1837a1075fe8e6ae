"""The network of the learned nucleus detector: the first three stages of ResNet-18 and a light way back up.

It gives one logit per cell of 2 x 2 pixels. It takes optical density, which is linear in the amount of stain and 0 for
glass: the zeros that convolutions put around an image are glass too.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 2  # pixels per cell of the heatmap
MULTIPLE = 16  # sides of the input are multiples of this; shifts by it move the heatmap alike
REACH = 144  # pixels; what is further away than this has no influence on a cell (the test measures it)

_PRIOR = 0.02  # share of cells that are a nucleus' centre, about


def optical_density(image: Tensor) -> Tensor:
    """Intensities 0 to 255 -> ``-log10(I / 255)``, float32 of the same shape: 0 for white, 2.4 for black."""
    return -torch.log10(image.float().clamp(min=1) / 255)


class NucleusNet(nn.Module):
    """Optical density ``[B, 3, H, W]`` -> logits ``[B, H / 2, W / 2]`` of "a nucleus has its centre here".

    The maps of stem and stages (strides 2, 4, 8, 16) are joined from coarse to fine, as in a feature pyramid network
    (Lin et al., 2017): project, double, add, 3x3 convolution.
    """

    arch = "resnet18"
    WIDTHS = (32, 64, 64, 128)  # of the joined maps, finest first

    def __init__(self) -> None:
        super().__init__()
        encoder: Any = timm.create_model("resnet18", features_only=True, out_indices=(0, 1, 2, 3))
        channels = encoder.feature_info.channels()
        self.encoder = encoder
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c, width in zip(channels, self.WIDTHS, strict=True))
        self.project = nn.ModuleList(nn.Conv2d(coarse, fine, 1, bias=False) for fine, coarse in pairwise(self.WIDTHS))
        self.fuse = nn.ModuleList(_conv_bn_relu(width) for width in self.WIDTHS[:-1])
        self.head = nn.Conv2d(self.WIDTHS[0], 1, 1)
        nn.init.constant_(self.head.get_parameter("bias"), math.log(_PRIOR / (1 - _PRIOR)))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on CPUs

    def forward(self, density: Tensor) -> Tensor:
        *finer, coarsest = self.encoder(density.contiguous(memory_format=torch.channels_last))
        x = self.lateral[-1](coarsest)
        for level in reversed(range(len(finer))):
            x = F.interpolate(self.project[level](x), scale_factor=2, mode="bilinear")
            x = self.fuse[level](x + self.lateral[level](finer[level]))
        logits: Tensor = self.head(x)
        return logits[:, 0].float()


def _conv_bn_relu(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
