"""Every encoder by name: how to build it, and what the rest of the package asks about it.

Nothing outside this folder compares the name of an arch. To add one, see "Adding an encoder" in CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from muse_fast.config import PretrainConfig
from muse_fast.errors import did_you_mean, require
from muse_fast.models import resnet
from muse_fast.models.decoder import PYRAMID, dense_dim
from muse_fast.models.encoder import Encoder
from muse_fast.models.vit import PATCH, ViTEncoder, vit_flops
from muse_fast.runtime.options import flatten

OPTIONAL = ("model.attention", "model.recompute", "train.compile")
"""Settings that an encoder need not support; one that does not takes their defaults alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arch:
    build: Callable[..., Encoder]
    """Makes the encoder with random weights. Its keywords are ``drop_path``, ``image_size``, ``attention`` and
    ``recompute``, those of `muse_fast.models.backbone.build_backbone`; one that has no use for some ignores them."""
    widths: tuple[int, ...]
    """Channels of the four maps that the encoder gives the decoder, finest first."""
    strides: tuple[int, ...]
    """Pixels of the image per pixel of these maps: 4, 8, 16 and 32, or for a plain ViT four times its patch size."""
    flops: Callable[[int], int]
    """FLOPs of one forward of the encoder over an image with a side of so many pixels, two per multiply-add."""
    mark: tuple[str, tuple[int, ...]]
    """Name and shape of a tensor in the encoder's state dict that no other arch has: it tells whose weights a file
    holds."""
    supports: tuple[str, ...] = ()
    """Which of `OPTIONAL` it supports."""
    timm: str = ""
    """Architecture of timm whose tensor names the encoder has; empty if there is none: no export for timm then."""
    finetune_lr: float = 1e-5
    """Learning rate of the published fine-tuning for nucleus classification."""

    @property
    def image_dim(self) -> int:
        """Width of the image feature."""
        return self.widths[-1]

    @property
    def dense_dim(self) -> int:
        """Width D of the unified map and of a nucleus row."""
        return dense_dim(self.widths, self.strides)


def vit_arch(name: str, dim: int, heads: int) -> Arch:
    return Arch(
        build=partial(ViTEncoder, dim, heads),
        widths=(dim,) * 4,
        strides=(PATCH,) * 4,
        flops=partial(vit_flops, dim),
        mark=("encoder.cls_token", (1, 1, dim)),
        supports=OPTIONAL,
        timm=f"{name}_patch{PATCH}_224",
    )


ARCHS: dict[str, Arch] = {
    "vit_tiny": vit_arch("vit_tiny", 192, 3),
    "vit_small": vit_arch("vit_small", 384, 6),
    "vit_base": vit_arch("vit_base", 768, 12),
    "resnet50": Arch(
        build=resnet.ResNetEncoder,
        widths=resnet.WIDTHS,
        strides=PYRAMID,
        flops=resnet.resnet50_flops,
        mark=("encoder.layer4.2.conv3.weight", (2048, 512, 1, 1)),
        timm="resnet50",
        finetune_lr=4e-5,
    ),
}


def find_arch(name: str, key: str = "arch") -> Arch:
    """The arch of that name.

    Args:
        key: the setting or argument that gives the name, for the message.

    Raises:
        UserError: there is no such arch; the message names the nearest one.
    """
    require(name in ARCHS, key, name, f"one of {', '.join(ARCHS)}{did_you_mean(name, ARCHS)}")
    return ARCHS[name]


def check_model(config: PretrainConfig) -> None:
    """Refuse settings of a model that cannot be built.

    Raises:
        UserError: ``model.arch`` is unknown, or it does not support one of `OPTIONAL` that is set.
    """
    arch = find_arch(config.model.arch, "model.arch")
    values, defaults = (dict(flatten(dataclasses.asdict(one))) for one in (config, PretrainConfig()))
    for key in OPTIONAL:
        fits = key in arch.supports or values[key] == defaults[key]
        require(fits, key, values[key], f"{defaults[key]}; {config.model.arch} does not support this setting")
