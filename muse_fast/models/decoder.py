"""Convolutional decoder: four encoder maps in, four projected levels out (paper, "Architecture").

Parameter names are those of the published checkpoints. Every resize goes by target size, never by factor: 13 tokens
(208 px) halve to 6, and 6 times 8 would miss the 52 pixels of stride 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, side: int) -> Tensor:
    """``[I, c, h, h]`` -> ``[I, c, side, side]``, bilinear with aligned corners."""
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=True)


def unify(levels: Sequence[Tensor]) -> Tensor:
    """Four levels ``[I, D/4, h_l, h_l]``, finest first -> the unified map ``[I, D, h_0, h_0]``."""
    return torch.cat([resize(level, levels[0].shape[-1]) for level in levels], dim=1)


class ConvBN(nn.Module):
    """Convolution without bias, BatchNorm, and ReLU where asked for; the size stays."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, relu: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        norm = nn.BatchNorm2d(out_channels)
        self.layer = nn.Sequential(conv, norm, nn.ReLU(inplace=True)) if relu else nn.Sequential(conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, channels, 3, relu=True)
        self.conv2 = ConvBN(channels, channels, 3, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.conv1(x)) + x)


class UpBlock(nn.Module):
    """U(coarse, fine): bring ``coarse`` to the size of ``fine``, join them, and mix at the width of ``fine``."""

    def __init__(self, coarse_channels: int, fine_channels: int) -> None:
        super().__init__()
        self.first_block = ConvBN(coarse_channels + fine_channels, fine_channels, 3, relu=True)
        self.last_block = ResidualBlock(fine_channels)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return self.last_block(self.first_block(torch.cat([resize(coarse, fine.shape[-1]), fine], dim=1)))


class HyperFeats(nn.Module):
    """Project every level to the same width; the levels keep their sizes."""

    def __init__(self, widths: Sequence[int], level_dim: int) -> None:
        super().__init__()
        self.conv_list = nn.ModuleList(ConvBN(width, level_dim, 1, relu=False) for width in widths)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(project(level) for project, level in zip(self.conv_list, levels, strict=True))


class Decoder(nn.Module):
    """Decoder over a pyramid of maps at strides 4, 8, 16 and 32.

    Args:
        widths: channels of the four maps, finest first.
        level_dim: channels of each projected level.
    """

    def __init__(self, widths: Sequence[int], level_dim: int) -> None:
        super().__init__()
        w1, w2, w3, w4 = widths
        self.decoder3 = UpBlock(w4, w3)
        self.decoder2 = UpBlock(w3, w2)
        self.decoder1 = UpBlock(w2, w1)
        self.hyper_feats = HyperFeats(widths, level_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Four maps, finest first -> four levels ``[I, level_dim, h_l, h_l]`` of the same sizes; `unify` joins them."""
        e1, e2, e3, e4 = maps
        d3 = self.decoder3(e4, e3)
        d2 = self.decoder2(d3, e2)
        d1 = self.decoder1(d2, e1)
        return self.hyper_feats([d1, d2, d3, e4])


class TokenDecoder(Decoder):
    """Decoder over four ViT maps of one size, which are first reassembled into a pyramid.

    Args:
        dim: width C of the encoder; the pyramid has C/4, C/2, C and 2C channels, a level has C/4.
    """

    def __init__(self, dim: int) -> None:
        widths = (dim // 4, dim // 2, dim, 2 * dim)
        super().__init__(widths, dim // 4)
        layers = [nn.Conv2d(dim, width, 1, bias=False) for width in widths]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="linear")
        self.dim_map_layers = nn.ModuleList(layers)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Four maps ``[I, C, g, g]`` -> four levels ``[I, C/4, h_l, h_l]`` with h_l = 4g, 2g, g, g // 2."""
        grid = maps[0].shape[-1]
        sides = (4 * grid, 2 * grid, grid, grid // 2)
        layers = zip(self.dim_map_layers, maps, sides, strict=True)
        return super().forward([resize(layer(tokens), side) for layer, tokens, side in layers])
