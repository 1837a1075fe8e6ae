"""Encoder and decoder as one model, which returns an image feature and a dense map to sample nuclei from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from muse_fast.images.imagenet import Normaliser, normalised
from muse_fast.models.archs import find_arch
from muse_fast.models.decoder import build_decoder, dense_dim, unify
from muse_fast.models.encoder import check_points

_Module = TypeVar("_Module", bound=nn.Module)


class Features(NamedTuple):
    """Output of a backbone for I images."""

    cls: Tensor  # [I, image_dim], the image feature
    levels: tuple[Tensor, ...]  # four [I, dense_dim / 4, h_l, h_l], stride 4 first; `unify` joins them


class Backbone(nn.Module):
    """MUSE backbone; build it with `build_backbone` or `muse_fast.load_backbone`.

    Images are RGB ``[I, 3, R, R]``, R a multiple of 16 from 32 to 1024 (networks of timm: among ``sides``); otherwise
    UserError. uint8 images are normalised here with the ImageNet mean and standard deviation; floating ones must be
    normalised already. The first call of `cls`, `dense_map` or `nucleus_features` warns if they look as if they were
    not. State-dict names are those of the published checkpoints.

    Attributes:
        arch: its name in `muse_fast.models.ARCHS`, or ``timm:NAME[:key=value ...]``.
        sides: allowed sides R.
        image_size: side in pixels that a ViT stores its position embedding for.
        pos_embed_resize: rule by which a ViT resizes it to other sides, see `muse_fast.models.vit.resampling`.
        decoder_dim: width D that was asked for; 0 if it follows from the encoder.
        taps: layers whose maps the decoder receives, if they were asked for.
        image_dim: width of the image feature (C for a ViT, 2048 for ResNet-50).
        dense_dim: width D of the unified map and of a nucleus row (C for a ViT, 1024 for ResNet-50).
        finetune_lr: learning rate of the published fine-tuning for nucleus classification.
    """

    def __init__(
        self,
        arch: str,
        drop_path: float,
        image_size: int,
        attention: str,
        recompute: str,
        pos_embed_resize: str,
        decoder_dim: int,
        taps: Sequence[int],
    ) -> None:
        super().__init__()
        self.arch, self.image_size, self.pos_embed_resize = arch, image_size, pos_embed_resize
        self.decoder_dim, self.taps = decoder_dim, tuple(taps)
        found = find_arch(arch, taps=taps)
        self.encoder = found.build(
            drop_path=drop_path,
            image_size=image_size,
            attention=attention,
            recompute=recompute,
            pos_embed_resize=pos_embed_resize,
        )
        self.decoder = build_decoder(found.widths, found.strides, decoder_dim)
        self.image_dim, self.dense_dim = found.image_dim, dense_dim(found.widths, found.strides, decoder_dim)
        self.sides, self.finetune_lr = found.sides, found.finetune_lr
        self._normalised = Normaliser()

    def forward(self, images: Tensor) -> Features:
        cls, encoded = self.encoder([normalised(images)])
        return Features(cls, self.decoder(encoded)[0])

    def cls(self, images: Tensor) -> Tensor:
        """Image features ``[I, image_dim]``; the decoder does not run."""
        return self.encoder([self._normalised(images)])[0]

    def dense_map(self, images: Tensor) -> Tensor:
        """The unified map ``[I, D, R/4, R/4]``; the point (x, y) of an image is at column ``x / R * (R/4 - 1)`` and row
        ``y / R * (R/4 - 1)``. Only points on the image have a place on the map, see `nucleus_features`.
        """
        return unify(self(self._normalised(images)).levels)

    def nucleus_features(self, images: Tensor, xy: Tensor, image_index: Tensor) -> Tensor:
        """One feature per nucleus, ``[N, D]``: the unified map sampled bilinearly, without computing the map.

        Args:
            images: ``[I, 3, R, R]``, uint8 or normalised floats.
            xy: ``[N, 2]`` float32, pixels of the image, origin at its top-left corner.
            image_index: ``[N]`` int64, the image of each point; negative for padding, whose rows are zero. Both may be
                on the CPU, where they are checked without waiting for a GPU.

        Raises:
            UserError: a point lies outside its image.
        """
        check_points(xy, image_index, images.shape[-1])
        xy, image_index = (one.to(images.device, non_blocking=True) for one in (xy, image_index))
        _, encoded = self.encoder([self._normalised(images)])
        return self.decoder.nucleus_rows(encoded, [(xy, image_index)], [images.shape[-1]])


class WithBackbone(nn.Module):
    """A backbone and heads on its features."""

    backbone: Backbone

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        raise NotImplementedError


def build_backbone(
    arch: str,
    *,
    drop_path: float = 0.0,
    image_size: int = 224,
    attention: str = "sdpa",
    recompute: str = "none",
    pos_embed_resize: str = "scale_factor",
    decoder_dim: int = 0,
    taps: Sequence[int] = (),
) -> Backbone:
    """Build a backbone with random weights from torch's global generator.

    Args:
        arch: a name in `muse_fast.models.ARCHS`, or ``timm:NAME[:key=value ...]``; UserError otherwise.
        drop_path: stochastic depth of the last layer, rising from 0 at the first. It only takes effect if a training
            step passes the scales drawn by `muse_fast.pretraining.drop_path` to the encoder.
        image_size: side in pixels that a ViT stores its position embedding for (any allowed side runs).
        attention: backend of a ViT, see `muse_fast.models.attention`.
        recompute: activations that the backward of a ViT recomputes: ``none``, ``selective`` or ``full``.
        pos_embed_resize: rule by which a ViT resizes its position embedding, see `muse_fast.models.vit.resampling`.
        decoder_dim: width D of the unified map, see `muse_fast.models.decoder.build_decoder`.
        taps: layers whose maps the decoder receives, see `muse_fast.models.archs.find_arch`.
    """
    return Backbone(arch, drop_path, image_size, attention, recompute, pos_embed_resize, decoder_dim, taps)


def random_twin_of(backbone: Backbone, image_size: int) -> Backbone:
    """Build a backbone of the same shape with random weights from torch's global generator.

    Args:
        image_size: see `build_backbone`.
    """
    return build_backbone(
        backbone.arch,
        image_size=image_size,
        pos_embed_resize=backbone.pos_embed_resize,
        decoder_dim=backbone.decoder_dim,
        taps=backbone.taps,
    )


def build_to_fill(arch: str, taps: Sequence[int], build: Callable[[], _Module]) -> _Module:
    """Build a module that contains a backbone and whose state a file will replace, without using up random numbers."""
    if not find_arch(arch, taps=taps).on_meta:  # some tensors are in no file, so they must be computed
        with torch.random.fork_rng(devices=[]):
            return build()
    with torch.device("meta"):  # no memory and no random draws
        module = build()
    return module.to_empty(device="cpu")
