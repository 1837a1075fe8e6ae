"""Procedural H&E: images that need no download, with nuclei of known positions and types.

Light is absorbed, so stains add in optical density: ``OD = h * H + e * E`` with the hematoxylin and eosin vectors of
Macenko et al. (2009), and the pixel is ``255 * 10 ** -OD``. Eosin has a fibrous texture; each nucleus is an
ellipse of hematoxylin. The images are for tests and demos: they look like H&E at a glance, but a model learns nothing
about tissue from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LABEL_NAMES = ("lymphocyte", "tumour", "stromal")
MPP = 0.25
SIZE = 512

_HEMATOXYLIN = np.array([0.563, 0.720, 0.406], np.float32)
_EOSIN = np.array([0.216, 0.801, 0.558], np.float32)


@dataclass(frozen=True)
class _Type:
    """How the nuclei of one type look; lengths in um."""

    radius: tuple[float, float]  # mean radius, lowest and highest
    elongation: tuple[float, float]  # long axis / short axis
    stain: tuple[float, float]  # optical density of hematoxylin
    chromatin: float  # amplitude of its texture, as a share of the stain
    rim: float  # extra stain at the nuclear membrane


_TYPES = (
    _Type(radius=(2.6, 3.3), elongation=(1.0, 1.2), stain=(1.0, 1.25), chromatin=0.15, rim=0.0),
    _Type(radius=(4.4, 6.2), elongation=(1.1, 1.6), stain=(0.45, 0.65), chromatin=0.4, rim=0.35),
    _Type(radius=(2.7, 3.5), elongation=(2.8, 4.2), stain=(0.65, 0.90), chromatin=0.25, rim=0.1),
)


def synthetic_image(
    seed: int | tuple[int, ...], size: int = SIZE, mpp: float = MPP
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int16]]:
    """One image; the same arguments give the same bytes in every process.

    Args:
        seed: one or more numbers that select the image.
        size: side in pixels.
        mpp: um per pixel.

    Returns:
        image ``[size, size, 3]`` uint8 RGB, xy ``[n, 2]`` float32 centres in pixels, label ``[n]`` int16, index in
        ``LABEL_NAMES``.
    """
    rng = np.random.default_rng(seed)
    xy, label = _place(rng, size * mpp)
    hematoxylin, covered = _draw_nuclei(rng, xy / mpp, label, size, mpp)
    eosin = _stroma(rng, size, mpp) * (1 - 0.4 * covered)
    slide = rng.uniform(0.85, 1.15, 2)  # laboratories stain differently
    density = np.multiply.outer(slide[0] * hematoxylin, _HEMATOXYLIN) + np.multiply.outer(slide[1] * eosin, _EOSIN)
    density += rng.standard_normal(density.shape, np.float32) * 0.008
    image = np.clip(250.0 * 10.0 ** -density.astype(np.float32), 0, 255).astype(np.uint8)
    return image, (xy / mpp).astype(np.float32), label


def _place(rng: np.random.Generator, side: float) -> tuple[NDArray[np.float64], NDArray[np.int16]]:
    """Centres in um of nuclei that do not overlap, and their types. Tumour grows in nests, the rest around them."""
    nests = rng.uniform(0, side, (max(1, round(side / 45)), 2))
    wanted = round(side * side * rng.uniform(3.5e-3, 5.5e-3))  # nuclei per um^2 of real tissue
    xy, label, room = np.empty((wanted, 2)), np.empty(wanted, np.int16), np.empty(wanted)
    placed = 0
    for point in rng.uniform(0, side, (3 * wanted, 2)):
        in_nest = np.hypot(*(nests - point).T).min() < 26
        kind = rng.choice(3, p=(0.10, 0.86, 0.04) if in_nest else (0.55, 0.02, 0.43))
        distance = _TYPES[kind].radius[1] * math.sqrt(_TYPES[kind].elongation[1])
        gaps = np.hypot(*(xy[:placed] - point).T)
        if placed < wanted and (gaps >= 0.7 * (distance + room[:placed])).all():
            xy[placed], label[placed], room[placed] = point, kind, distance
            placed += 1
    return xy[:placed], label[:placed]


def _draw_nuclei(
    rng: np.random.Generator, xy: NDArray[np.float64], label: NDArray[np.int16], size: int, mpp: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Density of hematoxylin and the share of each pixel that nuclei cover, both ``[size, size]``."""
    chromatin = _noise(rng, size, 1.1 / mpp)
    haze = 0.05 + 0.05 * _noise(rng, size, 20 / mpp)
    density = np.maximum(haze, 0).astype(np.float32)
    covered = np.zeros((size, size), np.float32)
    for (x, y), kind in zip(xy, label, strict=True):
        look = _TYPES[kind]
        radius, elongation = rng.uniform(*look.radius), rng.uniform(*look.elongation)
        stain, angle, *phase = rng.uniform((look.stain[0], 0, 0, 0), (look.stain[1], *[2 * np.pi] * 3))
        axes = radius * math.sqrt(elongation) / mpp, radius / math.sqrt(elongation) / mpp
        reach = math.ceil(1.5 * axes[0]) + 1
        rows = slice(max(0, int(y) - reach), min(size, int(y) + reach + 1))
        columns = slice(max(0, int(x) - reach), min(size, int(x) + reach + 1))
        v, u = np.mgrid[rows, columns] + 0.5 - np.array([y, x])[:, None, None]
        along = (u * math.cos(angle) + v * math.sin(angle)) / axes[0]
        across = (v * math.cos(angle) - u * math.sin(angle)) / axes[1]
        theta = np.arctan2(across, along)
        outline = 1 + 0.05 * np.cos(2 * theta + phase[0]) + 0.04 * np.cos(3 * theta + phase[1])
        distance = np.hypot(along, across) / outline  # 1 at the membrane
        inside = 1 / (1 + np.exp(np.clip((distance - 1) * axes[1] * mpp / 0.15, -30, 30)))
        texture = 1 + look.chromatin * chromatin[rows, columns] + look.rim * np.exp(-(((distance - 0.9) / 0.12) ** 2))
        if kind == 1:  # a nucleolus, off-centre
            place = np.hypot(along - 0.3 * math.cos(phase[0]), across - 0.3 * math.sin(phase[0])) * radius
            texture += 0.8 * np.exp(-((place / 0.8) ** 2))
        nucleus = inside * stain * texture
        density[rows, columns] = np.maximum(density[rows, columns], nucleus)
        covered[rows, columns] = np.maximum(covered[rows, columns], inside)
    return density, covered


def _stroma(rng: np.random.Generator, size: int, mpp: float) -> NDArray[np.float32]:
    """Density of eosin ``[size, size]``: wavy fibres, coarse patches and a few clefts without tissue."""
    y, x = np.mgrid[:size, :size].astype(np.float32) * mpp
    angle = rng.uniform(0, np.pi)
    across = x * math.cos(angle) + y * math.sin(angle) + 14 * _noise(rng, size, 45 / mpp)
    fibres = np.sin(across * (2 * np.pi / 7) + 1.5 * _noise(rng, size, 6 / mpp))
    patches = _noise(rng, size, 25 / mpp)
    clefts = 1 / (1 + np.exp(np.clip((np.abs(across % 70 - 35) - 1.2 - patches) * -2, -30, 30)))
    return (0.26 + 0.05 * fibres + 0.05 * patches + 0.03 * _noise(rng, size, 1.5 / mpp)) * (0.15 + 0.85 * clefts)


def _noise(rng: np.random.Generator, size: int, cell: float) -> NDArray[np.float32]:
    """Smooth noise ``[size, size]``, about -1 to 1, with structures of ``cell`` pixels."""
    cells = math.ceil(size / cell) + 3
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    left, top = rng.uniform(0, 1, 2)
    box = (1 + left, 1 + top, 1 + left + size / cell, 1 + top + size / cell)
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC, box=box))
