"""Changes of stains by the published equations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Ruifrok and Johnston (2001); rows haematoxylin, eosin, residual, columns R, G, B
VECTORS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STRONG = (1.4, 0.6, 1.2, 0.08, -0.05, 0.1)  # factors, then shifts


def stained_exactly(image: Tensor, stain: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the levels ``[3, H, W]`` in float64, not rounded; the level 0 counts as a quarter."""
    density = -np.log(np.maximum(image.double().numpy(), 0.25) / 255)
    amounts = np.einsum("chw,cs->shw", density, np.linalg.inv(VECTORS))
    amounts = amounts * np.reshape(stain[:3], (3, 1, 1)) + np.reshape(stain[3:], (3, 1, 1))
    levels: NDArray[np.float64] = 255 * np.exp(-np.einsum("shw,sc->chw", amounts, VECTORS))
    return levels.clip(0, 255)
