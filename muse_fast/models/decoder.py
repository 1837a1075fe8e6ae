"""Convolutional decoder: four encoder maps in, four projected levels or nucleus rows out (paper, "Architecture").

Parameter names are those of the published checkpoints. Every resize goes by target size, never by factor: 13 tokens
(208 px) halve to 6, and 6 times 8 would miss the 52 pixels of stride 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast import ops


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


class Projection(ConvBN):
    """1x1 convolution and BatchNorm, of a map or of rows sampled from it."""

    layer: Any  # convolution and norm, whose running statistics torch declares optional

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, relu=False)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[o]`` that BatchNorm would normalise the projected map by; the map is not stored.

        In training they are those of ``x``, ``[I, c, h, w]``, which the gradient reaches, and are remembered as
        BatchNorm does; in evaluation they are the remembered ones, and ``x`` is not looked at.
        """
        conv, norm = self.layer
        if not norm.training:
            return norm.running_mean, norm.running_var
        count = x.numel() // x.shape[1]
        if count < 2:
            raise ValueError(f"expected more than one position per channel in training, got a map {tuple(x.shape)}")
        mean, var = ops.projection_stats(x, conv.weight.flatten(1))
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
        return mean, var

    def rows(self, samples: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Rows ``[N, c]`` of the map, projected and normalised by its `statistics`: ``[N, o]`` in their dtype."""
        conv, norm = self.layer
        gain = norm.weight * torch.rsqrt(var + norm.eps)
        return ((F.linear(samples, conv.weight.flatten(1)) - mean) * gain + norm.bias).to(samples.dtype)


class HyperFeats(nn.Module):
    """Project every map to the same width; the maps keep their sizes.

    Given the statistics of the projected maps, projection and bilinear sampling are linear, and the weights of the
    sampling add up to 1: so the two change places, and rows need no projected map. ``project_rows`` of samples of the
    maps equals samples of ``forward``, with the same gradients and running statistics.
    """

    conv_list: Any  # of Projection; torch knows of modules alone

    def __init__(self, widths: Sequence[int], level_dim: int) -> None:
        super().__init__()
        self.widths = list(widths)
        self.conv_list = nn.ModuleList(Projection(width, level_dim) for width in widths)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(project(x) for project, x in zip(self.conv_list, maps, strict=True))

    def statistics(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance ``[level_dim]`` of every map once projected."""
        return [projection.statistics(x) for projection, x in zip(self.conv_list, maps, strict=True)]

    def project_rows(self, samples: Tensor, statistics: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """``[N, sum(widths)]`` sampled from the maps -> ``[N, D]``, as if sampled from the projected maps."""
        levels = zip(self.conv_list, samples.split(self.widths, dim=1), statistics, strict=True)
        return torch.cat([projection.rows(part, *moments) for projection, part, moments in levels], dim=1)


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
        """Four encoder maps, finest first -> four levels ``[I, level_dim, h_l, h_l]``; `unify` joins them."""
        return self.hyper_feats(self.decode(maps))

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Four encoder maps, finest first -> four of the same sizes and widths, not yet projected."""
        e1, e2, e3, e4 = maps
        d3 = self.decoder3(e4, e3)
        d2 = self.decoder2(d3, e2)
        d1 = self.decoder1(d2, e1)
        return d1, d2, d3, e4

    def nucleus_rows(self, maps: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
        """`sample_nuclei` of the projected levels, ``[N, D]``; neither they nor the unified map are computed.

        Args:
            maps: four encoder maps, finest first.
            xy: ``[N, 2]`` float32, pixels of the view.
            image_index: ``[N]`` int64, the image of each point; negative for padding, whose rows are zero.
            view_size: R, pixels along a side of the view.
        """
        decoded = self.decode(maps)
        decoded = tuple(x.to(decoded[0].dtype) for x in decoded)  # autocast leaves some resized maps in float32
        statistics = self.hyper_feats.statistics(decoded)  # first: their gradients then come last, one map at a time
        samples = ops.sample_nuclei(decoded, xy, image_index, view_size)
        rows = self.hyper_feats.project_rows(samples, statistics)
        return rows.masked_fill((image_index < 0).unsqueeze(1), 0)


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

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Four maps ``[I, C, g, g]`` -> four of sides 4g, 2g, g, g // 2 and widths C/4, C/2, C, 2C."""
        grid = maps[0].shape[-1]
        sides = (4 * grid, 2 * grid, grid, grid // 2)
        layers = zip(self.dim_map_layers, maps, sides, strict=True)
        return super().decode([resize(layer(tokens), side) for layer, tokens, side in layers])
