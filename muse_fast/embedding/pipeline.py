"""From the nuclei of a page to their vectors, with reading, encoding and writing in parallel.

Threads read windows slightly ahead, the calling thread runs the encoder, and one more thread fetches its results and
writes them. Each waits for the others instead of piling up work, so memory does not grow with the page.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muse_fast.embedding.encoders import Encoder, Shown
from muse_fast.embedding.nuclei import Nuclei
from muse_fast.embedding.parts import Parts, Rows
from muse_fast.embedding.windows import Window, Windows
from muse_fast.errors import UserError
from muse_fast.images.slide import Lost
from muse_fast.predicting.pages import PageFile, PagePerThread, Scale
from muse_fast.predicting.pipeline import map_ahead
from muse_fast.runtime.device import Stopwatch
from muse_fast.runtime.progress_bar import ShowProgress

PART = 64  # windows: of a finished part, of which nothing is lost if the command is killed
MAX_UNWRITTEN = 2  # batches that wait to be written


@dataclass(slots=True)
class Tally:
    """Statistics of a page."""

    windows: int = 0
    encoding: float = 0.0  # seconds in the encoder
    seconds: float = 0.0  # from the first window to the last
    lost: int = 0  # nuclei that could not be read
    lost_reason: str = ""


class _Piece(NamedTuple):
    """A window, read."""

    part: int
    shown: Shown
    lost: NDArray[np.bool_]  # [n] nuclei whose pixel could not be read
    reason: str


@dataclass(slots=True)
class _Batch:
    """Pieces of one part that are encoded together."""

    part: int
    pieces: list[_Piece] = field(default_factory=list)

    def shown(self) -> Shown:
        """All images and nuclei."""
        counts = [len(piece.shown.images) for piece in self.pieces]
        firsts = np.cumsum([0, *counts[:-1]]).tolist()
        images, xy, index = zip(*(piece.shown for piece in self.pieces), strict=True)
        shifted = [one + first for one, first in zip(index, firsts, strict=True)]
        return Shown(torch.cat(images), torch.cat(xy), torch.cat(shifted))


class _Encoded(NamedTuple):
    """A batch and its vectors, which a GPU may still be computing."""

    batch: _Batch
    rows: list[Tensor]
    stopwatch: Stopwatch


class Embedding:
    """The vectors of the nuclei of one page.

    Args:
        file: the page.
        nuclei: on it.
        max_unreadable: share of the nuclei whose pixel may be unreadable.

    Attributes:
        page: open, for the calling thread.
        mpp: um per pixel of the windows, that of a level of the page if one is close enough to the encoder's.
        windows: number of those with nuclei.
        area_mm2: of their cores.

    Raises:
        UserError: the page cannot be used, or the windows are too small.
    """

    def __init__(self, file: PageFile, encoder: Encoder, nuclei: Nuclei, *, max_unreadable: float) -> None:
        self._file, self._encoder, self._nuclei, self._max_unreadable = file, encoder, nuclei, max_unreadable
        self._pages = PagePerThread(file)
        self.page = self._pages.first
        self._scale = Scale(self.page, encoder.mpp)
        self.mpp = self._scale.mpp
        self._xy = np.minimum(nuclei.xy / self._scale.step, (self._scale.width, self._scale.height))
        grid = Windows(self._scale.width, self._scale.height, encoder.side, encoder.margin)
        self._windows = list(grid.occupied(self._xy)) if len(nuclei) else []
        self.windows = len(self._windows)
        self.area_mm2 = sum(window.area for window in self._windows) * self.mpp**2 / 1e6

    def run(self, parts: Parts, *, batch: int, readers: int, progress: ShowProgress) -> Tally:
        """Compute the parts that are missing.

        Args:
            batch: images that the encoder processes at a time.
            progress: called after each batch.

        Raises:
            UserError: too much is unreadable, or the encoder returns NaNs.
        """
        tally, started = Tally(lost=parts.lost()), time.perf_counter()
        writer = _Writer(self, parts, tally)
        todo = [(part, window) for part, windows in self._parts() if not parts.has(part) for window in windows]
        nuclei = len(self._nuclei) - sum(len(window.nuclei) for _, window in todo)
        with ThreadPoolExecutor(readers) as reading, ThreadPoolExecutor(1) as writing:
            read = map_ahead(reading, self._read, todo, self._encoder.windows_of(batch) + readers)
            try:
                results = self._encode(_batches(read, batch), batch)
                for count in map_ahead(writing, writer.add, results, MAX_UNWRITTEN):
                    nuclei += count
                    progress(nuclei, len(self._nuclei), "nuclei")
            finally:
                for pool in (reading, writing):
                    pool.shutdown(wait=False, cancel_futures=True)
        tally.windows, tally.seconds = len(todo), time.perf_counter() - started
        return tally

    def _parts(self) -> Iterator[tuple[int, list[Window]]]:
        """Number and windows of each part."""
        for first in range(0, self.windows, PART):
            yield first // PART, self._windows[first : first + PART]

    def result(self, parts: Parts) -> tuple[Nuclei, Rows]:
        """The nuclei and their vectors, once all parts are there."""
        part, place = np.zeros(len(self._nuclei), np.int32), np.zeros(len(self._nuclei), np.int64)
        for number, windows in self._parts():
            rows = np.concatenate([window.nuclei for window in windows])
            part[rows], place[rows] = number, np.arange(len(rows))
        return self._nuclei, Rows(parts, part, place, self._encoder.dim)

    def count_of(self, part: int) -> int:
        """Number of nuclei of a part."""
        return sum(len(window.nuclei) for window in self._windows[part * PART : (part + 1) * PART])

    def _read(self, item: tuple[int, Window]) -> _Piece:
        """Read a window; pixels are white where they are lost."""
        part, window = item
        side, lost = self._encoder.side, Lost()
        left, top = max(window.left, 0), max(window.top, 0)
        width, height = (
            min(window.left + side, self._scale.width) - left,
            min(window.top + side, self._scale.height) - top,
        )
        pixels = self._scale.read(self._pages.own(), left, top, width, height, lost)
        corner = (window.left - left, window.top - top)
        shown = self._encoder.shown(pixels, corner, self._xy[window.nuclei] - (left, top))
        return _Piece(part, shown, _within_any(self._nuclei.xy[window.nuclei], lost.boxes), lost.reason)

    def _encode(self, batches: Iterable[_Batch], batch: int) -> Iterator[_Encoded]:
        for one in batches:
            shown = one.shown()
            stopwatch = Stopwatch(self._encoder.device)
            rows = [self._encoder.vectors(chunk) for chunk in _chunks(shown, batch)]
            stopwatch.stop()
            yield _Encoded(one, rows, stopwatch)

    def checked(self, rows: NDArray[np.float32], batch: _Batch, tally: Tally) -> NDArray[np.float32]:
        """The vectors, as NaN where a nucleus could not be read.

        Raises:
            UserError: others are not finite, or too many could not be read.
        """
        lost = np.concatenate([piece.lost for piece in batch.pieces])
        check_finite(rows[~lost], self._file.path)
        tally.lost += int(lost.sum())
        tally.lost_reason = tally.lost_reason or next((piece.reason for piece in batch.pieces if piece.reason), "")
        if tally.lost > self._max_unreadable * len(self._nuclei):
            raise UserError(
                f"{tally.lost_reason}; more than max_unreadable={self._max_unreadable:g} of the nuclei cannot be read, "
                "copy the slide again"
            )
        return np.where(lost[:, None], np.float32(np.nan), rows)

    def __enter__(self) -> Embedding:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pages.close()


def check_finite(rows: NDArray[np.float32], path: Path) -> None:
    """Refuse vectors of a page that are not finite.

    Raises:
        UserError: names the page.
    """
    if not np.isfinite(rows).all():
        raise UserError(f"{path}: the network returned values that are not finite; its weights may be damaged")


class _Writer:
    """Collects the vectors of a part and keeps them once they are complete."""

    def __init__(self, embedding: Embedding, parts: Parts, tally: Tally) -> None:
        self._embedding, self._parts, self._tally = embedding, parts, tally
        self._rows: list[NDArray[np.float32]] = []

    def add(self, encoded: _Encoded) -> int:
        """Add a batch, in order; returns the number of its nuclei."""
        batch = encoded.batch
        rows = torch.cat(encoded.rows).cpu().numpy()
        self._tally.encoding += encoded.stopwatch.seconds()
        self._rows.append(self._embedding.checked(rows, batch, self._tally))
        if sum(map(len, self._rows)) == self._embedding.count_of(batch.part):
            self._parts.keep(batch.part, np.concatenate(self._rows))
            self._rows = []
        return len(rows)


def _batches(pieces: Iterable[_Piece], size: int) -> Iterator[_Batch]:
    """Batches of at least ``size`` images, fewer at the end of a part, so that they do not depend on other parts."""
    batch = _Batch(-1)
    images = 0
    for piece in pieces:
        if batch.pieces and (images >= size or piece.part != batch.part):
            yield batch
            batch, images = _Batch(-1), 0
        batch.part = piece.part
        batch.pieces.append(piece)
        images += len(piece.shown.images)
    if batch.pieces:
        yield batch


def _chunks(shown: Shown, size: int) -> Iterator[Shown]:
    """At most ``size`` images at a time, with their nuclei."""
    for first in range(0, len(shown.images), size):
        start, end = torch.searchsorted(shown.image_index, torch.tensor([first, first + size])).tolist()
        yield Shown(shown.images[first : first + size], shown.xy[start:end], shown.image_index[start:end] - first)


def _within_any(xy: NDArray[np.float64], boxes: Sequence[tuple[int, int, int, int]]) -> NDArray[np.bool_]:
    """Which of the points ``[n, 2]`` lie in one of the boxes (left, top, right, bottom)."""
    inside = np.zeros(len(xy), bool)
    for left, top, right, bottom in boxes:
        inside |= np.all((xy >= (left, top)) & (xy < (right, bottom)), axis=1)
    return inside
