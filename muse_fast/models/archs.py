"""The registry of encoders: how to build each, and its properties that the rest of the package uses.

Code outside this folder never compares names of architectures. To add one, see "Adding an encoder" in CONTRIBUTING.md.
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
"""Settings that an encoder need not support; without support, only their defaults are allowed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arch:
    build: Callable[..., Encoder]
    """Builds the encoder with random weights. Its keywords are those of `muse_fast.models.backbone.build_backbone`:
    ``drop_path``, ``image_size``, ``attention``, ``recompute`` and ``pos_embed_resize``; it may ignore some of them."""
    widths: tuple[int, ...]
    """Channels of the four maps that the decoder receives, finest first."""
    strides: tuple[int, ...]
    """Strides of these maps, in pixels of the image: 4, 8, 16 and 32, or for a plain ViT its patch size four times."""
    flops: Callable[[int], int]
    """Side of an image in pixels -> FLOPs of one forward of the encoder over it, two per multiply-add."""
    mark: tuple[str, tuple[int, ...]]
    """Name and shape of a tensor in the encoder's state dict that no other arch has; identifies the weights in a
    file."""
    supports: tuple[str, ...] = ()
    """Which of `OPTIONAL` it supports."""
    timm: str = ""
    """Architecture of timm with the same tensor names; if empty, there is no export for timm."""
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
    """Look up an architecture by name.

    Args:
        key: the setting or argument that ``name`` comes from, for the message.

    Raises:
        UserError: there is no such arch; the message suggests the closest one.
    """
    require(name in ARCHS, key, name, f"one of {', '.join(ARCHS)}{did_you_mean(name, ARCHS)}")
    return ARCHS[name]


def check_model(config: PretrainConfig) -> None:
    """Check that the model can be built with these settings.

    Raises:
        UserError: ``model.arch`` is unknown or does not support a setting of `OPTIONAL`.
    """
    arch = find_arch(config.model.arch, "model.arch")
    values, defaults = (dict(flatten(dataclasses.asdict(one))) for one in (config, PretrainConfig()))
    for key in OPTIONAL:
        fits = key in arch.supports or values[key] == defaults[key]
        require(fits, key, values[key], f"{defaults[key]}; {config.model.arch} does not support this setting")
