"""ResNet-50 (He et al., 2016) of timm, with the interface of the ViT encoder."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast.models.encoder import conv_flops
from muse_fast.models.maps import BranchScale, MapsEncoder
from muse_fast.models.norm import BatchNorm2d, batch_norms

WIDTHS, BLOCKS = (256, 512, 1024, 2048), (3, 4, 6, 3)


class ResNetEncoder(MapsEncoder):
    """Returns maps at strides 4, 8, 16 and 32, and the mean of the last map as image feature.

    Stochastic depth rises linearly from 0 at the first block to ``drop_path`` at the last. Other options of
    encoders are ignored.
    """

    begins_with_convolution = True

    def __init__(self, *, drop_path: float = 0.0, **unused: object) -> None:
        import timm

        # As in MUSE's own encoder, the last norm of each block starts at zero, and so the block as its shortcut. DINO's
        # ResNet, torchvision's, starts that norm at one.
        network = timm.create_model(
            "resnet50",
            features_only=True,
            out_indices=(1, 2, 3, 4),
            norm_layer=BatchNorm2d,
            zero_init_last=True,
        )
        super().__init__(network)
        stem: Any = self.encoder
        blocks: list[Any] = [block for stage in range(1, 5) for block in stem[f"layer{stage}"]]
        self.branch_scales = [BranchScale() for _ in blocks]
        for block, branch_scale in zip(blocks, self.branch_scales, strict=True):
            block.drop_path = branch_scale
            block.forward = MethodType(_bottleneck, block)
            block.bn2.relu = True
        for part in (stem, *blocks):
            part.bn1.relu = True
        stem["act1"] = nn.Identity()
        self.drop_rates = [drop_path * i / (len(blocks) - 1) for i in range(len(blocks))]

    def layer_patterns(self) -> dict[str, str]:
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)\.(\d+)"}


def _bottleneck(block: Any, x: Tensor) -> Tensor:  # [I, c, h, h] -> [I, c', h', h']
    """The forward of timm's block, with norms, ReLUs and the addition in as few passes as `batch_norms` can."""
    branch = block.conv3(block.bn2(block.conv2(block.bn1(block.conv1(x)))))
    shortcut = x if block.downsample is None else block.downsample(x)
    if block.drop_path.scale is None:
        return batch_norms([branch], [block.bn3], [shortcut], relu=True)[0]
    return F.relu(block.drop_path(block.bn3(branch)) + shortcut)


def resnet50_flops(size: int) -> int:
    """FLOPs of one forward over an image of ``size`` pixels."""
    total, in_channels, in_side = conv_flops(size // 2, 3, 64, 7), 64, size // 4
    for width, stride, blocks in zip(WIDTHS, (4, 8, 16, 32), BLOCKS, strict=True):
        inner, side = width // 4, -(-size // stride)
        total += conv_flops(in_side, in_channels, inner) + conv_flops(side, in_channels, width)  # first conv, shortcut
        total += (blocks - 1) * conv_flops(side, width, inner)
        total += blocks * (conv_flops(side, inner, inner, 3) + conv_flops(side, inner, width))
        in_channels, in_side = width, side
    return total
