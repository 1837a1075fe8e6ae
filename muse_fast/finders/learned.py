"""Finders of nuclei of any class, which all look alike: a classical one, and a network that learned from annotations.

The setting ``detector=`` of `muse_fast.prepare` names one of them; `muse_fast.detection.detector` also classifies.

``load_finder("default")`` returns the better of the two on the test split of BRCA-M2C; weights/README.md has the
scores. A network is one ``.safetensors`` file: weights, and as text what goes with them (um/px, threshold, distance
between nuclei, training data, scores).
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

if TYPE_CHECKING:  # torch takes seconds to import, and the classical finder needs none
    from torch import Tensor

    from muse_fast.finders.network import NucleusNet

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = {"resnet18": WEIGHTS / "nuclei_resnet18.safetensors"}
DEFAULT = "resnet18"
KIND = "muse_fast nucleus detector"

_TILE = 1536  # pixels: side of what is computed at a time, without the margin; a ROI of 512 um and its own fit
_SETTINGS = ("mpp", "threshold", "min_distance_um")


class NucleusFinder(Protocol):
    """Finds nuclei.

    Attributes:
        reach_um: a pixel further away than this has no influence on a detection: the margin to read around a ROI.
        threshold: the lowest score of a nucleus, unless the caller gives another.
    """

    reach_um: float
    threshold: float

    def __call__(self, image: NDArray[np.uint8], mpp: float, *, threshold: float | None = None) -> Points:
        """Nuclei of ``image`` ``[H, W, 3]`` uint8 RGB at ``mpp`` um per pixel.

        Returns:
            xy float32 in pixels of ``image``, and scores float32, highest first; no labels.
        """
        ...


class ClassicalFinder:
    """:func:`muse_fast.finders.classical.detect_nuclei` in the common form."""

    reach_um = classical.REACH_UM

    def __init__(self, threshold: float = classical.THRESHOLD) -> None:
        self.threshold = threshold

    def __call__(self, image: NDArray[np.uint8], mpp: float, *, threshold: float | None = None) -> Points:
        xy, response = classical.detect_nuclei(image, mpp, threshold=self.threshold if threshold is None else threshold)
        return Points(xy, score=response)


class LearnedFinder:
    """A :class:`NucleusNet` and the settings that turn its heatmap into points.

    Images of up to twice its um/px are enlarged; coarser ones are refused, as nuclei cannot be told apart in them.

    Args:
        network: in evaluation mode.
        mpp: um per pixel that it was trained at; images are resampled to it.
        threshold: lowest score of a nucleus, 0 to 1.
        min_distance_um: of two places nearer than this the one with the higher score is kept.
    """

    def __init__(self, network: NucleusNet, mpp: float, threshold: float, min_distance_um: float) -> None:
        from muse_fast.finders.network import REACH

        self.network, self.mpp, self.threshold, self.min_distance_um = network, mpp, threshold, min_distance_um
        self.reach_um = REACH * mpp

    def __call__(self, image: NDArray[np.uint8], mpp: float, *, threshold: float | None = None) -> Points:
        if mpp > 2 * self.mpp:
            raise UserError(f"{mpp:g} um/px is too coarse for this nucleus detector, expected {2 * self.mpp:g} at most")
        small = resampled(image, mpp / self.mpp)
        xy, score = heatmap_peaks(
            self.heatmap(small), self.min_distance_um / self.mpp, self.threshold if threshold is None else threshold
        )
        (height, width), (small_height, small_width) = image.shape[:2], small.shape[:2]
        xy *= np.array([width / small_width, height / small_height], np.float32)
        # The summit in the last cell may lie on the border, which is outside.
        inside = np.nextafter(np.array([width, height], np.float32), np.float32(0))
        return Points(np.clip(xy, 0, inside), score=score)

    def heatmap(self, image: NDArray[np.uint8], tile: int = _TILE) -> NDArray[np.float32]:
        """Logits ``[ceil(H / 2), ceil(W / 2)]`` of an image at the finder's um/px.

        They do not depend on ``tile`` (a multiple of 16): every tile is computed with all that its cells see. Nor on
        the cores: one thread does the sums in one order, and slides are what is shared out among processes.
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
        """Of ``[3, h, w]`` uint8; padded with glass to the sides that the network accepts."""
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

    A cell counts where none of its eight neighbours is higher; the place is the top of the parabola through it and
    its neighbours, per axis, which is exact for a Gaussian in the logarithm.

    Args:
        heat: ``[h, w]`` logits.
        min_distance: pixels; of two peaks nearer than this the lower is dropped, from the highest down.
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
    x = columns + _summit(padded[rows + 1, columns], heat[rows, columns], padded[rows + 1, columns + 2])
    y = rows + _summit(padded[rows, columns + 1], heat[rows, columns], padded[rows + 2, columns + 1])
    xy = ((np.stack([x, y], axis=1) + 0.5) * STRIDE).astype(np.float32)
    kept = non_maximum_suppression(xy, min_distance)
    return xy[kept], score[rows, columns][kept]


def _summit(before: NDArray[np.float32], at: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where the parabola through three neighbours is highest, -0.5 to 0.5 from the middle one."""
    bend = 2 * at - before - after
    return np.clip((after - before) / np.maximum(2 * bend, 1e-6), -0.5, 0.5)


# --------------------------------------------------------------------------------------------------------- files


@lru_cache(maxsize=4)
def load_finder(name: str = "default") -> NucleusFinder:
    """A finder by name, or from a file that ``train_detector`` wrote.

    In a data worker (a child process) torch is set to one thread: there are as many workers as cores.

    Args:
        name: ``default``, ``classical``, ``resnet18`` or a path that ends in ``.safetensors``.

    Raises:
        UserError: not a known detector or file, or the file is damaged or something else.
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
        UserError: no such file, damaged, or of another kind; names the file.
    """
    from muse_fast.finders.network import NucleusNet
    from muse_fast.runtime.tensors import load_strictly

    tensors, metadata = _read(path)
    settings = {}
    for key in _SETTINGS:
        try:
            settings[key] = float(metadata[key])
        except (KeyError, ValueError):
            raise UserError(f"{path}: the metadata has no number {key!r}; expected a file of train_detector") from None
    network = NucleusNet()
    load_strictly(network, {name: tensor.float() for name, tensor in tensors.items()}, str(path))
    return LearnedFinder(network.eval(), **settings)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of the right kind."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the .safetensors of a nucleus detector")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
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
