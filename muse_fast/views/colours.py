"""Colour augmentation of a view with DINO's settings; drawing and applying are separate.

A draw is plain numbers (``Colour``), so that every backend can apply the same augmentation to the same view.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from muse_fast.config import ViewsConfig

_JITTER_PROBABILITY = 0.8
_BLUR_SIGMA = (0.1, 2.0)  # pixels
_SOLARISE_THRESHOLD = 128
_BLUR_PROBABILITY = {"first": 1.0, "second": 0.1, "local": 0.5}


@dataclass(frozen=True, slots=True)
class Colour:
    """The colour changes of one view; None skips a step."""

    brightness: float | None = None  # factor; 1 is no change
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None  # shift, as a share of the colour circle
    order: tuple[int, ...] = (0, 1, 2, 3)  # of the four above
    grey: bool = False
    blur_sigma: float | None = None  # pixels
    solarise: bool = False

    def row(self) -> list[float]:
        """Return the draw as a row of the ``colours`` of ``ops.augment_views``."""
        factors = [1.0 if f is None else f for f in (self.brightness, self.contrast, self.saturation)]
        return [*factors, self.hue or 0.0, *self.order, self.grey, self.blur_sigma or 0.0, self.solarise]


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
    )


def apply_colour(view: Tensor, colour: Colour) -> Tensor:
    """Apply ``colour`` to a view, uint8 ``[3, R, R]`` in and out."""
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


def blur_radius(sigma: float, size: int) -> int:
    """Return the radius in pixels of the blur kernel for a view of ``size`` pixels."""
    return min(max(1, round(3 * sigma)), size // 2 - 1)
