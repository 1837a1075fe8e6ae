"""Describe the nuclei of a slide by each protocol of `embed`, from pixels on disk to vectors on disk.

Times on the CPU are those of the process with all its threads, of which torch uses one, so rates are per core and less
sensitive to other load on the machine. The nuclei are found before.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.measure import spent_milliseconds
from muse_fast.embedding.encoders import open_weights
from muse_fast.embedding.nuclei import Detected, Given
from muse_fast.embedding.parts import Parts
from muse_fast.embedding.run import EmbedConfig, Job, job_of, open_page
from muse_fast.images.synthetic import synthetic_image
from muse_fast.predicting.detectors import NUCLEI, open_detector
from muse_fast.predicting.pages import PageFile
from muse_fast.runtime.device import peak_memory

SLIDE = "wsi/cmu-1-small-region.svs"
TARGET = 10.0  # times the nuclei per second of a crop for each
_SYNTHETIC_SIDE, _SYNTHETIC_MPP = 1024, 0.5


class Version(NamedTuple):
    """A protocol, and the side of its windows in pixels."""

    protocol: str
    window: int | None = None

    def __str__(self) -> str:
        return self.protocol if self.window is None else f"{self.protocol} {self.window}"


class Case(NamedTuple):
    """What all versions do."""

    slide: PageFile
    xy: NDArray[np.float64]  # [n, 2] all nuclei, in level-0 pixels
    in_square: NDArray[np.bool_]  # [n] those of which crops are timed
    weights: str
    device: str

    def nuclei(self, version: Version) -> NDArray[np.float64]:
        return self.xy[self.in_square] if version.protocol == "crop" else self.xy

    def job(self, version: Version) -> Job:
        """The network and the nuclei, as `embed` opens them."""
        config = EmbedConfig(protocol=version.protocol, window=version.window, device=self.device, readers=1)
        side = config.size if version.protocol == "crop" else version.window
        weights = open_weights(self.weights, None, None, side)
        return job_of(weights, config, torch.device(self.device), Given(self.nuclei(version)))

    def run(self, job: Job) -> int:
        """Describe the nuclei; returns the number of windows that were read."""
        with tempfile.TemporaryDirectory() as folder:
            parts = Parts(Path(folder, "parts"), {})
            with open_page(job, self.slide, parts, _silent) as page:
                page.run(parts, batch=job.batch, readers=job.readers, progress=_silent)
                return page.windows

    def milliseconds(self, job: Job) -> float:
        return spent_milliseconds(lambda: self.run(job), on_gpu=self.device == "cuda")


def _silent(done: int, total: int | None, unit: str) -> None:
    """Show no progress."""


class Memory(NamedTuple):
    """Bytes of a process, or of a GPU, of one run."""

    loaded: int  # once the network is loaded
    peak: int
    windows: int


def memory(case: Case, version: Version) -> Memory:
    """Measure one run in a process of its own, as a process's peak never falls.

    A process that is spawned would begin with the peak of this one, as Linux keeps it over exec.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as process:
        return process.submit(_memory_here, case, version).result()


def _memory_here(case: Case, version: Version) -> Memory:
    torch.set_num_threads(1)
    job, device = case.job(version), torch.device(case.device)
    loaded = peak_memory(device)
    windows = case.run(job)
    return Memory(loaded, peak_memory(device), windows)


def find_slide(given: Path | None, scratch: Path) -> PageFile:
    """The given slide, else that of ``$MUSE_FAST_DATA`` or ``../shared/data``, else a procedural image."""
    default = Path(os.environ.get("MUSE_FAST_DATA", Path(__file__).parents[3] / "shared" / "data"), SLIDE)
    if given or default.is_file():
        return PageFile(given or default, None)
    path = scratch / "synthetic.png"
    Image.fromarray(synthetic_image(0, _SYNTHETIC_SIDE, _SYNTHETIC_MPP)[0]).save(path)
    return PageFile(path, _SYNTHETIC_MPP)


def find_nuclei(slide: PageFile) -> NDArray[np.float64]:
    """The nuclei ``[n, 2]`` that `embed` finds on a slide, in level-0 pixels."""
    detector = open_detector(NUCLEI, torch.device("cpu"))
    source = Detected(detector, NUCLEI, "", everywhere=False, readers=1, max_unreadable=0.0)
    return source.of(slide, _silent).xy


def in_square(slide: PageFile, xy: NDArray[np.float64], side_um: float) -> NDArray[np.bool_]:
    """Which of the nuclei lie in a square in the middle of the slide."""
    with closing(slide.open()) as page:
        middle, reach = np.array([page.width, page.height]) / 2, side_um / page.mpp / 2
    return np.asarray((np.abs(xy - middle) < reach).all(axis=1))
