"""Interface of every encoder, checks of its images, and counting of FLOPs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muse_fast.errors import UserError

MAX_SIDE = 1024
SIDES = range(32, MAX_SIDE + 1, 16)
"""Allowed sides of an image in pixels, unless an encoder has others."""

Maps = tuple[Tensor, ...]
"""Four maps of images of one resolution, finest first."""


class Encoder(nn.Module):
    """A network that turns images into image features and into the input of the decoder.

    Attributes:
        encoder: the network itself; an export for timm stores its tensors under the network's own names.
        drop_rates: stochastic depth of every residual branch, first to last.
        begins_with_convolution: whether autocast casts images before anything is computed with them.
    """

    encoder: Any
    drop_rates: list[float]
    begins_with_convolution = False

    @property
    def layers(self) -> Iterable[nn.Module]:
        """Layers of the same shape, which ``train.compile`` compiles and FSDP shards one by one; none by default."""
        return ()

    def layer_numbers(self) -> dict[str, int]:
        """Number of the layer of every parameter of ``encoder``, by name: 0 for the stem, then 1, 2, ... as timm orders
        them for a decay of the learning rate; "" is what follows the network.

        Raises:
            UserError: the network does not say which layers it has.
        """
        from timm.models._manipulate import group_with_matcher

        names = [(name, None) for name, _ in self.encoder.named_parameters()]
        found: dict[str, int] = group_with_matcher(iter([*names, ("", None)]), self.layer_patterns(), reverse=True)
        return found

    def layer_patterns(self) -> Any:
        """What names of the network's parameters look like, layer after layer, in the form of timm's
        ``group_matcher``.
        """
        if not hasattr(self.encoder, "group_matcher"):
            raise UserError(
                f"optim.layer_decay: expected 1, as {type(self.encoder).__name__} does not say which layers it has (it "
                "has no group_matcher, see timm)"
            )
        return self.encoder.group_matcher(coarse=False)

    def forward(self, groups: Sequence[Tensor], scales: Tensor | None = None) -> tuple[Tensor, Any]:
        """Encode groups of images of one resolution each.

        Args:
            groups: ``[I, 3, R, R]`` each, see `check_images` for the allowed R.
            scales: factors of the residual branches per image, ``[branches, images of all groups]``, for stochastic
                depth; None drops nothing.

        Returns:
            Image features ``[images of all groups, C]`` and, for the decoder, `Maps` per group, or
            `muse_fast.models.vit.PackedTokens` from a plain ViT.
        """
        raise NotImplementedError


def check_images(images: Tensor, sides: range = SIDES) -> None:
    """Raise UserError unless ``images`` is ``[I, 3, R, R]`` with R among ``sides``."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise UserError(f"images must be square, [I, 3, R, R]; got {list(images.shape)}. Crop or pad them first.")
    check_image_size(images.shape[-1], sides)


def check_image_size(side: int, sides: range = SIDES) -> None:
    """Raise UserError unless ``side`` is among ``sides``."""
    if side not in sides:
        raise UserError(
            f"an image side of {side} px does not fit: it must be {describe_sides(sides)}, such as "
            f"{nearest(side, sides)}. Resize or pad the images, or cut larger ones into tiles."
        )


def check_points(xy: Tensor, image_index: Tensor, side: int) -> None:
    """Raise UserError unless all points ``xy [N, 2]`` lie on their images of ``side`` pixels, borders included.

    Padding, whose index is negative, may lie anywhere. Compiled code does not check.
    """
    if torch.compiler.is_compiling():
        return
    outside = ~((xy >= 0) & (xy <= side)).all(dim=-1) & (image_index >= 0)
    if outside.any():
        row = int(outside.nonzero()[0])
        x, y = xy[row].tolist()
        raise UserError(
            f"xy: {int(outside.sum())} of {len(xy)} points lie outside images of {side} x {side} px (row {row} at "
            f"{x:g}, {y:g} is the first); expected pixels of the image that is passed, x right, y down"
        )


def describe_sides(sides: range) -> str:
    return f"a multiple of {sides.step} from {sides[0]} to {sides[-1]}"


def nearest(side: int, sides: range) -> int:
    """The allowed side nearest to ``side``."""
    return min(sides, key=lambda one: abs(one - side))


def count_flops(encoder: Encoder, side: int) -> int:
    """Run an encoder without gradients on an image of ``side`` pixels and count its FLOPs, two per multiply-add."""
    images = torch.zeros(1, 3, side, side, device=next(encoder.parameters()).device)
    # Only the plain kernel of attention is counted on every device.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        encoder([images])
    return counter.get_total_flops()


def conv_flops(side: int, in_channels: int, out_channels: int, kernel: int = 1) -> int:
    """FLOPs, two per multiply-add, of a convolution with ``side * side`` outputs; side 1: of a linear layer per row."""
    return 2 * side**2 * in_channels * out_channels * kernel**2
