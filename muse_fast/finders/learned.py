"""Finders of nuclei, whatever their class, with one interface: a classical one, and a network trained on annotations.

The setting ``detector=`` of `muse_fast.prepare` selects one of them; `muse_fast.detection.detector` also classifies.

``load_finder("default")`` returns the better of the two on the test split of BRCA-M2C; weights/README.md has the
scores. A network is one ``.safetensors`` file with its weights and, as metadata, um/px, threshold, minimum distance
between nuclei, training data and scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError, did_you_mean
from muse_fast.finders import classical
from muse_fast.images.image_files import resampled
from muse_fast.images.points import Points, non_maximum_suppression
from muse_fast.runtime import atomic

if TYPE_CHECKING:  # torch takes seconds to import, and the classical finder does not need it
    from torch import Tensor

    from muse_fast.finders.network import NucleusNet

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = {"resnet18": WEIGHTS / "nuclei_resnet18.safetensors"}
DEFAULT = "resnet18"
KIND = "muse_fast nucleus detector"

_TILE = 1536  # pixels: side of a block, without its margin; a ROI of 512 um fits with its margin
_SETTINGS = ("mpp", "threshold", "min_distance_um")


class NucleusFinder(Protocol):
    """Finds nuclei.

    Attributes:
        reach_um: pixels further away than this do not influence a detection: the margin to read around a ROI.
        threshold: default for the lowest score of a nucleus.
    """

    reach_um: float
    threshold: float

    def __call__(self, image: NDArray[np.uint8], mpp: float, *, threshold: float | None = None) -> Points:
        """Find the nuclei in ``image``, ``[H, W, 3]`` uint8 RGB at ``mpp`` um per pixel.

        Returns:
            xy float32 in pixels of ``image``, and scores float32, highest first; no labels.
        """
        ...


class ClassicalFinder:
    """:func:`muse_fast.finders.classical.detect_nuclei` as a `NucleusFinder`."""

    reach_um = classical.REACH_UM

    def __init__(self, threshold: float = classical.THRESHOLD) -> None:
        self.threshold = threshold

    def __call__(self, image: NDArray[np.uint8], mpp: float, *, threshold: float | None = None) -> Points:
        xy, response = classical.detect_nuclei(image, mpp, threshold=self.threshold if threshold is None else threshold)
        return Points(xy, score=response)


class LearnedFinder:
    """A :class:`NucleusNet` and the settings that turn its heatmap into points.

    Images of up to twice its um/px are enlarged; coarser ones are refused, as nuclei are indistinguishable in them.

    Args:
        network: in evaluation mode.
        mpp: um per pixel of its training; images are resampled to it.
        threshold: lowest score of a nucleus, 0 to 1.
        min_distance_um: of two peaks nearer than this only the one with the higher score is kept.
    """

    def __init__(self, network: NucleusNet, mpp: float, threshold: float, min_distance_um: float) -> None:
        from muse_fast.finders.network import REACH

        self.network, self.mpp, self.threshold, self.min_distance_um = network, mpp, threshold, min_distance_um
        self.reach_um = REACH * mpp

    def __call__(self, image: NDArray[np.uint8], mpp: float, *, threshold: float | None = None) -> Points:
        if mpp > 2 * self.mpp:
            raise UserError(f"{mpp:g} um/px is too coarse for this nucleus detector, expected at most {2 * self.mpp:g}")
        small = resampled(image, mpp / self.mpp)
        xy, score = heatmap_peaks(
            self.heatmap(small), self.min_distance_um / self.mpp, self.threshold if threshold is None else threshold
        )
        (height, width), (small_height, small_width) = image.shape[:2], small.shape[:2]
        xy *= np.array([width / small_width, height / small_height], np.float32)
        # A peak in the last cell may lie on the border, which is outside.
        inside = np.nextafter(np.array([width, height], np.float32), np.float32(0))
        return Points(np.clip(xy, 0, inside), score=score)

    def heatmap(self, image: NDArray[np.uint8], tile: int = _TILE) -> NDArray[np.float32]:
        """Logits ``[ceil(H / 2), ceil(W / 2)]`` of an image at the finder's um/px.

        They do not depend on ``tile`` (a multiple of 16), as every tile is computed with the surroundings that affect
        its cells, nor on the number of cores: one thread sums in a fixed order, and slides are processed in parallel.
        """
        import torch

        from muse_fast.finders.network import REACH, STRIDE

        height, width, _ = image.shape
        heat = np.empty((-(-height // STRIDE), -(-width // STRIDE)), np.float32)
        with torch.inference_mode(), _one_thread():
            for y in range(0, height, tile):
                for x in range(0, width, tile):
                    top, left = max(0, y - REACH), max(0, x - REACH)
                    block = image[top : y + tile + REACH, left : x + tile + REACH]
                    logits = self._logits(torch.tensor(block).permute(2, 0, 1))
                    part = heat[y // STRIDE : (y + tile) // STRIDE, x // STRIDE : (x + tile) // STRIDE]
                    rows, columns = (y - top) // STRIDE, (x - left) // STRIDE
                    part[:] = logits[rows : rows + part.shape[0], columns : columns + part.shape[1]]
        return heat

    def _logits(self, block: Tensor) -> NDArray[np.float32]:
        """Logits of ``[3, h, w]`` uint8, padded with glass to sides that the network accepts."""
        import torch.nn.functional as F

        from muse_fast.finders.network import MULTIPLE, optical_density

        fill = [-side % MULTIPLE for side in block.shape[:0:-1]]
        density = F.pad(
            optical_density(block.to(next(self.network.parameters()).device))[None], (0, fill[0], 0, fill[1])
        )
        logits: Tensor = self.network(density)
        return logits[0].cpu().numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def heatmap_peaks(
    heat: NDArray[np.float32], min_distance: float, threshold: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Local maxima of logits, to a fraction of a cell, in pixels of the image (cells of 2 x 2).

    A cell is a maximum if none of its eight neighbours is higher. Its position is the vertex of the parabola through it
    and its neighbours along each axis, which is exact for the logarithm of a Gaussian.

    Args:
        heat: ``[h, w]`` logits.
        min_distance: pixels; of two peaks nearer than this the lower is dropped, starting from the highest.
        threshold: lowest probability.

    Returns:
        xy ``[n, 2]`` float32 pixels, probabilities ``[n]`` float32, highest first.
    """
    from scipy.ndimage import maximum_filter
    from scipy.special import expit

    from muse_fast.finders.network import STRIDE

    score = expit(heat)
    rows, columns = np.nonzero((heat == maximum_filter(heat, 3, mode="nearest")) & (score >= threshold))
    order = np.lexsort((columns, rows, -heat[rows, columns]))
    rows, columns = rows[order], columns[order]
    padded = np.pad(heat, 1, mode="edge")
    x = columns + _vertex(padded[rows + 1, columns], heat[rows, columns], padded[rows + 1, columns + 2])
    y = rows + _vertex(padded[rows, columns + 1], heat[rows, columns], padded[rows + 2, columns + 1])
    xy = ((np.stack([x, y], axis=1) + 0.5) * STRIDE).astype(np.float32)
    kept = non_maximum_suppression(xy, min_distance)
    return xy[kept], score[rows, columns][kept]


def _vertex(before: NDArray[np.float32], at: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.float32]:
    """Offset of the vertex of the parabola through three neighbours from the middle one, -0.5 to 0.5."""
    curvature = 2 * at - before - after
    return np.clip((after - before) / np.maximum(2 * curvature, 1e-6), -0.5, 0.5)


# --------------------------------------------------------------------------------------------------------- files


@lru_cache(maxsize=4)
def load_finder(name: str = "default") -> NucleusFinder:
    """A finder by name, or from a file that ``train_detector`` wrote.

    Args:
        name: ``default``, ``classical``, ``resnet18`` or a path that ends in ``.safetensors``.

    Raises:
        UserError: the name is unknown, or the file is missing, damaged or not a detector.
    """
    name = DEFAULT if name == "default" else name
    if name == "classical":
        return ClassicalFinder()
    if name not in SHIPPED and not name.endswith(".safetensors"):
        known = ("default", "classical", *SHIPPED)
        raise UserError(
            f"detector={name}: expected one of {', '.join(known)}, or a .safetensors file{did_you_mean(name, known)}"
        )
    return read_finder(SHIPPED.get(name, Path(name)))


def read_finder(path: Path) -> LearnedFinder:
    """The finder in a file.

    Raises:
        UserError: the file is missing, damaged or not a detector; names the file.
    """
    from muse_fast.finders.network import NucleusNet
    from muse_fast.runtime.tensors import load_strictly

    tensors, metadata = _read(path)
    settings = {}
    for key in _SETTINGS:
        try:
            settings[key] = float(metadata[key])
        except (KeyError, ValueError):
            raise UserError(f"{path}: no number {key!r} in its metadata; expected a file from train_detector") from None
    network = NucleusNet()
    load_strictly(network, {name: tensor.float() for name, tensor in tensors.items()}, str(path))
    return LearnedFinder(network.eval(), **settings)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file of a detector."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the .safetensors of a nucleus detector")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable .safetensors file ({error}); copy or make it again") from error
    if metadata.get("kind") != KIND:
        raise UserError(f"{path}: not a {KIND} (its metadata says kind={metadata.get('kind')!r})")
    return tensors, metadata


def write_finder(path: Path, finder: LearnedFinder, about: Mapping[str, Any]) -> None:
    """Write weights (float16), settings and ``about`` (as JSON text) into one file."""
    from muse_fast.runtime.tensors import write_tensors

    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in finder.network.state_dict().items()
    }
    metadata = {"kind": KIND, "arch": "resnet18", **{key: repr(getattr(finder, key)) for key in _SETTINGS}}
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    with atomic.replacing(path) as temporary:
        write_tensors(temporary, tensors, metadata)
