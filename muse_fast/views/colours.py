"""Colour augmentation of a view with DINO's settings, and of its stains; drawing and applying are separate.

A draw is plain numbers (``Colour``), so that every backend can apply the same augmentation to the same view.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from muse_fast.config import ViewsConfig

_JITTER_PROBABILITY = 0.8
_BLUR_SIGMA = (0.1, 2.0)  # pixels
_SOLARISE_THRESHOLD = 128
_BLUR_PROBABILITY = {"first": 1.0, "second": 0.1, "local": 0.5}
UNSTAINED = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)  # a change of stains that changes nothing
_WHITE = np.log(255.0)
DARKEST = 0.25  # the level 0 for logarithms: the middle of what is rounded to it
_LOG_LEVELS = np.log(np.maximum(np.arange(256), DARKEST)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Colour:
    """The colour changes of one view; None skips a step.

    They are applied in this order: stain, the four of jitter in their own order, grey, blur, solarise.
    """

    brightness: float | None = None  # factor; 1 changes nothing
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None  # shift, as a share of the colour circle
    order: tuple[int, ...] = (0, 1, 2, 3)  # of the four above
    grey: bool = False
    blur_sigma: float | None = None  # pixels
    solarise: bool = False
    stain: tuple[float, ...] | None = None  # factors of haematoxylin, eosin and residual, then their shifts

    def row(self) -> list[float]:
        """Return the draw as a row of the ``colours`` of ``ops.augment_views``."""
        factors = [1.0 if f is None else f for f in (self.brightness, self.contrast, self.saturation)]
        others = self.grey, self.blur_sigma or 0.0, self.solarise
        return [*factors, self.hue or 0.0, *self.order, *others, *(self.stain or UNSTAINED)]


def draw_colour(rng: np.random.Generator, role: str, config: ViewsConfig) -> Colour:
    """Draw the colour changes of a view whose ``role`` is ``first``, ``second`` (the globals) or ``local``.

    Every draw consumes the same random numbers, so a view never depends on another view's draw.
    """
    chance = rng.random(4)
    strengths = config.jitter * np.array([1.0, 1.0, 0.5, 0.25])
    factors = 1 + rng.uniform(-1, 1, size=4) * strengths
    order = tuple(int(i) for i in rng.permutation(4))
    sigma = float(rng.uniform(*_BLUR_SIGMA))
    jitter = chance[0] < _JITTER_PROBABILITY and config.jitter > 0
    brightness, contrast, saturation, hue = (float(f) for f in factors)
    return Colour(
        brightness=brightness if jitter else None,
        contrast=contrast if jitter else None,
        saturation=saturation if jitter else None,
        hue=hue - 1 if jitter else None,
        order=order,
        grey=bool(chance[1] < config.grey),
        blur_sigma=sigma if config.blur and chance[2] < _BLUR_PROBABILITY[role] else None,
        solarise=role == "second" and bool(chance[3] < config.solarise),
        stain=_draw_stain(rng, config) if config.stain or config.stain_shift else None,
    )


def _draw_stain(rng: np.random.Generator, config: ViewsConfig) -> tuple[float, ...]:
    """Draw from a generator that ``rng`` spawns for the view, so that boxes and other colours stay the same."""
    spread = rng.spawn(1)[0].uniform(-1, 1, size=6)
    return tuple(float(x) for x in (*(1 + config.stain * spread[:3]), *(config.stain_shift * spread[3:])))


def apply_colour(view: Tensor, colour: Colour) -> Tensor:
    """Apply ``colour`` to a view, uint8 ``[3, R, R]`` in and out."""
    if colour.stain is not None:
        view = _stained(view, colour.stain)
    for step in colour.order:
        if step == 0 and colour.brightness is not None:
            view = TF.adjust_brightness(view, colour.brightness)
        elif step == 1 and colour.contrast is not None:
            view = TF.adjust_contrast(view, colour.contrast)
        elif step == 2 and colour.saturation is not None:
            view = TF.adjust_saturation(view, colour.saturation)
        elif step == 3 and colour.hue is not None:
            view = TF.adjust_hue(view, colour.hue)
    if colour.grey:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    if colour.blur_sigma is not None:
        radius = blur_radius(colour.blur_sigma, view.shape[-1])
        view = TF.gaussian_blur(view, [2 * radius + 1] * 2, [colour.blur_sigma] * 2)
    if colour.solarise:
        view = TF.solarize(view, _SOLARISE_THRESHOLD)
    return view


def stain_maps(stains: ArrayLike) -> NDArray[np.float32]:
    """Return the maps ``[..., 3, 4]`` of stain changes ``[..., 6]``: the logarithms of a pixel's levels l (R, G, B)
    become A l + b, with A the first three columns and b the last.

    With the optical density d = ln 255 - l, the stain vectors of Ruifrok and Johnston (2001) as rows of M, factors f
    and shifts s, the amounts d M^-1 become f d M^-1 + s (Tellez et al., 2018).
    """
    stains = np.asarray(stains, np.float64)
    mixing = (hed_from_rgb * stains[..., None, :3]) @ rgb_from_hed
    offset = _WHITE - _WHITE * mixing.sum(-2) - stains[..., 3:] @ rgb_from_hed
    return np.concatenate([mixing.swapaxes(-1, -2), offset[..., None]], axis=-1).astype(np.float32)


def _stained(view: Tensor, stain: tuple[float, ...]) -> Tensor:
    mapping = stain_maps(stain)
    levels = mapping[:, :3] @ _LOG_LEVELS.take(view.flatten(1).numpy())
    levels += mapping[:, 3:]
    np.exp(levels, out=levels)
    np.minimum(levels, 255, out=levels)
    levels += 0.5
    return torch.from_numpy(levels.astype(np.uint8)).view(view.shape)


def blur_radius(sigma: float, size: int) -> int:
    """Return the radius in pixels of the blur kernel for a view of ``size`` pixels."""
    return min(max(1, round(3 * sigma)), size // 2 - 1)
