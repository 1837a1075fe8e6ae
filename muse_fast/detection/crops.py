"""Training crops of the learned nucleus detector: rotated, scaled and restained, with their target heatmaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import Tensor

from muse_fast.finders.network import STRIDE, optical_density

ZOOM = (0.8, 1.25)  # of a crop, since nuclei of other organs are larger or smaller
# Standard deviation of the log of the factors of hematoxylin, eosin and residual, and of red, green and blue. At half
# this value, a network finds only a sixth of the nuclei of a laboratory whose stain is redder than that of BRCA-M2C.
COLOUR = 0.35
FOCUS = (-0.7, 1.0)  # weight of a blur of up to 1.2 px; negative weights sharpen, as scanners do
BLUR = 1.2


@dataclass(frozen=True, slots=True)
class Annotated:
    """An image at the um/px of the detector, and the centres of its nuclei."""

    image: Tensor  # [3, H, W] uint8
    xy: Tensor  # [n, 2] float32 pixels


@dataclass(frozen=True, slots=True)
class Crops:
    """One batch. Cells outside the image have weight 0, since nuclei are not annotated there."""

    density: Tensor  # [B, 3, size, size] optical density
    target: Tensor  # [B, size / STRIDE, size / STRIDE]
    weight: Tensor  # shape of target, 0 or 1


def draw_crops(
    images: Sequence[Annotated], rng: np.random.Generator, *, batch_size: int, size: int, sigma: float
) -> Crops:
    """Draw ``batch_size`` random crops, each from a different image if there are enough images.

    Args:
        size: side of a crop in pixels.
        sigma: standard deviation of the Gaussian around each centre, pixels.
    """
    chosen = rng.choice(len(images), batch_size, replace=batch_size > len(images))
    parts = [_draw_crop(images[i], rng, size, sigma) for i in chosen]
    return Crops(*(torch.stack(column) for column in zip(*parts, strict=True)))


def gaussian_target(xy: Tensor, size: int, sigma: float) -> Tensor:
    """``[size / STRIDE, size / STRIDE]``: ``exp(-d^2 / (2 sigma^2))`` for a cell's distance d to the nearest centre."""
    places = (torch.arange(size // STRIDE) + 0.5) * STRIDE
    xy = xy[((xy > -4 * sigma) & (xy < size + 4 * sigma)).all(1)]  # others have no effect
    if not len(xy):
        return torch.zeros(len(places), len(places))
    squares = (places - xy[:, :, None]) ** 2  # [n, 2, cells]
    nearest = (squares[:, 1, :, None] + squares[:, 0, None, :]).amin(0)
    return torch.exp(nearest / (-2 * sigma**2))


def _draw_crop(item: Annotated, rng: np.random.Generator, size: int, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    _, height, width = item.image.shape
    zoom, angle = rng.uniform(*ZOOM), rng.uniform(0, 2 * math.pi)
    mirror = float(rng.choice((-1, 1)))
    sides = np.array([width, height])
    inset = np.minimum(size / zoom / 2, sides / 2)  # distance to the border that keeps most of the crop inside
    centre = torch.tensor(rng.uniform(inset, sides - inset), dtype=torch.float32)
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    # A point is at to_crop (point - centre) + size / 2 in the crop.
    to_crop = torch.tensor([[mirror * cos, -sin], [mirror * sin, cos]], dtype=torch.float32)

    xy = (item.xy - centre) @ to_crop.T + size / 2
    cells = (torch.arange(size) + 0.5) - size / 2
    places = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), dim=-1) @ torch.linalg.inv(to_crop).T + centre
    grid = (2 * places / torch.tensor([width, height]) - 1)[None]
    dark = 255 - item.image[None].float()  # so that zeros outside the image are glass
    crop = F.grid_sample(dark, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]
    crop = torch.einsum("cyx,cd->dyx", optical_density(255 - crop), _restaining(rng))
    crop = torch.lerp(crop, _blurred(crop, rng.uniform(0.3, BLUR)), rng.uniform(*FOCUS))
    inside = ((places >= 0) & (places < torch.tensor([width, height]))).all(-1).float()
    weight = F.max_pool2d(inside[None], STRIDE)[0]
    return crop.clamp(0, 2.4), gaussian_target(xy, size, sigma), weight


def _restaining(rng: np.random.Generator) -> Tensor:
    """``[3, 3]``, density (rows) to density (columns): unmix the stains, scale their amounts, mix them again."""
    amounts, gains = rng.lognormal(0, COLOUR, (2, 3))
    matrix: NDArray[np.float64] = hed_from_rgb @ np.diag(amounts) @ rgb_from_hed @ np.diag(gains)
    return torch.tensor(matrix, dtype=torch.float32)


def _blurred(crop: Tensor, sigma: float) -> Tensor:
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(torch.arange(-radius, radius + 1) ** 2 / (-2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(crop[None], (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)[0]
