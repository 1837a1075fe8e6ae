"""Convolutional decoder: four encoder maps in, four projected levels or nucleus rows out (paper, "Architecture").

Parameter names are those of the published checkpoints. Every resize is to a target size, never by a factor: 13 tokens
(208 px) halve to 6, and 6 times 8 is not the 52 pixels of stride 4.

A group contains the images of one resolution. Layers process all groups together: each group has its own BatchNorm
statistics, and on several ranks one collective serves all groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast import ops
from muse_fast.models.encoder import Maps, conv_flops
from muse_fast.models.norm import batch_norms, normalising_moments, synced_moments, update_running_stats
from muse_fast.models.vit import PackedTokens

PYRAMID = (4, 8, 16, 32)
"""Strides of the maps that decoding starts from."""

Moments = tuple[Tensor, Tensor]
"""Mean and variance per channel."""


class RowProjection(NamedTuple):
    """How samples of all levels ``[n, sum(widths)]`` become rows ``[n, D]``: ``samples @ weight.T + bias``."""

    weight: Tensor  # [D, sum(widths)]: a block per level, 0 elsewhere; under autocast both in its dtype
    bias: Tensor  # [D]


class Level(NamedTuple):
    """A map of a pyramid, which is resized where it is concatenated with another."""

    map: Tensor  # [I, c, h, h]
    side: int  # that it is resized to


def unify(levels: Sequence[Tensor]) -> Tensor:
    """Four levels ``[I, D/4, h_l, h_l]``, finest first -> the unified map ``[I, D, h_0, h_0]``."""
    return ops.resize_concat(levels, levels[0].shape[-1])


class ConvBN(nn.Module):
    """Convolution without bias, BatchNorm and optional ReLU, applied to every group; sizes do not change."""

    layer: Any  # convolution and norm

    def __init__(self, in_channels: int, out_channels: int, kernel: int, relu: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.layer = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
        self.relu = relu

    def forward(self, groups: Iterable[Tensor], residuals: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Residuals are added before ReLU."""
        conv, norm = self.layer
        maps = [conv(x) for x in groups]
        return batch_norms(maps, [norm] * len(maps), residuals, self.relu)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, channels, 3, relu=True)
        self.conv2 = ConvBN(channels, channels, 3, relu=True)

    def forward(self, groups: Sequence[Tensor]) -> list[Tensor]:
        return self.conv2(self.conv1(groups), residuals=groups)


class UpBlock(nn.Module):
    """U(coarse, fine): resize both to the side of ``fine``, concatenate them, and convolve to the width of ``fine``."""

    def __init__(self, coarse_channels: int, fine_channels: int) -> None:
        super().__init__()
        self.first_block = ConvBN(coarse_channels + fine_channels, fine_channels, 3, relu=True)
        self.last_block = ResidualBlock(fine_channels)

    def forward(self, coarse: Iterable[Tensor], fine: Iterable[Level]) -> list[Tensor]:
        pairs = zip(coarse, fine, strict=True)
        return self.last_block(self.first_block(ops.resize_concat([c, f.map], f.side) for c, f in pairs))


class Projection(ConvBN):
    """1x1 convolution and BatchNorm of maps, or of rows sampled from them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, relu=False)

    def moments(self, x: Tensor) -> Moments:
        """Mean and biased variance ``[o]`` of the projection of ``x [I, c, h, w]``, which is not stored."""
        conv, _ = self.layer
        return ops.projection_stats(x, conv.weight.flatten(1))


class HyperFeats(nn.Module):
    """Project every map to the same width; sizes do not change.

    Given the statistics of the projected maps, projection and bilinear sampling are linear, and the sampling weights
    sum to 1. So the two commute, and rows do not need the projected map: samples of the maps, projected as
    `row_projections` says, equal samples of ``forward``, with the same gradients and running statistics.
    """

    conv_list: Any  # of Projection; torch types its entries as Module

    def __init__(self, widths: Sequence[int], level_dim: int) -> None:
        super().__init__()
        self.conv_list = nn.ModuleList(Projection(width, level_dim) for width in widths)

    def forward(self, groups: Sequence[Maps]) -> list[Maps]:
        levels = zip(self.conv_list, zip(*groups, strict=True), strict=True)
        return list(zip(*(project(maps) for project, maps in levels), strict=True))

    def row_projections(self, groups: Sequence[Maps]) -> list[RowProjection]:
        """How samples of the maps become rows, per group: one product for all levels, with BatchNorm folded into it,
        ``(W x - mean) gain + beta = (gain W) x + (beta - gain mean)``.

        In training by the moments of the projections, with gradients, and the running statistics are updated; in
        evaluation by the running statistics, and the maps are not read.
        """
        convs, norms = zip(*(projection.layer for projection in self.conv_list), strict=True)
        weight = torch.block_diag(*(conv.weight.flatten(1) for conv in convs))
        scale, beta = torch.cat([norm.weight for norm in norms]), torch.cat([norm.bias for norm in norms])
        projections = []
        for of_group in self._moments(groups):
            mean, var = (torch.cat(of_levels) for of_levels in zip(*of_group, strict=True))
            gain = scale * torch.rsqrt(var + norms[0].eps)
            folded = gain.unsqueeze(1) * weight, beta - gain * mean
            projections.append(RowProjection(*map(_cast_for_autocast, folded)))
        return projections

    def _moments(self, groups: Sequence[Maps]) -> list[list[Moments]]:
        """Mean and variance by which BatchNorm would normalise the projected maps, per group and level."""
        norms = [projection.layer[1] for projection in self.conv_list]
        if not self.training:
            return [[(norm.running_mean, norm.running_var) for norm in norms] for _ in groups]
        levels, norms = len(norms), norms * len(groups)
        maps = [x for group in groups for x in group]
        projections = [*self.conv_list] * len(groups)
        means, variances = zip(*(p.moments(x) for p, x in zip(projections, maps, strict=True)), strict=True)
        moments = []
        counts = [x.numel() // x.shape[1] for x in maps]
        for norm, (mean, var, count) in zip(norms, synced_moments(means, variances, counts), strict=True):
            moments.append(normalising_moments(norm, mean, var, count))
            update_running_stats(norm, mean, var, count)
        return [moments[first : first + levels] for first in range(0, len(moments), levels)]


def _cast_for_autocast(x: Tensor) -> Tensor:
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype == torch.float32
    return x.to(torch.get_autocast_dtype(device)) if is_cast else x


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

    def forward(self, encoded: Any) -> list[Maps]:
        """Output of the encoder -> four levels ``[I, level_dim, h_l, h_l]`` per group; `unify` joins them."""
        return self.hyper_feats(self.decode(self.pyramids(encoded)))

    def pyramids(self, encoded: Any) -> list[list[Level]]:
        """The four levels per group, finest first, that decoding starts from, in the dtype of autocast.

        Under autocast some networks, such as ConvNeXt, return float32 maps.
        """
        return [[Level(_cast_for_autocast(x), x.shape[-1]) for x in maps] for maps in encoded]

    def decode(self, pyramids: Sequence[Sequence[Level]]) -> list[Maps]:
        """Four levels per group, finest first -> maps of the same sides and widths, not yet projected."""
        e1, e2, e3, coarsest = zip(*pyramids, strict=True)
        e4 = [ops.resize_concat([level.map], level.side) for level in coarsest]
        d3 = self.decoder3(e4, e3)
        d2 = self.decoder2(d3, e2)
        d1 = self.decoder1(d2, e1)
        return list(zip(d1, d2, d3, e4, strict=True))

    def nucleus_rows(self, encoded: Any, points: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int]) -> Tensor:
        """Samples of the projected levels at nuclei, ``[N, D]``, group after group, without computing these levels.

        Args:
            encoded: output of the encoder.
            points: per group ``xy [n, 2]`` float32, pixels of the view, and ``image_index [n]`` int64, the image of
                each point in its group; negative for padding, whose rows are zero.
            sizes: R, side of the views of each group in pixels.
        """
        padding = torch.cat([image_index < 0 for _, image_index in points])
        return self.rows(*self.sampled(encoded), points, sizes).masked_fill(padding.unsqueeze(1), 0)

    def sampled(self, encoded: Any) -> tuple[list[Maps], list[RowProjection]]:
        """The part of `nucleus_rows` that does not depend on the nuclei: per group, what `rows` samples."""
        decoded = self.decode(self.pyramids(encoded))
        return decoded, self.hyper_feats.row_projections(decoded)

    def rows(
        self,
        decoded: Sequence[Maps],
        projections: Sequence[RowProjection],
        points: Sequence[tuple[Tensor, Tensor]],
        sizes: Sequence[int],
    ) -> Tensor:
        """The rest of `nucleus_rows`, ``[N, D]``, for points without padding.

        It runs after the statistics, so that their gradients follow those of the samples, one map at a time.
        """
        samples = [ops.sample_nuclei(maps, *of, size) for maps, of, size in zip(decoded, points, sizes, strict=True)]
        return torch.cat([F.linear(x, *projection) for x, projection in zip(samples, projections, strict=True)])


class MappedDecoder(Decoder):
    """Decoder whose maps are first brought to the widths of a pyramid by 1x1 convolutions.

    Args:
        widths: channels of the four maps.
        dim: D; the pyramid has D/4, D/2, D and 2D channels, a level has D/4.
    """

    dim_map_layers: Any

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__(pyramid_widths(dim), dim // 4)
        pairs = zip(widths, pyramid_widths(dim), strict=True)
        layers = [nn.Conv2d(width, target, 1, bias=False) for width, target in pairs]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="linear")
        self.dim_map_layers = nn.ModuleList(layers)

    def pyramids(self, encoded: Any) -> list[list[Level]]:
        layers = self.dim_map_layers
        return super().pyramids([[layer(x) for layer, x in zip(layers, maps, strict=True)] for maps in encoded])


class TokenDecoder(MappedDecoder):
    """Decoder over four ViT layers, whose tokens are first reassembled into a pyramid.

    Args:
        width: C, width of the tokens.
        patch: P, side of a token's patch in pixels.
        dim: D, see `MappedDecoder`; C by default.
    """

    def __init__(self, width: int, patch: int = 16, dim: int = 0) -> None:
        super().__init__((width,) * 4, dim or width)
        self.patch = patch

    def pyramids(self, encoded: PackedTokens) -> list[list[Level]]:
        """Tokens of views of side R = gP -> four levels per group, of sides R // 4, R // 8, R // 16 and R // 32."""
        grids = [math.isqrt(tokens - encoded.prefix) for _, tokens in encoded.layout]
        levels = []
        for layer, tokens, stride in zip(self.dim_map_layers, encoded.taps, PYRAMID, strict=True):
            # A 1x1 convolution over the packed rows; its result already is a channels-last map.
            rows = encoded.split(F.linear(tokens, layer.weight.flatten(1)))
            patches = (x[:, encoded.prefix :] for x in rows)
            maps = [x.unflatten(1, (g, g)).permute(0, 3, 1, 2) for x, g in zip(patches, grids, strict=True)]
            levels.append([Level(x, self.patch * g // stride) for x, g in zip(maps, grids, strict=True)])
        return [list(levels_of_group) for levels_of_group in zip(*levels, strict=True)]


def pyramid_widths(dim: int) -> tuple[int, int, int, int]:
    """Widths of the pyramid of a decoder whose unified map is ``dim`` wide."""
    return dim // 4, dim // 2, dim, 2 * dim


def dense_dim(widths: tuple[int, ...], strides: tuple[int, ...], dim: int = 0) -> int:
    """Width D of a nucleus row and of the unified map, for the decoder of `build_decoder`."""
    return dim or 4 * ((widths[-1] // 2 if strides == PYRAMID else widths[-1]) // 4)


def build_decoder(widths: tuple[int, ...], strides: tuple[int, ...], dim: int = 0) -> Decoder:
    """Build the decoder for an encoder whose four maps have these widths and strides, with random weights.

    A pyramid is decoded directly; tokens, whose widths and strides are all equal, are reassembled into a pyramid first.

    Args:
        dim: width D of the unified map, a multiple of 4. By default it follows from the encoder: C for tokens of width
            C, half the width of the coarsest map for a pyramid. Other pyramids are brought to D/4, D/2, D and 2D.
    """
    wanted = dense_dim(widths, strides, dim)
    if strides == PYRAMID:
        return MappedDecoder(widths, dim) if _is_mapped(widths, dim) else Decoder(widths, wanted // 4)
    if len({*strides}) > 1 or len({*widths}) > 1:
        raise ValueError(f"no decoder for maps of widths {widths} at strides {strides}")
    return TokenDecoder(widths[0], strides[0], wanted)


def _is_mapped(widths: tuple[int, ...], dim: int) -> bool:
    """Whether a pyramid must be brought to other widths for a unified map of ``dim`` channels, 0 for the default."""
    return dim > 0 and widths != pyramid_widths(dim)


def decoder_flops(widths: tuple[int, ...], strides: tuple[int, ...], size: int, dim: int = 0) -> int:
    """FLOPs of one forward of the decoder of `build_decoder`, with projections, over an image of ``size`` pixels."""
    wanted = dense_dim(widths, strides, dim)
    total, sides = 0, [-(-size // stride) for stride in strides]
    if strides != PYRAMID or _is_mapped(widths, dim):
        mapped = pyramid_widths(wanted)
        total += sum(conv_flops(side, *pair) for side, *pair in zip(sides, widths, mapped, strict=True))
        widths = mapped
    if strides != PYRAMID:
        sides = [size // stride for stride in PYRAMID]
    # An up block convolves the concatenated maps of two levels to the finer width; two more convolutions follow.
    for side, (fine, coarse) in zip(sides, pairwise(widths), strict=False):
        total += conv_flops(side, coarse + 3 * fine, fine, 3)
    return total + sum(conv_flops(side, width, wanted // 4) for side, width in zip(sides, widths, strict=True))
