"""Check whether the um per pixel of labelled images is plausible, by the distances and the width of their nuclei.

A wrong scale spoils training without a visible sign. Two measures reveal it. Nuclei in a tissue section lie about 8 um
from their nearest neighbour. And the image is darker at nuclei: averaged over some hundred nuclei of any class, the
optical density of red falls to half of its height about 2.5 um from the centre (BRCA-M2C: 8.1 um apart, 5.3 um wide).
Both measures are wrong by the same factor as the scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from muse_fast.sources.base import SourceImage

WIDTH_UM = (3.5, 9.0)
SPACING_UM = (4.0, 30.0)  # a wide range, because only some classes may be annotated
TYPICAL_WIDTH_UM = 5.0
MAX_PER_MM2 = 20_000
MIN_CONTRAST = 0.03  # optical density of nuclei minus that of their surroundings
MIN_NUCLEI = 30  # fewer are too few for a meaningful mean

_REACH_UM = 10.0
_BIN_UM = 0.5
_PER_IMAGE = 256


class ScaleCheck:
    """Accumulates both measures over images."""

    def __init__(self) -> None:
        self._spacing: list[NDArray[np.float64]] = []
        self._mm2 = 0.0
        self._count = 0
        self._density = np.zeros((2, round(_REACH_UM / _BIN_UM) + 1))  # sum and number of pixels by radius
        self._measured = 0
        self._mpp: list[float] = []

    def add(self, item: SourceImage) -> None:
        from scipy.spatial import cKDTree

        height, width, _ = item.image.shape
        self._mm2 += height * width * (item.mpp / 1000) ** 2
        self._count += len(item.xy)
        self._mpp.append(item.mpp)
        if len(item.xy) > 1:
            distance, _ = cKDTree(item.xy).query(item.xy, k=2)
            self._spacing.append(distance[:, 1] * item.mpp)
        self._add_profile(item)

    def _add_profile(self, item: SourceImage) -> None:
        reach = int(_REACH_UM / item.mpp)
        height, width, _ = item.image.shape
        centres = item.xy.astype(np.int64)
        whole = ((centres >= reach) & (centres < np.array([width, height]) - reach)).all(axis=1)
        centres = centres[whole]
        if not len(centres) or not reach:
            return
        x, y = centres[:: -(-len(centres) // _PER_IMAGE)].T
        dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
        bins = np.round(np.hypot(dx, dy) * item.mpp / _BIN_UM).astype(np.int64)
        near = bins < self._density.shape[1]
        red = item.image[y[:, None] + dy[near], x[:, None] + dx[near], 0]
        density = -np.log10(np.maximum(red, 1) / 255).sum(axis=0)
        np.add.at(self._density, (0, bins[near]), density)
        np.add.at(self._density, (1, bins[near]), len(x))
        self._measured += len(x)

    def summary(self) -> dict[str, float | None]:
        """Return nuclei per mm2, median distance to the nearest neighbour, width (um) and contrast; None: too few."""
        spacing = np.concatenate(self._spacing) if self._spacing else np.zeros(0)
        width, contrast = self._width() if self._measured >= MIN_NUCLEI else (None, None)
        return {
            "nuclei_per_mm2": round(self._count / self._mm2, 1) if self._count >= MIN_NUCLEI else None,
            "spacing_um": round(float(np.median(spacing)), 2) if len(spacing) >= MIN_NUCLEI else None,
            "width_um": width,
            "contrast": contrast,
        }

    def _width(self) -> tuple[float | None, float]:
        """Return the full width at half height of the mean density around a nucleus, and the height."""
        filled = self._density[1] > 0
        radius = np.arange(len(filled))[filled] * _BIN_UM
        density = self._density[0][filled] / self._density[1][filled]
        top, bottom = density[:2].mean(), density.min()
        below = np.flatnonzero(density < (top + bottom) / 2)
        contrast = round(float(top - bottom), 3)
        if contrast < MIN_CONTRAST or not len(below) or below[0] == 0:
            return None, contrast
        i = below[0]
        part = (density[i - 1] - (top + bottom) / 2) / (density[i - 1] - density[i])
        return round(float(2 * (radius[i - 1] + part * (radius[i] - radius[i - 1]))), 2), contrast

    def warnings(self) -> list[str]:
        """Describe the values that are not plausible."""
        found = self.summary()
        mpp = float(np.median(self._mpp)) if self._mpp else 0.0
        said = []
        if (contrast := found["contrast"]) is not None and contrast < MIN_CONTRAST:
            said.append("the points do not lie on dark spots: are x and y swapped, or the labels of other images?")
        if (width := found["width_um"]) is not None and not WIDTH_UM[0] <= width <= WIDTH_UM[1]:
            said.append(
                f"nuclei look {width:.1f} um wide, expected {WIDTH_UM[0]:g} to {WIDTH_UM[1]:g}: {mpp:g} um/px is "
                f"probably wrong, about {mpp * TYPICAL_WIDTH_UM / width:.2g} would fit"
            )
        if (spacing := found["spacing_um"]) is not None and not SPACING_UM[0] <= spacing <= SPACING_UM[1]:
            said.append(
                f"nuclei lie {spacing:.1f} um from their nearest neighbour, expected {SPACING_UM[0]:g} to "
                f"{SPACING_UM[1]:g}: a wrong um/px, or few of them are annotated"
            )
        if (crowd := found["nuclei_per_mm2"]) is not None and crowd > MAX_PER_MM2:
            said.append(f"{crowd:.0f} nuclei per mm2, expected at most {MAX_PER_MM2}: the um/px is probably too small")
        return said
