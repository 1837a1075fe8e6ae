"""Draw dots into an image at known places and find them in its views, to show that pixels and points move alike."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

MARGIN = 10  # pixels; dots nearer to the border of a view are cut off


def scattered(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return points ``[n, 2]`` float32 in an image of ``size`` pixels, at least 28 pixels apart."""
    grid = np.stack(np.meshgrid(np.arange(20, size - 10, 40), np.arange(20, size - 10, 40)), -1).reshape(-1, 2)
    return (grid + rng.uniform(-6, 6, grid.shape)).astype(np.float32)


def draw_dots(size: int, xy: np.ndarray, sigma: float) -> Tensor:
    """Draw white Gaussian dots on black, uint8 [3, size, size]; pixel i covers the coordinates [i, i + 1)."""
    y, x = np.mgrid[:size, :size] + 0.5
    image = np.zeros((size, size))
    for px, py in xy:
        image = np.maximum(image, np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma**2)))
    return torch.from_numpy((255 * image).astype(np.uint8)).expand(3, -1, -1)


def assert_dots_at(view: Tensor, points: np.ndarray) -> int:
    """Assert that ``view`` ``[R, R]``, 0..255, has a dot within 0.5 px of every point; return the number compared."""
    size = view.shape[-1]
    inside = points[((points > MARGIN) & (points < size - MARGIN)).all(1)]
    for x, y in inside:
        window = view[int(y) - 8 : int(y) + 9, int(x) - 8 : int(x) + 9].double().numpy()
        cy, cx = ndimage.center_of_mass(np.where(window > 60, window, 0))
        assert abs(cx + 0.5 + int(x) - 8 - x) < 0.5
        assert abs(cy + 0.5 + int(y) - 8 - y) < 0.5
    return len(inside)
