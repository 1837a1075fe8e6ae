"""Encoders that process images of one size at a time and return maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from muse_fast.models.encoder import SIDES, Encoder, Maps, check_images
from muse_fast.models.norm import over_ranks
from muse_fast.models.vit import PackedTokens


class BranchScale(nn.Module):
    """Replaces timm's drop path; scales are set from outside, one per image and branch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor | None = None  # [I]

    def forward(self, x: Tensor) -> Tensor:  # [I, ...] -> [I, ...]
        return x if self.scale is None else (x * self.scale.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)


class MapsEncoder(Encoder):
    """Runs a network on one group of images after another.

    BatchNorm computes its statistics per group and over all ranks. Layers of the class ``DropPath`` of timm keep their
    rates, but drop what the training step has drawn.

    Args:
        network: images ``[I, 3, R, R]`` -> four maps ``[I, c, h, h]``, finest first, or an image feature ``[I, C]`` and
            such maps. Without one, the image feature is the mean of the last map.
        sides: allowed R.
        plain: whether the maps have one stride, as those of a plain ViT.
    """

    def __init__(self, network: nn.Module, sides: range = SIDES, plain: bool = False) -> None:
        super().__init__()
        self.encoder, self.sides, self.plain = network, sides, plain
        over_ranks(network)
        self.branch_scales, self.drop_rates = replace_drop_path(network)

    def run(self, images: Tensor) -> tuple[Tensor, Maps]:
        """Images of one size -> image features and maps."""
        found = self.encoder(images)
        feature, maps = found if isinstance(found[0], Tensor) and found[0].ndim == 2 else (None, found)
        return maps[-1].mean(dim=(2, 3)) if feature is None else feature, tuple(maps)

    def forward(self, groups: Sequence[Tensor], scales: Tensor | None = None) -> tuple[Tensor, Any]:
        """Groups of images ``[I, 3, R, R]`` -> image features ``[images, C]``, and four maps per group.

        Args:
            scales: of the residual branches per image, ``[branches, images of all groups]``, for stochastic depth.
        """
        features, maps, first = [], [], 0
        for images in groups:
            check_images(images, self.sides)
            for branch, branch_scale in enumerate(self.branch_scales):
                branch_scale.scale = None if scales is None else scales[branch, first : first + len(images)]
            feature, of_group = self.run(images)
            features.append(feature)
            maps.append(of_group)
            first += len(images)
        return torch.cat(features), packed(maps) if self.plain else maps


def replace_drop_path(network: nn.Module) -> tuple[list[BranchScale], list[float]]:
    """Replace every ``DropPath`` of timm in place; return the replacements and their rates."""
    from timm.layers import DropPath

    scales, rates = [], []
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath):
                scales.append(BranchScale())
                rates.append(child.drop_prob)
                setattr(parent, name, scales[-1])
    return scales, rates


def packed(groups: Sequence[Maps]) -> PackedTokens:
    """Four maps ``[I, C, g, g]`` of one size per group -> tokens of all groups, without prefix tokens."""
    layout = tuple((len(maps[0]), maps[0].shape[2] * maps[0].shape[3]) for maps in groups)
    taps = (
        torch.cat([x.flatten(2).transpose(1, 2).flatten(0, 1) for x in level]) for level in zip(*groups, strict=True)
    )
    return PackedTokens(tuple(taps), layout, prefix=0)
