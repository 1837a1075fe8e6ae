"""Principal components of the vectors of all slides, computed in one pass, and the colours that they give to nuclei."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from muse_fast.exploring.vectors import VectorFile

SAMPLE = 20_000  # nuclei, at most, of which pictures show positions and ranges
_NOISE = 1e-12  # components with less than this share of the largest variance are rounding errors
_SHOWN = (0.02, 0.98)  # quantiles of a component that become black and full colour
_MIDDLE = 128  # of a component in which nuclei do not differ


class Sample(NamedTuple):
    """Some nuclei of all slides."""

    file: NDArray[np.int64]  # [n], position in the list of files
    row: NDArray[np.int64]  # [n], of the file
    xy: NDArray[np.float64]  # [n, 2], level-0 pixels
    vectors: NDArray[np.float32]  # [n, D]


class Components(NamedTuple):
    """The first principal components of centred vectors."""

    mean: NDArray[np.float64]  # [D]
    axes: NDArray[np.float64]  # [k, D], orthonormal rows; zeros where the vectors have fewer than k dimensions
    share: NDArray[np.float64]  # [k], of the variance

    def project(self, vectors: NDArray[np.floating]) -> NDArray[np.float64]:
        """Coordinates ``[n, k]`` of vectors ``[n, D]``."""
        return (vectors - self.mean) @ self.axes.T


class Colours(NamedTuple):
    """The colour of a vector: its first three components as red, green and blue."""

    components: Components
    low: NDArray[np.float64]  # [3], shown as 0
    high: NDArray[np.float64]  # [3], shown as 255

    def __call__(self, vectors: NDArray[np.floating]) -> NDArray[np.uint8]:
        """RGB ``[n, 3]`` of vectors ``[n, D]``."""
        span = self.high - self.low
        scaled = (self.components.project(vectors) - self.low) / np.where(span > 0, span, 1)
        shades = np.where(span > 0, scaled.clip(0, 1) * 255, _MIDDLE)
        return shades.round().astype(np.uint8)


def fit_components(
    files: Sequence[VectorFile], count: int = 3, *, most: int = SAMPLE, rows: int | None = None
) -> tuple[Components, Sample]:
    """The exact principal components of all nuclei, and a sample of nuclei, in one pass over the files.

    Blocks are added up to the covariance matrix ``[D, D]`` in float64, so memory does not depend on the number of
    nuclei. The sign of an axis is such that its largest entry is positive.

    Args:
        files: in the order of `open_vectors`; the result depends on it by rounding.
        count: number k of components.
        most: size of the sample, which is spread evenly over all nuclei.
        rows: nuclei read at a time, see `VectorFile.blocks`.
    """
    dim, total = files[0].dim, sum(file.count for file in files)
    chosen = np.linspace(0, total - 1, min(total, most)).round().astype(np.int64)
    size = len(chosen)
    sample = Sample(
        np.empty_like(chosen), np.empty_like(chosen), np.empty((size, 2)), np.empty((size, dim), np.float32)
    )
    shift: NDArray[np.float64] | None = None  # near the mean, so that the squares of a far mean do not swamp the rest
    sums, products, seen = np.zeros(dim), np.zeros((dim, dim)), 0
    for number, file in enumerate(files):
        for block in file.blocks(rows):
            vectors = block.vectors.astype(np.float64)
            shift = vectors.mean(axis=0) if shift is None else shift
            centred = vectors - shift
            sums += centred.sum(axis=0)
            products += centred.T @ centred
            near, far = np.searchsorted(chosen, (seen, seen + len(vectors)))
            inside = chosen[near:far] - seen
            sample.file[near:far] = number
            sample.row[near:far] = block.first + inside
            sample.xy[near:far] = block.xy[inside]
            sample.vectors[near:far] = block.vectors[inside]
            seen += len(vectors)
    if shift is None:
        return Components(np.zeros(dim), np.zeros((count, dim)), np.zeros(count)), sample
    mean = sums / total
    return _principal(mean + shift, products / total - np.outer(mean, mean), count), sample


def _principal(mean: NDArray[np.float64], covariance: NDArray[np.float64], count: int) -> Components:
    values, vectors = np.linalg.eigh(covariance)
    kept = min(count, len(values))
    values, axes = values[::-1][:kept], vectors.T[::-1][:kept]
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1))
    real = values > _NOISE * max(values[0], 0)
    padded, share = np.zeros((count, len(mean))), np.zeros(count)
    padded[:kept], share[:kept] = np.where(real[:, None], axes, 0), np.where(real, values, 0)
    return Components(mean, padded, share / (np.trace(covariance) or 1))


def fit_colours(components: Components, sample: Sample) -> Colours:
    """The colours by which nuclei of ``sample`` differ most: each component from its 2 % to its 98 % quantile."""
    projected = components.project(sample.vectors)
    if not len(projected):
        projected = np.zeros((1, len(components.share)))
    low, high = np.quantile(projected, _SHOWN, axis=0)
    return Colours(components, low, high)
