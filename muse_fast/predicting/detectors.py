"""Detectors of nuclei in tiles: a nucleus finder, or a fine-tuned network."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from muse_fast.detection.detector import Detector, best_of, load_detector
from muse_fast.finders import classical
from muse_fast.finders.learned import LearnedFinder, load_finder
from muse_fast.images.points import Points
from muse_fast.predicting.inputs import weights_sha256

NUCLEI = "nuclei"
SHIPPED = (NUCLEI, "classical")  # detectors; files and folders of these names are not looked for
_TILES_AT_A_TIME = 2  # the network runs on one while peaks are found in the other


class TileDetector(Protocol):
    """Finds nuclei in tiles of one scale."""

    @property
    def mpp(self) -> float:
        """um per pixel of the tiles."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ..."""
        ...

    @property
    def tile_size(self) -> int:
        """Suitable side of the tiles in pixels; smaller ones work too."""
        ...

    @property
    def reach_um(self) -> float:
        """Pixels farther away than this have little or no influence on a detection."""
        ...

    @property
    def min_distance_um(self) -> float:
        """Two nuclei of a tile are never nearer to each other than this."""
        ...

    def detect(self, images: Tensor) -> list[Points]:
        """The nuclei of every tile of ``[B, 3, H, W]`` uint8 RGB, in pixels of that tile, with scores."""
        ...


class NucleusDetector:
    """A `NucleusFinder`, the same as for `prepare`; all nuclei are of one class."""

    class_names = ("nucleus",)

    def __init__(self, name: str, device: torch.device) -> None:
        self._finder = load_finder(name)
        self.reach_um = self._finder.reach_um
        if isinstance(self._finder, LearnedFinder):
            self._finder.network.to(device)
            self.mpp, self.min_distance_um, self.tile_size = self._finder.mpp, self._finder.min_distance_um, 1536
        else:
            self.mpp, self.min_distance_um, self.tile_size = classical.WORKING_MPP, classical.MIN_DISTANCE_UM, 1024
        self._threads = ThreadPoolExecutor(_TILES_AT_A_TIME)

    def detect(self, images: Tensor) -> list[Points]:
        """See `TileDetector.detect`."""
        return list(self._threads.map(lambda image: self._finder(image, self.mpp), images.permute(0, 2, 3, 1).numpy()))


class FineTunedDetector:
    """A network from ``muse_fast.finetune``."""

    def __init__(self, network: Detector, device: torch.device, bf16: bool | None = None) -> None:
        """
        Args:
            network: in evaluation mode, on the device.
            bf16: None: on a GPU.

        Attributes:
            dim: width D of the vectors of `describe`.
        """
        self._network, self._device = network, device
        self._bf16 = device.type == "cuda" if bf16 is None else bf16
        self.mpp, self.class_names = self._network.mpp, self._network.class_names
        self.tile_size, self.reach_um = self._network.tile_size, self._network.reach_um
        self.min_distance_um = self._network.spec.nms_um
        self.dim = network.backbone.dense_dim

    def detect(self, images: Tensor) -> list[Points]:
        """See `TileDetector.detect`."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return self._network.detect(images)

    def describe(self, images: Tensor) -> list[tuple[Points, Tensor]]:
        """See `Detector.describe`."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return self._network.describe(images)


def open_detector(weights: str, device: torch.device) -> TileDetector:
    """The detector that ``weights`` names.

    Args:
        weights: ``nuclei`` for the default nucleus detector, ``classical`` or the ``.safetensors`` file of
            ``train_detector`` for another one; otherwise a fine-tuned run.

    Raises:
        UserError: the weights cannot be used.
    """
    if weights == NUCLEI:
        return NucleusDetector("default", device)
    if weights == "classical" or weights.endswith(".safetensors"):
        return NucleusDetector(weights, device)
    return FineTunedDetector(load_detector(weights, device), device)


def detector_sha256(weights: str) -> str:
    """Hash of the files from which `open_detector` takes a detector; "" for those that ship with the package."""
    if weights in SHIPPED:
        return ""
    return weights_sha256(str(best_of(Path(weights))))
