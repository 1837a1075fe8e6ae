"""Pages with dark dots, slides with several levels, and a detector that finds the dots without a network."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from muse_fast.images.points import Points

tifffile = pytest.importorskip("tifffile")


def scattered(width: int, height: int, apart: float, seed: int = 0) -> NDArray[np.float64]:
    """Return points at fractions of pixels, some near every border, at least ``apart`` pixels apart."""
    rng = np.random.default_rng(seed)
    pitch = 1.7 * apart
    x, y = np.meshgrid(np.arange(apart, width - apart, pitch), np.arange(apart, height - apart, pitch))
    return np.stack([x, y], axis=2).reshape(-1, 2) + rng.uniform(0, 0.5 * apart, (x.size, 2))


def page_of_dots(width: int, height: int, xy: NDArray[np.float64], sigma: float) -> NDArray[np.uint8]:
    """Draw a dark Gaussian dot at each point on white; its centre of mass is the point, to a hundredth of a pixel."""
    density = np.zeros((height, width))
    reach = int(5 * sigma)
    for x, y in xy:
        left, top = max(0, int(x) - reach), max(0, int(y) - reach)
        rows, columns = np.mgrid[top : min(height, int(y) + reach), left : min(width, int(x) + reach)] + 0.5
        density[top : top + rows.shape[0], left : left + rows.shape[1]] += np.exp(
            -((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2)
        )
    return np.repeat((255 - 200 * density.clip(0, 1)).round().astype(np.uint8)[..., None], 3, axis=2)


def write_pyramid(
    path: Path, image: NDArray[np.uint8], mpp: float, factors: tuple[int, ...] = (), compression: str | None = None
) -> Path:
    """Write a tiled TIFF with levels reduced by ``factors``, with only whole pixels at the far sides.

    A path that ends in ``.svs`` gets the description by which OpenSlide takes it for a slide of Aperio.
    """
    resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    aperio = f"Aperio Image Library v1\r\n{image.shape[1]}x{image.shape[0]}|AppMag = 20|MPP = {mpp}"
    described = {"description": aperio, "metadata": None} if path.suffix == ".svs" else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as file:
        file.write(image, tile=(256, 256), photometric="rgb", compression=compression, **resolution, **described)
        for factor in factors:
            height, width = image.shape[0] // factor, image.shape[1] // factor
            whole = Image.fromarray(image[: height * factor, : width * factor])
            level = np.asarray(whole.resize((width, height), Image.Resampling.BOX))
            file.write(level, tile=(256, 256), photometric="rgb", compression=compression, subfiletype=1, **described)
    return path


def assert_same_places(found: NDArray[np.float64], planted: NDArray[np.float64], tolerance: float) -> None:
    """Assert that each point has its own counterpart within ``tolerance``."""
    assert len(found) == len(planted)
    distance = np.linalg.norm(found[:, None] - planted[None], axis=2)
    assert distance.min(axis=1).max(initial=0) < tolerance
    assert len(np.unique(distance.argmin(axis=1))) == len(planted)


class DotDetector:
    """Finds dots by their centre of mass. Every other dot is of class 0."""

    class_names = ("even, first", 'odd "second"')
    reach_um = 12.0

    def __init__(self, mpp: float, tile_size: int = 256, min_distance_um: float = 2.0) -> None:
        self.mpp, self.tile_size, self.min_distance_um = mpp, tile_size, min_distance_um
        self.shapes: list[tuple[int, ...]] = []

    def detect(self, images: Tensor) -> list[Points]:
        self.shapes.append(tuple(images.shape))
        return [self._detect(255.0 - image[0].numpy()) for image in images]

    def _detect(self, dark: NDArray[np.float64]) -> Points:
        from scipy.ndimage import center_of_mass, label

        dark = np.where(dark < 4, 0, dark)
        parts, count = label(dark > 0, np.ones((3, 3)))
        centres = np.array(center_of_mass(dark, parts, range(1, count + 1)), np.float32).reshape(-1, 2)
        mass = np.bincount(parts.ravel(), dark.ravel(), count + 1)[1:]
        score = (mass / 1e6).astype(np.float32)
        return Points(centres[:, ::-1] + np.float32(0.5), np.arange(count) % 2, score)


def main(pause: float) -> int:
    """Run the command with a detector of dots for weights ``dots:MPP`` that sleeps ``pause`` seconds per batch."""
    from muse_fast import predict
    from muse_fast.images import slide
    from muse_fast.predicting import run

    slide._BAND_PIXELS = 1_000_000  # thumbnails are read in bands; this makes small slides have several

    class SlowDotDetector(DotDetector):
        def detect(self, images: Tensor) -> list[Points]:
            time.sleep(pause)
            return super().detect(images)

    run.open_detector = lambda weights, device: SlowDotDetector(float(weights.removeprefix("dots:")))
    return predict.main(sys.argv[1:])
