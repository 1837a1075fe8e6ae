"""Encoder and decoder as one model: an image feature, and a dense map to read nuclei from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from muse_fast.config import check_arch
from muse_fast.models import resnet
from muse_fast.models.decoder import Decoder, TokenDecoder, unify
from muse_fast.models.resnet import ResNetEncoder
from muse_fast.models.vit import ViTEncoder

VIT_DIMS_AND_HEADS = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}


class Features(NamedTuple):
    """What a backbone gives for I images."""

    cls: Tensor  # [I, image_dim], the image feature
    levels: tuple[Tensor, ...]  # four [I, dense_dim / 4, h_l, h_l], stride 4 first; `unify` joins them


class Backbone(nn.Module):
    """MUSE backbone; build it with `build_backbone` or `muse_fast.load_backbone`.

    Images are float ``[I, 3, R, R]``, normalised with the ImageNet mean and standard deviation, R a multiple of 16
    from 32 to 1024; UserError otherwise. State-dict names are those of the published checkpoints.

    Attributes:
        arch: one of `ARCHS`.
        image_dim: width of the image feature (C for a ViT, 2048 for ResNet-50).
        dense_dim: width D of the unified map and of a nucleus row (C for a ViT, 1024 for ResNet-50).
    """

    def __init__(self, arch: str, drop_path: float, image_size: int, attention: str, recompute: str) -> None:
        super().__init__()
        self.arch = arch
        self.encoder: ViTEncoder | ResNetEncoder
        self.decoder: Decoder
        if arch in VIT_DIMS_AND_HEADS:
            dim, heads = VIT_DIMS_AND_HEADS[arch]
            self.encoder = ViTEncoder(
                dim, heads, drop_path=drop_path, image_size=image_size, attention=attention, recompute=recompute
            )
            self.decoder = TokenDecoder(dim)
            self.image_dim = self.dense_dim = dim
        else:
            self.encoder = ResNetEncoder(drop_path=drop_path)
            self.image_dim, self.dense_dim = resnet.WIDTHS[-1], resnet.WIDTHS[-1] // 2
            self.decoder = Decoder(resnet.WIDTHS, self.dense_dim // 4)

    def forward(self, images: Tensor) -> Features:
        cls, encoded = self.encoder([images])
        return Features(cls, self.decoder(encoded)[0])

    def cls(self, images: Tensor) -> Tensor:
        """Image features ``[I, image_dim]``; the decoder does not run."""
        return self.encoder([images])[0]

    def dense_map(self, images: Tensor) -> Tensor:
        """The unified map ``[I, D, R/4, R/4]``."""
        return unify(self(images).levels)

    def nucleus_features(self, images: Tensor, xy: Tensor, image_index: Tensor) -> Tensor:
        """One feature per nucleus, ``[N, D]``: the unified map, read bilinearly at every point, without the map.

        Args:
            images: ``[I, 3, R, R]``.
            xy: ``[N, 2]`` float32, pixels of the image, origin at its top-left corner.
            image_index: ``[N]`` int64, the image of every point.
        """
        _, encoded = self.encoder([images])
        return self.decoder.nucleus_rows(encoded, [(xy, image_index)], [images.shape[-1]])


def build_backbone(
    arch: str, *, drop_path: float = 0.0, image_size: int = 224, attention: str = "sdpa", recompute: str = "none"
) -> Backbone:
    """A backbone with random weights, drawn from torch's global generator.

    Args:
        arch: one of `ARCHS`; UserError otherwise.
        drop_path: stochastic depth of the last layer, from 0 at the first. It acts where a training step gives the
            encoder the scales that `muse_fast.pretraining.drop_path` draws, not by itself.
        image_size: side in pixels that a ViT stores its position embedding for (any allowed side runs).
        attention: of a ViT, see `muse_fast.models.attention`.
        recompute: of a ViT, ``none``, ``selective`` or ``full``: activations that the backward computes again.
    """
    check_arch(arch)
    return Backbone(arch, drop_path, image_size, attention, recompute)
