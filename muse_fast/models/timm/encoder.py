"""Networks of timm as encoders: ``model.arch=timm:NAME[:key=value ...]``.

A plain ViT runs over packed tokens (`muse_fast.models.timm.vit`) if its layers allow it. All other networks run one
resolution at a time through timm's ``forward_intermediates``. The image feature is what timm pools: the class token, or
the mean of the last map.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from muse_fast.errors import UserError, require
from muse_fast.models.decoder import PYRAMID
from muse_fast.models.encoder import MAX_SIDE, Encoder, Maps, count_flops
from muse_fast.models.maps import MapsEncoder
from muse_fast.models.timm.networks import (
    PixelStatistics,
    create_network,
    feature_info,
    parse_spec,
    statistics_of,
)
from muse_fast.models.timm.vit import TimmViTEncoder, can_pack, resize_positions

PACKED = ("model.attention", "model.recompute", "train.compile")
"""Settings that need layers of one shape over packed tokens."""


class TimmMapsEncoder(MapsEncoder):
    """A network of timm without packed tokens.

    Args:
        taps: numbers of the four stages (of a plain ViT: layers) whose maps are returned, finest first.
    """

    def __init__(
        self, network: Any, taps: Sequence[int], sides: range, statistics: PixelStatistics, plain: bool
    ) -> None:
        super().__init__(network, sides, plain)
        self.taps, self.statistics = tuple(taps), statistics

    def run(self, images: Tensor) -> tuple[Tensor, Maps]:
        taken = sorted({*self.taps})
        last, maps = self.encoder.forward_intermediates(
            self.statistics.convert(images), indices=taken, norm=self.plain, output_fmt="NCHW"
        )
        pooled = self.encoder.forward_head(last, pre_logits=True)
        if pooled.ndim > 2:  # a network without pooling
            pooled = pooled[:, 0] if self.plain else maps[-1].mean(dim=(2, 3))
        return pooled, tuple(maps[taken.index(tap)] for tap in self.taps)


class TimmArch:
    """What the rest of the package needs to know about a network of timm; `find_timm` finds it.

    Attributes:
        spec: its name and settings.
        sides: allowed sides of an image: multiples of the patch, or for a pyramid of 32.
        taps: numbers of the stages or layers whose maps the decoder receives.
        strides, widths: of these maps.
        image_dim: width of the image feature.
        prefix: tokens before those of patches that have an absolute position.
        is_packed: whether it runs over packed tokens.
        on_meta: whether it can be built on torch's meta device and filled from a file.
    """

    def __init__(self, text: str, taps: tuple[int, ...]) -> None:
        self.text = text
        self.spec = parse_spec(text)
        if self.spec.file is not None:
            raise UserError(f"{text}: the name of a network has no weights; remove @{self.spec.file}")
        with torch.device("meta"):  # no memory and no random draws
            network = create_network(text, self.spec)
        of_stage = [stage["reduction"] for stage in feature_info(network)]
        self.plain = len({*of_stage}) == 1
        self.taps = self._check_taps(taps, of_stage) if taps else self._default_taps(of_stage)
        self.strides = tuple(of_stage[tap] for tap in self.taps)
        self.is_packed = self.plain and can_pack(network)
        known = inspect.signature(type(network)).parameters
        # Both mean that images may have any size, but not every network has both.
        any_size = {"dynamic_img_size": True, "strict_img_size": False}
        self._options = {key: value for key, value in any_size.items() if key in known or hasattr(network, key)}
        self._is_sized = self.plain and bool(self._options)
        self.statistics = PixelStatistics(**statistics_of(network, self.spec))
        encoder = self.build_on_meta()
        self.sides, (cls, encoded) = self._try_sides(encoder)
        self.image_dim = cls.shape[1]
        maps = encoded.taps if self.plain else encoded[0]
        self.widths = tuple(one.shape[1] for one in maps)
        self.prefix = 0 if getattr(network, "no_embed_class", False) else getattr(network, "num_prefix_tokens", 0)
        self.on_meta = all(name in encoder.state_dict() for name, _ in encoder.named_buffers())

    def build(
        self,
        *,
        drop_path: float = 0.0,
        image_size: int = 224,
        attention: str = "sdpa",
        recompute: str = "none",
        **unused: object,
    ) -> Encoder:
        """Build the encoder with random weights from torch's global generator.

        Raises:
            UserError: the network has no paths to drop, or draws random numbers in its layers.
        """
        options: dict[str, Any] = dict(self._options)
        if self._is_sized:
            options["img_size"] = image_size
        sides = getattr(self, "sides", range(1, MAX_SIDE + 1))  # all while `_try_sides` finds out
        if self.is_packed:
            network = create_network(self.text, self.spec, **options)
            _refuse_dropout(self.text, network)
            return TimmViTEncoder(
                network,
                self.taps,
                sides,
                self.statistics,
                drop_path=drop_path,
                attention=attention,
                recompute=recompute,
            )
        if drop_path:
            options["drop_path_rate"] = drop_path
        try:
            network = create_network(self.text, self.spec, **options)
        except UserError as error:
            if not drop_path:
                raise
            raise UserError(f"model.drop_path={drop_path}: expected 0, as it has no drop path; {error}") from error
        _refuse_dropout(self.text, network)
        encoder = TimmMapsEncoder(network, self.taps, sides, self.statistics, self.plain)
        has_paths = not drop_path or bool(encoder.drop_rates)
        require(has_paths, "model.drop_path", drop_path, f"0, as {self.text} has no drop path")
        return encoder

    def flops(self, side: int) -> int:
        return _flops(self, side)

    def resize(self, positions: Tensor, grid: int, rule: str = "") -> Tensor:
        """Resize a stored position embedding to ``grid x grid`` patches, by timm's own rule."""
        return resize_positions(positions, grid, self.prefix)

    @property
    def supports(self) -> tuple[str, ...]:
        return PACKED if self.is_packed else ()

    def build_on_meta(self, image_size: int = 224) -> Encoder:
        with torch.device("meta"):
            return self.build(image_size=image_size).eval().requires_grad_(False)

    def _check_taps(self, taps: tuple[int, ...], of_stage: Sequence[int]) -> tuple[int, ...]:
        fits = len(taps) == 4 and all(0 <= tap < len(of_stage) for tap in taps)
        if self.plain:
            require(fits, "model.taps", list(taps), f"four layers of {self.text}, from 0 to {len(of_stage) - 1}")
        else:
            strides = ", ".join(f"{tap}: {stride}" for tap, stride in enumerate(of_stage))
            expected = f"stages of {self.text} at strides 4, 8, 16 and 32 (it has {strides})"
            fits = fits and tuple(of_stage[tap] for tap in taps) == PYRAMID
            require(fits, "model.taps", list(taps), expected)
        return taps

    def _default_taps(self, of_stage: Sequence[int]) -> tuple[int, ...]:
        """Of a plain ViT the last layer of each quarter, else the last stage at each stride of the pyramid."""
        if self.plain:
            return tuple(max(0, (quarter + 1) * len(of_stage) // 4 - 1) for quarter in range(4))
        last = {stride: tap for tap, stride in enumerate(of_stage)}
        if missing := [stride for stride in PYRAMID if stride not in last]:
            raise UserError(
                f"{self.text}: has maps at strides {', '.join(map(str, last))}; the decoder needs 4, 8, 16 and 32, "
                f"and {', '.join(map(str, missing))} is missing"
            )
        return tuple(last[stride] for stride in PYRAMID)

    def _try_sides(self, encoder: Encoder) -> tuple[range, tuple[Tensor, Any]]:
        """Return the allowed sides of an image, and the encoder's output for two images of the smallest."""
        if self.plain:
            patch = self.strides[0]
            steps, first = [patch], max(2 * patch, -(-32 // patch) * patch)  # two patches, for the coarsest level
        else:
            steps, first = list(range(PYRAMID[-1], MAX_SIDE + 1, PYRAMID[-1])), 0
        problem = ""
        for step in steps:  # windows and grids of some networks need larger multiples than the stride
            side = first or step
            try:
                return range(side, MAX_SIDE + 1, step), encoder([torch.zeros(2, 3, side, side, device="meta")])
            except (RuntimeError, ValueError, AssertionError, TypeError) as error:
                problem = str(error)
        raise UserError(f"{self.text}: does not run on images of several sizes up to {MAX_SIDE} px ({problem})")


@lru_cache(maxsize=64)
def find_timm(text: str, taps: tuple[int, ...] = ()) -> TimmArch:
    """Describe ``timm:NAME[:key=value ...]``.

    Args:
        taps: numbers of four stages or layers, see `TimmArch`; a default for the network if empty.

    Raises:
        UserError: timm has no such network or cannot build it; it has no maps for the decoder; no such taps.
    """
    return TimmArch(text, taps)


@lru_cache(maxsize=256)
def _flops(arch: TimmArch, side: int) -> int:
    return count_flops(arch.build_on_meta(side), side)


def _refuse_dropout(text: str, network: nn.Module) -> None:
    """Refuse layers whose random draws neither the seed nor the step determines."""
    rates: dict[str, Callable[[Any], float]] = {"Dropout": lambda m: m.p, "PatchDropout": lambda m: m.prob}
    for name, module in network.named_modules():
        kind = type(module).__name__
        if any(kind.startswith(known) and rate(module) > 0 for known, rate in rates.items()):
            raise UserError(
                f"{text}: its layer {name} drops values at random, so that a resumed run would differ; build it with "
                "this rate at 0 (drop_rate=0, proj_drop_rate=0, ...), or choose another network"
            )
