"""Nuclei and their vectors in one pass over a page, if a fine-tuned detector describes what it finds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from muse_fast.embedding.nuclei import Collector, Nuclei
from muse_fast.embedding.parts import Parts, Rows
from muse_fast.embedding.pipeline import MAX_UNWRITTEN, Tally, check_finite
from muse_fast.images.points import Points
from muse_fast.images.slide import Lost
from muse_fast.predicting.detectors import FineTunedDetector
from muse_fast.predicting.pages import PageFile
from muse_fast.predicting.pipeline import Prediction, Settler, map_ahead
from muse_fast.predicting.pipeline import Tally as DetectorTally
from muse_fast.predicting.seams import Found
from muse_fast.predicting.tiles import Tile
from muse_fast.runtime.progress_bar import ShowProgress

PART = 16  # tiles: of a finished part


class OnePass:
    """The nuclei of one page, as `muse_fast.predict` finds them, and what the detector's map is at each.

    A vector comes from the tile from which the nucleus is taken. Parts contain all points of their tiles near a core,
    with their vectors; which of them are nuclei is decided at the end, as `seams` does.

    Args:
        file: the page.
        everywhere, max_unreadable: see `Prediction`.

    Attributes:
        page, mpp, area_mm2, windows: see `muse_fast.embedding.pipeline.Embedding`.

    Raises:
        UserError: the page cannot be used.
    """

    def __init__(self, file: PageFile, detector: FineTunedDetector, *, everywhere: bool, max_unreadable: float) -> None:
        self._file, self._detector = file, detector
        self._found = found = Prediction(
            file, detector, everywhere=everywhere, tile=None, max_unreadable=max_unreadable
        )
        self.page, self.mpp, self.windows = found.page, found.page.mpp * found.step[0], len(found.tiles)
        areas = ((tile.x.end - tile.x.core) * (tile.y.end - tile.y.core) for tile in found.tiles)
        self.area_mm2 = sum(areas) * self.mpp**2 / 1e6
        self._part_of = {tile.number: number // PART for number, tile in enumerate(found.tiles)}

    def run(self, parts: Parts, *, batch: int, readers: int, progress: ShowProgress) -> Tally:
        """See `Embedding.run`; ``batch`` is the number of tiles that the detector processes at a time."""
        detector, found, started = DetectorTally(), self._found, time.perf_counter()
        todo = []
        for number, tiles in self._parts():
            if parts.has(number):
                found.tissue.damage.add(_lost_in(parts, number))
            else:
                todo += tiles
        writer = _Writer(self, parts)
        count = self.windows - len(todo)
        with ThreadPoolExecutor(1) as writing:
            try:
                results = found.detected(
                    todo, self._detector.describe, detector, batch=batch, readers=readers, group=self.part_of
                )
                for tiles_done in map_ahead(writing, writer.add, results, MAX_UNWRITTEN):
                    count += tiles_done
                    progress(count, self.windows, "tiles")
            finally:
                writing.shutdown(wait=False, cancel_futures=True)
        return Tally(len(todo), detector.detecting, time.perf_counter() - started)

    def _parts(self) -> Iterator[tuple[int, list[Tile]]]:
        """Number and tiles of each part."""
        for first in range(0, self.windows, PART):
            yield first // PART, self._found.tiles[first : first + PART]

    def part_of(self, tile: Tile) -> int:
        """The number of a tile's part."""
        return self._part_of[tile.number]

    def count_of(self, part: int) -> int:
        """Number of tiles of a part."""
        return min(PART, self.windows - part * PART)

    def near_core(self, tile: Tile, points: Points, vectors: Tensor) -> tuple[Found, NDArray[np.float32]]:
        """The points of a tile that may be nuclei, and their vectors."""
        found, rows = self._found.found_in(tile, points), vectors.cpu().numpy()
        check_finite(rows, self._file.path)
        return found, rows[found.row]

    def result(self, parts: Parts) -> tuple[Nuclei, Rows]:
        """The nuclei and their vectors, once all parts are there."""
        nuclei = Collector((self.page.width, self.page.height))
        kept: list[Found] = [Found.empty()]

        def take(found: Found) -> None:
            nuclei.write(found.xy, found.label, found.score)
            kept.append(found)

        settler = Settler(self._found, take)
        for number, tiles in self._parts():
            stored = parts.extra(number)
            found = Found(*(stored[field.name] for field in fields(Found)))
            for tile in tiles:
                settler.add(tile, found.take(found.tile == tile.number))
        settler.finish()
        all_kept = Found.concatenate(kept)
        part = np.array([self._part_of[tile] for tile in all_kept.tile.tolist()], np.int32)
        dim = self._detector.dim
        return nuclei.nuclei(self._detector.class_names), Rows(parts, part, all_kept.row, dim)

    def __enter__(self) -> OnePass:
        return self

    def __exit__(self, *raised: object) -> None:
        self._found.__exit__(*raised)


class _Writer:
    """Collects the tiles of a part and keeps them once they are complete."""

    def __init__(self, page: OnePass, parts: Parts) -> None:
        self._page, self._parts = page, parts
        self._found, self._vectors, self._lost = list[Found](), list[NDArray[np.float32]](), Lost()
        self._tiles = 0

    def add(self, results: list[tuple[Tile, Lost, tuple[Points, Tensor]]]) -> int:
        """Add tiles of one part, in order; returns how many."""
        for tile, lost, (points, vectors) in results:
            found, rows = self._page.near_core(tile, points, vectors)
            first = sum(map(len, self._found))
            self._found.append(replace(found, row=np.arange(first, first + len(found))))
            self._vectors.append(rows)
            self._lost.boxes += lost.boxes
            self._lost.reason = self._lost.reason or lost.reason
        self._tiles += len(results)
        part = self._page.part_of(results[0][0])
        if self._tiles == self._page.count_of(part):
            self._keep(part)
        return len(results)

    def _keep(self, part: int) -> None:
        found = Found.concatenate(self._found)
        extra = {field.name: getattr(found, field.name) for field in fields(Found)}
        extra |= {"lost": np.array(self._lost.boxes, np.int64).reshape(-1, 4), "reason": np.array(self._lost.reason)}
        self._parts.keep(part, np.concatenate(self._vectors), extra)
        self._found, self._vectors, self._lost, self._tiles = [], [], Lost(), 0


def _lost_in(parts: Parts, number: int) -> Lost:
    """What could not be read of a finished part."""
    stored, lost = parts.extra(number), Lost()
    lost.boxes = [(left, top, right, bottom) for left, top, right, bottom in stored["lost"].tolist()]
    lost.reason = str(stored["reason"])
    return lost
