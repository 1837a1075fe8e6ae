"""Backbones of timm in place of ours, for comparison: ``timm:NAME[:key=value ...][@FILE]``.

A plain ViT returns the patch tokens of its last layer as a map; a hierarchical network returns the maps of all stages
from stride 4 on. Each map is sampled bilinearly at the nuclei, and the samples are concatenated (paper, appendix B).
The paper says that maps are "interpolated to a common size" first; the authors' code samples each map at its own size,
and so do we.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast import ops
from muse_fast.errors import UserError
from muse_fast.images.imagenet import IMAGENET_MEAN, IMAGENET_STD, Normaliser
from muse_fast.models.encoder import check_points
from muse_fast.models.timm.networks import (
    IMAGENET,
    PREFIX,
    create_network,
    feature_info,
    load_file,
    parse_spec,
    statistics_of,
)
from muse_fast.runtime.tensors import some

FINEST_STRIDE = 4  # of the maps of a hierarchical network; finer ones belong to its stem


class TimmBackbone(nn.Module):
    """A timm network with `nucleus_features`; built by `load_timm`.

    Images are uint8 ``[I, 3, R, R]``, or floats normalised with the ImageNet mean and standard deviation, as for our
    backbones; this class converts them to the network's own statistics. If R is not a multiple of the coarsest stride
    (or patch size), images are enlarged bicubically to the next multiple; positions scale with them.

    Args:
        network: accepts square images of ``side``.
        arch: its name in reports.
        side: R, rounded up to a multiple of the stride.
        statistics: mean and standard deviation per channel that the network was trained with.
        align_corners: which column of a map of W columns a point x maps to: ``x / R * (W - 1)``, as in the published
            evaluation, or (False) ``x / R * W - 0.5``, so that the middle of a token reads only that token.

    Attributes:
        strides: of the maps that are sampled, in pixels of the network's input.
        dense_dim: width D of a nucleus row.
        finetune_lr: learning rate of the published fine-tuning, which differs for ResNets.
    """

    gain: Tensor
    offset: Tensor

    def __init__(
        self, network: Any, arch: str, side: int, statistics: Mapping[str, tuple[float, ...]], align_corners: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.arch = arch
        self.finetune_lr = 4e-5 if "resnet" in arch else 1e-5
        self.side = side
        self.align_corners = align_corners
        self._normalised = Normaliser()
        strides = [stage["reduction"] for stage in feature_info(network)]
        self.plain = len(set(strides)) == 1
        last = len(strides) - 1
        self.stages = [last] if self.plain else [i for i, stride in enumerate(strides) if stride >= FINEST_STRIDE]
        self.strides = [strides[stage] for stage in self.stages]
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD, statistics["mean"], statistics["std"])
        )
        self.register_buffer("gain", std / own_std, persistent=False)
        self.register_buffer("offset", (mean - own_mean) / own_std, persistent=False)
        with torch.no_grad():  # measured, as timm's tables may be wrong
            self.dense_dim = sum(one.shape[1] for one in self.eval().maps(torch.zeros(1, 3, side, side)))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps ``[I, c, h, h]`` that nuclei are sampled from, finest first.

        Raises:
            UserError: the images do not have the side that the network was built for.
        """
        maps: list[Tensor] = self.network.forward_intermediates(
            self._fitted(images), indices=self.stages, norm=self.plain, output_fmt="NCHW", intermediates_only=True
        )
        return maps

    def cls(self, images: Tensor) -> Tensor:
        """Image features ``[I, image_dim]``: what the network returns without its classifier, its CLS token or a pool
        of its map; ``global_pool=`` in its name decides, see ``timm.create_model``.

        Raises:
            UserError: as in `maps`.
        """
        features: Tensor = self.network(self._fitted(self._normalised(images)))
        return features

    def _fitted(self, images: Tensor) -> Tensor:
        """Images with the side and the statistics of the network."""
        stride = self.strides[-1]
        if images.shape[-2:] != (images.shape[-1],) * 2 or _round_up(images.shape[-1], stride) != self.side:
            raise UserError(
                f"{self.arch} was loaded for square images of {self.side} px, got {list(images.shape)}; load it again"
            )
        if images.shape[-1] != self.side:
            images = F.interpolate(images, size=(self.side, self.side), mode="bicubic", antialias=True)
        return images * self.gain + self.offset

    def nucleus_features(self, images: Tensor, xy: Tensor, image_index: Tensor) -> Tensor:
        """One feature per nucleus, ``[N, D]``; see `muse_fast.models.Backbone.nucleus_features`."""
        side = images.shape[-1]
        check_points(xy, image_index, side)
        xy, image_index = (one.to(images.device, non_blocking=True) for one in (xy, image_index))
        maps = self.maps(self._normalised(images))
        return torch.cat([self._read(one, xy, image_index, side) for one in maps], dim=1)

    def _read(self, one: Tensor, xy: Tensor, image_index: Tensor, side: int) -> Tensor:
        if not self.align_corners:  # `sample_nuclei` aligns corners, so shift the points to compensate
            cells = one.shape[-1]
            xy = (xy * (cells / side) - 0.5).clamp(0, cells - 1) * (side / max(cells - 1, 1))
        return ops.sample_nuclei([one], xy, image_index, side)


class Loaded(NamedTuple):
    """A backbone and its description for reports."""

    backbone: TimmBackbone
    about: dict[str, Any]


def load_timm(text: str, *, image_size: int, align_corners: bool = False) -> Loaded:
    """Load a backbone of timm in evaluation mode, float32, on the CPU. Nothing is downloaded.

    Args:
        text: ``timm:NAME[:key=value ...][@FILE]``; FILE is a ``.safetensors`` or a file of ``torch.save`` (``.pth``,
            ``.bin``, ...), from which only tensors are read. Without it, torch's global generator draws the weights.
        image_size: side of the images in pixels. timm resamples position embeddings to it once.
        align_corners: see `TimmBackbone`.

    Raises:
        UserError: as `parse_spec`; the file is damaged; tensors are missing, unexpected or of other shapes; the
            network has no feature maps or does not accept images of this size.
    """
    spec = parse_spec(text)
    arch = f"{PREFIX}{spec.name}"
    network = create_network(text, spec)
    names = {} if spec.file is None else load_file(network, arch, spec.file)
    known, statistics = network.pretrained_cfg, statistics_of(network, spec)
    side = _round_up(image_size, max(stage["reduction"] for stage in feature_info(network)))
    try:
        if hasattr(network, "set_input_size"):
            network.set_input_size(img_size=(side, side))
        backbone = TimmBackbone(network, arch, side, statistics, align_corners)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{text}: does not run on images of {side} px ({error}); choose another --size") from error
    about = {
        "file": None if spec.file is None else str(spec.file),
        **names,
        "mean": list(statistics["mean"]),
        "std": list(statistics["std"]),
        "statistics_of": "given"
        if len(spec.statistics) == len(IMAGENET)
        else f"{spec.name.split('.')[0]}.{known['tag']}",
        "input_side": side,
        "strides": backbone.strides,
        "features": backbone.dense_dim,
        "align_corners": align_corners,
    }
    return Loaded(backbone.eval(), about)


def summarise(about: Mapping[str, Any]) -> str:
    """Summarise ``about`` of `load_timm` in one line."""
    weights = about["file"] or "random weights (no @FILE)"
    weights += f", {about['layout']}" if about.get("layout") else ""
    for key, words in (("left_out", "without"), ("converted", "converted by timm:")):
        weights += f", {words} {some(about[key])}" if about.get(key) else ""
    statistics = " ".join(f"{key} {'/'.join(f'{x:g}' for x in about[key])}" for key in IMAGENET)
    if about["statistics_of"] != "given":
        statistics += f", timm's for {about['statistics_of']}"
    maps = "stride" if len(about["strides"]) == 1 else "strides"
    return (
        f"{weights}; {about['features']} features at {maps} {', '.join(map(str, about['strides']))} "
        f"of {about['input_side']} px; pixels by {statistics}"
    )


def _round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple
