"""The network of the learned nucleus detector: the first three stages of ResNet-18 and a light decoder.

It returns one logit per cell of 2 x 2 pixels. Its input is optical density, which is linear in the amount of stain and
0 for glass, so the zero padding of convolutions looks like glass.
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
MULTIPLE = 16  # sides of the input are multiples of this; shifting the input by it shifts the heatmap
REACH = 144  # pixels further away than this do not influence a cell (a test measures it)

_PRIOR = 0.02  # approximate share of cells with the centre of a nucleus


def optical_density(image: Tensor) -> Tensor:
    """Intensities 0 to 255 -> ``-log10(I / 255)``, float32 of the same shape: 0 for white, 2.4 for black."""
    return -torch.log10(image.float().clamp(min=1) / 255)


class NucleusNet(nn.Module):
    """Optical density ``[B, 3, H, W]`` -> logits ``[B, H / 2, W / 2]`` of "the centre of a nucleus is here".

    The maps of stem and stages (strides 2, 4, 8, 16) are merged from coarse to fine, as in a feature pyramid network
    (Lin et al., 2017): project, double, add, 3x3 convolution.
    """

    arch = "resnet18"  # for messages
    WIDTHS = (32, 64, 64, 128)  # channels of the merged maps, finest first

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
