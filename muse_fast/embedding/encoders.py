"""Networks that turn nuclei into vectors, by the map of a window or by a crop for each nucleus."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muse_fast.classification.tiles import crops_around
from muse_fast.detection.detector import BEST, STEM, Detector, best_of, load_detector
from muse_fast.detection.squares import cut_square
from muse_fast.errors import UserError, require
from muse_fast.models.backbone import Backbone
from muse_fast.models.encoder import describe_sides, nearest
from muse_fast.models.timm.backbone import TimmBackbone, load_timm
from muse_fast.models.timm.networks import PREFIX, parse_spec
from muse_fast.models.weights import find_checkpoint, load_backbone
from muse_fast.predicting.inputs import weights_sha256
from muse_fast.runtime import checkpoint

_TIMM_SIDE = 224  # pixels: of images for networks of timm, as in `evaluate`
_CROP_BLOCK = 1024  # pixels: side of the squares in which crops are read


class Shown(NamedTuple):
    """Images of some nuclei, as an encoder takes them."""

    images: Tensor  # [I, 3, R, R] uint8
    xy: Tensor  # [n, 2] float32, pixels of its image
    image_index: Tensor  # [n] int64, ascending


class Encoder(Protocol):
    """Turns nuclei into vectors.

    Attributes:
        protocol: its name in the file.
        mpp: um per pixel of the images.
        side: of the windows that are read, in pixels.
        margin: pixels that a window shows around a nucleus, at least.
        dim: D, width of a vector.
        device: of the network.
    """

    protocol: str
    mpp: float
    side: int
    margin: int
    dim: int
    device: torch.device

    def windows_of(self, batch: int) -> int:
        """Number of windows that have at least ``batch`` images, as a rule."""
        ...

    def shown(self, pixels: NDArray[np.uint8], corner: tuple[int, int], xy: NDArray[np.float64]) -> Shown:
        """The images of some nuclei.

        Args:
            pixels: ``[H, W, 3]`` RGB, the part of a window that is on the page.
            corner: of the window, in these pixels; negative if the page is smaller than a window.
            xy: ``[n, 2]``, in these pixels.
        """
        ...

    def vectors(self, shown: Shown) -> Tensor:
        """One vector per nucleus, ``[n, D]`` float32, on the device of the network."""
        ...


class _Encoder:
    def __init__(self, network: Backbone | TimmBackbone, device: torch.device, bf16: bool) -> None:
        self.network = network.to(device).eval()
        self.device, self._bf16 = device, bf16

    def _pinned(self, tensor: Tensor) -> Tensor:
        """The tensor in memory from which it can be copied to a GPU without waiting."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)


def _as_image(pixels: NDArray[np.uint8]) -> Tensor:
    """``[H, W, 3]`` -> ``[3, H, W]``; arrays of Pillow are read-only, which torch does not have."""
    return torch.from_numpy(np.require(pixels, requirements="W")).permute(2, 0, 1)


class MapEncoder(_Encoder):
    """Reads the map of a window at each of its nuclei, by ``nucleus_features``.

    Args:
        network: with ``nucleus_features``.
        mpp: um per pixel of the windows.
        side: of a window in pixels; the network accepts it.
        context_um: tissue that a window shows around a nucleus, at least.
    """

    protocol = "map"

    def __init__(
        self,
        network: Backbone | TimmBackbone,
        mpp: float,
        side: int,
        context_um: float,
        device: torch.device,
        bf16: bool,
    ) -> None:
        super().__init__(network, device, bf16)
        self.mpp, self.side, self.margin = mpp, side, math.ceil(context_um / mpp)
        self.dim = network.dense_dim

    def windows_of(self, batch: int) -> int:
        """See `Encoder.windows_of`."""
        return batch

    def shown(self, pixels: NDArray[np.uint8], corner: tuple[int, int], xy: NDArray[np.float64]) -> Shown:
        """See `Encoder.shown`: one image, the window; beyond a small page it shows mirrored tissue."""
        image = cut_square(_as_image(pixels), *corner, self.side, "reflect")
        place = torch.from_numpy(xy - corner).float().clamp_(0, self.side)
        return Shown(image[None].contiguous(), place, torch.zeros(len(xy), dtype=torch.int64))

    @torch.inference_mode()
    def vectors(self, shown: Shown) -> Tensor:
        """See `Encoder.vectors`."""
        with self._autocast():
            images, xy, image_index = map(self._pinned, shown)
            return self.network.nucleus_features(images.to(self.device, non_blocking=True), xy, image_index).float()


class CropEncoder(_Encoder):
    """Describes each nucleus by the image feature of a crop in whose middle it lies.

    Args:
        network: with ``cls``.
        crop_um: side of a crop.
        size: its pixels, which the network accepts.
    """

    protocol = "crop"

    def __init__(
        self, network: Backbone | TimmBackbone, crop_um: float, size: int, device: torch.device, bf16: bool
    ) -> None:
        super().__init__(network, device, bf16)
        self.mpp, self._size = crop_um / size, size
        self.side, self.margin = max(_CROP_BLOCK, 2 * size), size // 2 + 1
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        self.dim = self.vectors(Shown(blank, torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))).shape[1]

    def windows_of(self, batch: int) -> int:
        """See `Encoder.windows_of`."""
        return 1

    def shown(self, pixels: NDArray[np.uint8], corner: tuple[int, int], xy: NDArray[np.float64]) -> Shown:
        """See `Encoder.shown`: one image per nucleus, see `crops_around`."""
        crops, places = crops_around(pixels, xy, self._size)
        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
        return Shown(images, torch.from_numpy(places), torch.arange(len(xy)))

    @torch.inference_mode()
    def vectors(self, shown: Shown) -> Tensor:
        """See `Encoder.vectors`."""
        with self._autocast():
            return self.network.cls(self._pinned(shown.images).to(self.device, non_blocking=True)).float()


class Weights(NamedTuple):
    """What ``--weights`` names."""

    name: str
    sha256: str  # of the file, or of the checkpoint's tensors; "" if they are random
    mpp: float | None  # um per pixel of a detector's images
    side: int  # of the images in pixels
    network: Backbone | TimmBackbone
    detector: Detector | None = None  # of which it is the backbone


def open_weights(text: str, arch: str | None, compat: str | None, side: int | None) -> Weights:
    """Load a network, on the CPU.

    Args:
        text: as for `load_backbone`, a run of ``muse_fast.finetune``, or ``timm:NAME[:key=value ...][@FILE]``.
        side: of its images in pixels; None: that which it was made for.

    Raises:
        UserError: as in `load_backbone` and `load_timm`, or the network does not take images of this side.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if text.startswith(PREFIX):
            file = parse_spec(text).file
            side = side or _TIMM_SIDE
            sha256 = weights_sha256(str(file)) if file else ""
            return Weights(text, sha256, None, side, load_timm(text, image_size=side).backbone)
        mpp = detector = None
        if holds_detector(Path(text)):
            detector = load_detector(text)
            network, mpp, made_for = detector.backbone, detector.mpp, detector.spec.sample_size
            folder = best_of(Path(text))
        else:
            network, folder = load_backbone(arch, text, compat=compat), Path(text)
            made_for = network.image_size
    side = side or made_for
    expected = f"{describe_sides(network.sides)} for {network.arch}; the nearest is {nearest(side, network.sides)}"
    require(side in network.sides, "window", side, expected)
    sha256 = "" if text.startswith("random") else weights_sha256(str(_tensors_of(folder)))
    return Weights(text, sha256, mpp, side, network, detector)


def holds_detector(path: Path) -> bool:
    """Whether ``path`` is a run of ``muse_fast.finetune`` or one of its checkpoints."""
    if not path.is_dir():
        return False
    if (path / BEST).is_dir():
        return True
    try:
        return STEM in checkpoint.read_state(find_checkpoint(path))
    except UserError:
        return False


def _tensors_of(path: Path) -> Path:
    """The newest checkpoint of a run, else ``path``."""
    return find_checkpoint(path) if (path / "checkpoints").is_dir() else path
