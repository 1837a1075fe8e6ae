"""The registry of encoders: how to build each, and its properties that the rest of the package uses.

Code outside this folder never compares names of architectures. To add one, see "Adding an encoder" in CONTRIBUTING.md.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from muse_fast.config import PretrainConfig
from muse_fast.errors import UserError, did_you_mean, require
from muse_fast.images.imagenet import IMAGENET_MEAN, IMAGENET_STD
from muse_fast.models import resnet
from muse_fast.models.decoder import PYRAMID
from muse_fast.models.encoder import MAX_SIDE, SIDES, Encoder, count_flops, describe_sides, nearest
from muse_fast.models.maps import MapsEncoder
from muse_fast.models.timm.encoder import find_timm
from muse_fast.models.timm.networks import PREFIX
from muse_fast.models.vit import PATCH, ViTEncoder, resize_pos_embed, vit_flops
from muse_fast.runtime.options import Config, flatten

OPTIONAL = {
    "model.attention": "only plain ViTs over packed tokens have a choice of attention",
    "model.recompute": "only plain ViTs over packed tokens have layers that can be recomputed",
    "train.compile": "only plain ViTs over packed tokens have layers that can be compiled one by one",
}
"""Settings that an encoder need not support, and why; without support, only their defaults are allowed."""


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
    sides: range = SIDES
    """Allowed sides of an image in pixels."""
    image_width: int = 0
    """Width of the image feature; 0: that of the last map."""
    mark: tuple[str, tuple[int, ...]] | None = None
    """Name and shape of a tensor in the encoder's state dict that no other arch has; identifies the weights in a
    file that does not record the arch."""
    supports: tuple[str, ...] = ()
    """Which of `OPTIONAL` it supports."""
    prefix: int = 1
    """Rows of the position embedding that are not those of patches."""
    resize: Callable[[Tensor, int, str], Tensor] = resize_pos_embed
    """Resizes a stored position embedding to a grid of patches, given its side, by a rule of ``pos_embed_resize``."""
    on_meta: bool = False
    """Whether it can be built on torch's meta device and then filled from a file: all its buffers are in its state."""
    timm: str = ""
    """Architecture of timm with the same tensor names; if empty, there is no export for timm."""
    timm_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of that architecture."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean per channel of the pixels that the network itself expects; `build`'s encoder always expects ImageNet's."""
    std: tuple[float, ...] = IMAGENET_STD
    finetune_lr: float = 1e-5
    """Learning rate of the published fine-tuning for nucleus classification."""

    @property
    def image_dim(self) -> int:
        """Width of the image feature."""
        return self.image_width or self.widths[-1]


def vit_arch(name: str, dim: int, heads: int) -> Arch:
    return Arch(
        build=partial(ViTEncoder, dim, heads),
        widths=(dim,) * 4,
        strides=(PATCH,) * 4,
        flops=partial(vit_flops, dim),
        mark=("encoder.cls_token", (1, 1, dim)),
        supports=tuple(OPTIONAL),
        on_meta=True,
        timm=f"{name}_patch{PATCH}_224",
    )


def timm_arch(name: str, taps: tuple[int, ...] = ()) -> Arch:
    """``timm:NAME[:key=value ...]``; see `muse_fast.models.timm.encoder.TimmArch`."""
    found = find_timm(name, taps)
    return Arch(
        build=found.build,
        widths=found.widths,
        strides=found.strides,
        flops=found.flops,
        sides=found.sides,
        image_width=found.image_dim,
        supports=found.supports,
        prefix=found.prefix,
        resize=found.resize,
        on_meta=found.on_meta,
        timm=found.spec.name,
        timm_options=found.spec.options,
        mean=found.statistics.mean,
        std=found.statistics.std,
        finetune_lr=4e-5 if "resnet" in name else 1e-5,
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
        on_meta=True,
        timm="resnet50",
        finetune_lr=4e-5,
    ),
}


def register(
    name: str,
    network: Callable[..., nn.Module],
    *,
    sides: range = range(PYRAMID[-1], MAX_SIDE + 1, PYRAMID[-1]),
    finetune_lr: float = 1e-5,
) -> None:
    """Add an encoder, so that ``model.arch=NAME`` trains it. Every process that uses it must register it first.

    Args:
        network: builds the module with random weights from torch's global generator. It turns images ``[I, 3, R, R]``,
            normalised with ImageNet's statistics, into four maps ``[I, c, h, h]`` at strides 4, 8, 16 and 32, or all at
            one stride; or into an image feature ``[I, C]`` and such maps. If ``network`` has a parameter
            ``drop_path``, it receives the rate of the setting and should give it to layers ``timm.layers.DropPath``.
        sides: allowed R.
        finetune_lr: learning rate of fine-tuning for nucleus classification.

    Raises:
        UserError: the name is taken, or the module returns something else, or has a BatchNorm that cannot use the
            statistics of all ranks.
    """
    require(name not in ARCHS and ":" not in name, "name", name, f"a new one without ':'; taken: {', '.join(ARCHS)}")

    def build(*, drop_path: float = 0.0, **unused: object) -> Encoder:
        takes_drop_path = "drop_path" in inspect.signature(network).parameters
        made = network(drop_path=drop_path) if takes_drop_path else network()
        return MapsEncoder(made, sides, plain=strides != PYRAMID)

    @lru_cache(maxsize=64)
    def flops(side: int) -> int:
        with torch.random.fork_rng(devices=[]):
            return count_flops(build().eval().requires_grad_(False), side)

    strides, images = PYRAMID, torch.zeros(1, 3, sides[0], sides[0])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        encoder = build().eval()
        found = encoder.encoder(images)
        maps = found[1] if isinstance(found, (list, tuple)) and len(found) == 2 else found
        shapes = [list(one.shape) for one in maps]
        strides = tuple(round(sides[0] / shape[-1]) for shape in shapes)
        is_pyramid, is_plain = strides == PYRAMID, all(shape == shapes[0] for shape in shapes)
        if isinstance(maps, Tensor) or len(maps) != 4 or not (is_pyramid or is_plain):
            raise UserError(
                f"{name}: expected four maps [I, c, h, h] at strides 4, 8, 16 and 32, or all of one shape, or an image "
                f"feature [I, C] and such maps; an image of {sides[0]} px gave {type(found).__name__} with {shapes}"
            )
        feature, _ = encoder([images])
    ARCHS[name] = Arch(
        build=build,
        widths=tuple(one.shape[1] for one in maps),
        strides=strides,
        flops=flops,
        sides=sides,
        image_width=feature.shape[1],
        finetune_lr=finetune_lr,
    )


def find_arch(name: str, key: str = "arch", taps: Sequence[int] = ()) -> Arch:
    """Look up an architecture by name.

    Args:
        key: the setting or argument that ``name`` comes from, for the message.
        taps: numbers of the four stages or layers of a network of timm whose maps the decoder receives; by default the
            last layer of each quarter of a plain ViT, else the last stage at each stride.

    Raises:
        UserError: there is no such arch, and the message suggests the closest one; or it has no such taps.
    """
    if name.startswith(PREFIX):
        return timm_arch(name, tuple(taps))
    known = f"one of {', '.join(ARCHS)} or {PREFIX}NAME"
    require(name in ARCHS, key, name, f"{known}{did_you_mean(name, ARCHS)}")
    require(not taps, "model.taps", list(taps), f"none, as {name} has fixed ones")
    return ARCHS[name]


def check_model(config: PretrainConfig) -> None:
    """Check that the model can be built with these settings.

    Raises:
        UserError: ``model.arch`` is unknown, does not support a setting of `OPTIONAL` or the size of a view.
    """
    model, views = config.model, config.views
    arch = find_arch(model.arch, "model.arch", model.taps)
    check_optional(config, model.arch, arch)
    sizes = {"global_size": views.global_size} | ({"local_size": views.local_size} if views.num_locals else {})
    for key, side in sizes.items():
        expected = f"{describe_sides(arch.sides)} for {model.arch}; the nearest is {nearest(side, arch.sides)}"
        require(side in arch.sides, f"views.{key}", side, expected)


def check_optional(config: Config, name: str, arch: Arch) -> None:
    """Check that the arch ``name`` supports the settings of `OPTIONAL` that ``config`` has.

    Raises:
        UserError: it does not, and one of them is not its default.
    """
    trees = [dataclasses.asdict(one) for one in (config, type(config)())]  # type: ignore[call-overload]
    values, defaults = (dict(flatten(tree)) for tree in trees)
    for key in values.keys() & OPTIONAL.keys():
        fits = key in arch.supports or values[key] == defaults[key]
        require(fits, key, values[key], f"{defaults[key]}; {name} does not support this setting: {OPTIONAL[key]}")
