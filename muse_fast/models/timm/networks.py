"""Networks of timm by name, ``timm:NAME[:key=value ...][@FILE]``: parsing, building, and reading of files."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from muse_fast.errors import UserError, did_you_mean
from muse_fast.images.imagenet import IMAGENET_MEAN, IMAGENET_STD
from muse_fast.models.weight_files import files_in, find_network, read_weights
from muse_fast.runtime.tensors import load_strictly

PREFIX = "timm:"
IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


class Spec(NamedTuple):
    """The parts of ``timm:NAME[:key=value ...][@FILE]``."""

    name: str  # timm's, with or without a tag (vit_small_patch14_dinov2.lvd142m)
    options: dict[str, Any]  # arguments of timm.create_model
    statistics: dict[str, tuple[float, ...]]  # mean or std, if given
    file: Path | None


class PixelStatistics(NamedTuple):
    """Mean and standard deviation per channel of the pixels that a network expects."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def convert(self, images: Tensor) -> Tensor:
        """Images normalised by ImageNet's statistics -> by these."""
        if (self.mean, self.std) == (IMAGENET_MEAN, IMAGENET_STD):
            return images
        # Numbers, unlike tensors on the device, belong neither to the state nor to a copy from the host.
        channels = zip(images.unbind(1), IMAGENET_MEAN, IMAGENET_STD, self.mean, self.std, strict=True)
        return torch.stack([(x * std + mean - own) / own_std for x, mean, std, own, own_std in channels], dim=1)


def parse_spec(text: str) -> Spec:
    """Parse ``timm:NAME[:key=value ...][@FILE]``.

    ``key=value`` are arguments of ``timm.create_model``; ``mean`` and ``std`` (three numbers, or ``imagenet``) replace
    timm's values for NAME.

    Raises:
        UserError: timm has no such network, a setting cannot be parsed, or the file does not exist.
    """
    import timm

    described, _, file = text.removeprefix(PREFIX).partition("@")
    name, *items = described.split(":")
    if not timm.is_model(name):
        raise UserError(f"{text}: timm {timm.__version__} has no {name!r}{did_you_mean(name, timm.list_models())}")
    if bad := [item for item in items if not item.partition("=")[0].isidentifier() or "=" not in item]:
        raise UserError(f"{text}: {bad[0]!r}; expected key=value, as in timm:NAME:init_values=1@FILE")
    try:
        options = OmegaConf.to_container(OmegaConf.from_dotlist(items))
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{text}: {str(error).splitlines()[0]}") from error
    assert isinstance(options, dict)
    statistics = {key: _statistics(text, key, options.pop(key)) for key in IMAGENET if key in options}
    if file and not Path(file).is_file():
        words = f"{file} is a folder; {files_in(Path(file))}" if Path(file).is_dir() else f"no such file {file}"
        raise UserError(f"{text}: {words}; expected the weights of {name}")
    return Spec(name, {str(key): value for key, value in options.items()}, statistics, Path(file) if file else None)


def create_network(text: str, spec: Spec, **more: Any) -> Any:
    """Build the network without its classifier, with random weights from torch's global generator.

    Args:
        text: the spec as the user wrote it, for messages.
        more: arguments of ``timm.create_model``, unless the spec sets them.

    Raises:
        UserError: timm cannot build this, or has no feature maps for it.
    """
    import timm

    options = {key: _resolve_layer(key, value) for key, value in spec.options.items()}
    try:
        network: Any = timm.create_model(spec.name, pretrained=False, num_classes=0, **{**more, **options})
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{text}: timm cannot build this ({error or type(error).__name__})") from error
    if not hasattr(network, "forward_intermediates"):
        raise UserError(f"{text}: timm has no feature maps for {spec.name} (no forward_intermediates)")
    return network


def statistics_of(network: Any, spec: Spec) -> dict[str, tuple[float, ...]]:
    """The ``mean`` and ``std`` per channel of the pixels that the network expects."""
    return {key: tuple(spec.statistics.get(key, network.pretrained_cfg[key])) for key in IMAGENET}


def load_file(network: Any, arch: str, file: Path) -> dict[str, Any]:
    """Load the weights of a ``.safetensors`` or of a file of ``torch.save`` into a network of timm.

    timm's own conversion renames tensors of other projects and of its older releases, and resizes position embeddings
    to the network's image size (bicubic with antialiasing).

    Args:
        arch: name of the network for messages.

    Returns:
        ``layout``: how the file names the network's tensors, if not by its names alone; ``left_out``: names of the
        file's tensors that the network does not have (its classifier, heads, all that is outside the network);
        ``converted``: names of those that timm renamed or reshaped.

    Raises:
        UserError: the file is damaged, or tensors are missing, unexpected or of another shape; the message names them.
    """
    expected = network.state_dict()
    stored, outside, layout = find_network(file, read_weights(file), expected)
    heads = network.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    tensors = {name: t for name, t in stored.items() if name in expected or not name.startswith(heads)}
    fits = {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in expected.items()}
    converted = tensors if fits else _convert(network, arch, file, tensors)
    # Old files lack BatchNorm's batch counter, which has no influence.
    counters = {n: t for n, t in expected.items() if n.endswith("num_batches_tracked") and n not in converted}
    load_strictly(network, {**converted, **counters}, str(file), arch)
    reshaped = [n for n in tensors.keys() & converted.keys() if tensors[n].shape != converted[n].shape]
    return {
        "layout": layout,
        "left_out": outside + sorted(stored.keys() - tensors.keys()),
        "converted": sorted([*(tensors.keys() - converted.keys()), *reshaped]),
    }


def _convert(network: Any, arch: str, file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply timm's own conversion from names of other projects (DINOv2, CLIP) and of older timm releases."""
    convert = getattr(importlib.import_module(type(network).__module__), "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        converted: dict[str, Tensor] = convert(dict(tensors), network)
    except (KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"{file}: does not fit {arch}; timm cannot convert it ({error})") from error
    # timm would resize filters of another patch size, which changes the network.
    filters = {n: t for n, t in tensors.items() if n.endswith("patch_embed.proj.weight") and t.ndim == 4}
    return converted | filters


def _statistics(text: str, key: str, value: Any) -> tuple[float, ...]:
    if value == "imagenet":
        return IMAGENET[key]
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(one, (int, float)) for one in value):
        raise UserError(f"{text}: {key}={value}: expected imagenet or three numbers, such as {key}=[0.5,0.5,0.5]")
    return tuple(map(float, value))


def _resolve_layer(key: str, value: Any) -> Any:
    """Resolve the class name in arguments such as ``mlp_layer=SwiGLUPacked``."""
    from timm import layers

    return getattr(layers, value, value) if key.endswith("_layer") and isinstance(value, str) else value


def feature_info(network: Any) -> list[dict[str, Any]]:
    """Channels and stride of every stage according to timm."""
    return list(getattr(network.feature_info, "info", network.feature_info))
