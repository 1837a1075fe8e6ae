"""From the pixels of a page to its nuclei, with reading, detection and writing in parallel.

Threads read tiles slightly ahead, the calling thread detects, and one more thread resolves seams and writes. Each waits
for the others instead of piling up work, so memory does not grow with the page.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muse_fast.errors import UserError
from muse_fast.images.points import Points
from muse_fast.images.slide import Lost
from muse_fast.predicting.detectors import TileDetector
from muse_fast.predicting.pages import PageFile, PagePerThread, Scale
from muse_fast.predicting.seams import Found, Seams
from muse_fast.predicting.tiles import Grid, Tile, Tissue

_MAX_UNWRITTEN = 2  # batches that wait to be written

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Read(NamedTuple):
    """A tile that has been read."""

    tile: Tile
    lost: Lost
    pixels: NDArray[np.uint8]  # [H, W, 3] white where they are lost


@dataclass(slots=True)
class Tally:
    """Statistics of a page, other than its nuclei."""

    tiles: int = 0
    detecting: float = 0.0  # seconds in the detector
    seconds: float = 0.0  # from the first tile to the last


class Sink(Protocol):
    """Takes the nuclei of a page as they are found."""

    def write(self, xy: NDArray[np.float64], label: NDArray[np.int64], score: NDArray[np.float64]) -> None:
        """Append nuclei: xy ``[n, 2]`` in level-0 pixels, label ``[n]``, score ``[n]``, all finite."""
        ...


class Prediction:
    """The nuclei of one page, found tile by tile.

    Args:
        file: the page.
        everywhere: look for nuclei outside tissue too.
        tile: side of a tile in pixels; None: the default of the detector.
        max_unreadable: share of the tissue, or of the page, that may be unreadable.

    Attributes:
        page: open, for the calling thread.
        step: level-0 pixels per pixel of the tiles, along x and y.
        radius: pixels within which two points of different tiles are one nucleus.
        tissue: where to look for nuclei.
        tiles: those with tissue.

    Raises:
        UserError: the page cannot be used, or the tiles are too small.
    """

    def __init__(
        self,
        file: PageFile,
        detector: TileDetector,
        *,
        everywhere: bool,
        tile: int | None,
        max_unreadable: float,
    ) -> None:
        self._file, self._detector = file, detector
        self._pages = PagePerThread(file)
        self.page = page = self._pages.first
        self._scale = Scale(page, detector.mpp)
        self.step = self._scale.step
        self.radius = detector.min_distance_um / self._scale.mpp
        margin = math.ceil(detector.reach_um / self._scale.mpp + self.radius)
        side = tile or detector.tile_size
        grid = Grid(self._scale, side, margin)
        self.tissue = Tissue(page, everywhere, max_unreadable)
        self.tiles = [tile for tile in grid.tiles() if self._has_tissue(tile)]

    def _has_tissue(self, tile: Tile) -> bool:
        (step_x, step_y), x, y = self.step, tile.x, tile.y
        return self.tissue.overlaps(x.core * step_x, y.core * step_y, x.end * step_x, y.end * step_y)

    def run(self, files: Sink, *, batch: int, readers: int, done: Callable[[int], None]) -> Tally:
        """Find the nuclei and write them to ``files``; call ``done`` with the tiles so far after each batch.

        Raises:
            UserError: too much is unreadable, or the detector returns NaNs.
        """
        tally, started = Tally(), time.perf_counter()
        settler = Settler(self, lambda found: files.write(found.xy, found.label, found.score))

        def write(results: list[tuple[Tile, Lost, Points]]) -> int:
            for tile, _, points in results:
                settler.add(tile, self.found_in(tile, points))
            return len(results)

        with ThreadPoolExecutor(1) as writing:
            try:
                results = self.detected(self.tiles, self._detector.detect, tally, batch=batch, readers=readers)
                for count in map_ahead(writing, write, results, _MAX_UNWRITTEN):
                    tally.tiles += count
                    done(tally.tiles)
                settler.finish()
            finally:
                writing.shutdown(wait=False, cancel_futures=True)
        tally.seconds = time.perf_counter() - started
        return tally

    def detected(
        self,
        tiles: Sequence[Tile],
        detect: Callable[[Tensor], list[_Result]],
        tally: Tally,
        *,
        batch: int,
        readers: int,
        group: Callable[[Tile], int] = lambda tile: 0,
    ) -> Iterator[list[tuple[Tile, Lost, _Result]]]:
        """Batches of tiles, what of them is unreadable, and what ``detect`` finds in them, in order.

        Args:
            tiles: to read.
            detect: called with ``[B, 3, H, W]`` uint8 RGB.
            group: of a tile; a batch has tiles of one group.

        Raises:
            UserError: too much is unreadable.
        """
        with ThreadPoolExecutor(readers) as reading:
            try:
                read = self._counted(map_ahead(reading, self._read, tiles, batch + readers))
                for items in _batches(read, batch, group):
                    images = torch.from_numpy(np.stack([item.pixels for item in items])).permute(0, 3, 1, 2)
                    before = time.perf_counter()
                    found = detect(images)
                    tally.detecting += time.perf_counter() - before
                    yield [(item.tile, item.lost, one) for item, one in zip(items, found, strict=True)]
            finally:
                reading.shutdown(wait=False, cancel_futures=True)

    def _read(self, tile: Tile) -> _Read:
        x, y, lost = tile.x, tile.y, Lost()
        return _Read(tile, lost, self._scale.read(self._pages.own(), x.start, y.start, x.length, y.length, lost))

    def _counted(self, read: Iterable[_Read]) -> Iterator[_Read]:
        """The tiles, with what is lost in them counted; raises an error if it is too much."""
        for one in read:
            self.tissue.damage.add(one.lost)
            yield one

    def found_in(self, tile: Tile, points: Points) -> Found:
        """The points of a tile's core and of the seams around it, in pixels of the scale.

        Raises:
            UserError: a position or score is not finite.
        """
        xy, score = points.xy.astype(np.float64), points.confidence().astype(np.float64)
        if not (np.isfinite(xy).all() and np.isfinite(score).all()):
            raise UserError(
                f"{self._file.path}: the detector returned positions or scores that are not finite in the tile at "
                f"{tile.x.start}, {tile.y.start}; its weights may be damaged"
            )
        xy += np.array([tile.x.start, tile.y.start])
        core, end = np.array([tile.x.core, tile.y.core]), np.array([tile.x.end, tile.y.end])
        near = _within(xy, core - self.radius, end + self.radius)
        number, label = np.full(len(xy), tile.number), points.classes().astype(np.int64)
        return Found(xy, label, score, number, _within(xy, core, end), np.arange(len(xy))).take(near)

    def __enter__(self) -> Prediction:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pages.close()


class Settler:
    """Collects the points of tiles row by row, and passes on those that later rows cannot change.

    Args:
        take: called with points in tissue, in level-0 pixels.
    """

    def __init__(self, prediction: Prediction, take: Callable[[Found], None]) -> None:
        self._prediction, self._take = prediction, take
        self._seams = Seams(prediction.radius)
        self._row: list[Found] = []
        self._number = -1

    def add(self, tile: Tile, found: Found) -> None:
        """Add a tile, in order, and its points, see `Prediction.found_in`."""
        if tile.row != self._number and self._row:
            self._settle(tile.y.core)
        self._number = tile.row
        self._row.append(found)

    def finish(self) -> None:
        """Pass on the points of the last row."""
        self._settle(math.inf)

    def _settle(self, bottom: float) -> None:
        found, self._row = self._seams.settle(self._row, bottom), []
        found = replace(found, xy=found.xy * self._prediction.step)
        self._take(found.take(self._prediction.tissue.contains(found.xy)))


def _within(xy: NDArray[np.float64], low: NDArray[Any], high: NDArray[Any]) -> NDArray[np.bool_]:
    return np.all((xy >= low) & (xy < high), axis=1)


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item], most: int
) -> Iterator[_Result]:
    """Results in the order of the items, of which at most ``most`` are waiting or in progress."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(items: Iterable[_Read], size: int, group: Callable[[Tile], int]) -> Iterator[list[_Read]]:
    """Batches of at most ``size`` tiles, all of one shape and one group, in order."""
    batch: list[_Read] = []
    for item in items:
        kinds = {(one.pixels.shape, group(one.tile)) for one in (*batch[:1], item)}
        if batch and (len(batch) == size or len(kinds) > 1):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
