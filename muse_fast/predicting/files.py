"""The files of a prediction: GeoJSON for QuPath, a table and a picture, all written as nuclei are found."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from muse_fast.images.drawing import PALETTE, overlay
from muse_fast.images.geojson import qupath_record
from muse_fast.images.points_csv import QUPATH_COLUMNS
from muse_fast.images.slide import Slide
from muse_fast.runtime.drawn import save_drawn
from muse_fast.runtime.names import text_of

OVERLAY_SIDE = 2048  # pixels: longer side of the picture, at most
_DOT_UM = 3.0  # radius of a dot, within 1 to 5 pixels
_LINE = 24  # pixels: height of a line of the legend


class QuPathFile:
    """A GeoJSON of detections for QuPath, as points that count from the corner of the part that QuPath shows.

    Args:
        file: written to.
        name: of the slide; the ids of its nuclei are derived from it and from their numbers.
        origin: that corner, in level-0 pixels; it is recorded.
        classes: name and colour (RGB) of each.
        measurement: name of the number that nuclei have in QuPath.
    """

    def __init__(
        self,
        file: IO[str],
        name: str,
        origin: tuple[int, int],
        classes: Sequence[tuple[str, Sequence[int]]],
        measurement: str,
    ) -> None:
        self._file, self._origin, self._first = file, origin, True
        self._ids = uuid.uuid5(uuid.NAMESPACE_URL, f"muse_fast:{text_of(name)}")
        self._classes = [
            f'"classification":{json.dumps({"name": class_name, "color": list(rgb)}, separators=(",", ":"))},'
            for class_name, rgb in classes
        ]
        self._measurement = json.dumps(measurement)
        head = json.dumps(qupath_record(origin), separators=(",", ":"))
        file.write(f'{head[:-1]},"features":[')

    def write(
        self,
        xy: NDArray[np.float64],
        label: NDArray[np.integer],
        value: NDArray[np.floating],
        number: Sequence[int] | range,
    ) -> None:
        """Append nuclei.

        Args:
            xy: ``[n, 2]`` level-0 pixels.
            label: ``[n]`` class, -1 for none.
            value: ``[n]`` of the measurement; what is not finite, and so not JSON, is left out.
            number: ``[n]`` which nucleus of the slide each is.
        """
        left, top = self._origin
        rows = zip(number, *xy.T.tolist(), label.tolist(), value.tolist(), strict=True)
        for nucleus, x, y, kind, measured in rows:
            value_of = f"{self._measurement}:{measured:.7g}" if math.isfinite(measured) else ""
            self._file.write(
                f"{'' if self._first else ','}\n"
                f'{{"type":"Feature","id":"{uuid.uuid5(self._ids, str(nucleus))}",'
                f'"geometry":{{"type":"Point","coordinates":[{x - left:.2f},{y - top:.2f}]}},'
                f'"properties":{{"objectType":"detection",{self._classes[kind] if kind >= 0 else ""}'
                f'"measurements":{{{value_of}}}}}}}'
            )
            self._first = False

    def finish(self) -> None:
        """Complete the file."""
        self._file.write("\n]}\n")


class CellFiles:
    """``cells.geojson`` (or ``.geojson.gz``), ``cells.csv`` and ``overlay.png`` of one page, in a folder.

    The GeoJSON counts from the corner of the part that QuPath shows and records it. In the table x and y are level-0
    pixels; if these differ, two more columns have what the GeoJSON has.

    Args:
        name: of the page; the ids of its nuclei are derived from it.
        compress: gzip the GeoJSON.

    Attributes:
        counts: nuclei written, by class.
    """

    def __init__(self, folder: Path, page: Slide, name: str, class_names: Sequence[str], compress: bool) -> None:
        self.counts = np.zeros(len(class_names), np.int64)
        self._names, self._folder = class_names, folder
        self._size, self._origin = (page.width, page.height), page.qupath_frame.origin
        self._csv_classes = [_csv_cell(class_name) for class_name in class_names]
        um = max(page.mpp, max(page.width, page.height) * page.mpp / OVERLAY_SIDE)
        self._picture = page.thumbnail(um)
        self._shrink = um / page.mpp
        self._radius = min(max(_DOT_UM / um, 1.0), 5.0)
        with ExitStack() as opened:
            geojson = opened.enter_context(open_text(folder / f"cells.geojson{'.gz' if compress else ''}"))
            self._csv = opened.enter_context(open_text(folder / "cells.csv"))
            self._opened = opened.pop_all()
        classes = [(class_name, colour(label)) for label, class_name in enumerate(class_names)]
        self._geojson = QuPathFile(geojson, name, self._origin, classes, "score")
        self._csv.write(",".join(["x,y,label,class,score", *(QUPATH_COLUMNS if any(self._origin) else ())]) + "\n")

    def write(self, xy: NDArray[np.float64], label: NDArray[np.int64], score: NDArray[np.float64]) -> None:
        """Append nuclei: xy ``[n, 2]`` in level-0 pixels, label ``[n]``, score ``[n]``, all finite."""
        first = int(self.counts.sum())
        xy = as_written(xy, self._size)
        rows = list(zip(*xy.T.tolist(), label.tolist(), score.tolist(), strict=True))
        left, top = self._origin
        self._geojson.write(xy, label, score.round(4), range(first, first + len(xy)))
        self._csv.writelines(
            f"{x:.2f},{y:.2f},{kind},{self._csv_classes[kind]},{score:.4f}"
            f"{f',{x - left:.2f},{y - top:.2f}' if left or top else ''}\n"
            for x, y, kind, score in rows
        )
        self._picture = np.asarray(overlay(self._picture, (xy / self._shrink).astype(np.float32), label, self._radius))
        self.counts += np.bincount(label, minlength=len(self.counts))

    def finish(self) -> None:
        """Complete the GeoJSON and the table, and write the picture."""
        self._geojson.finish()
        self.close()
        save_drawn(_with_legend(self._picture, self._names, self.counts.tolist()), self._folder / "overlay.png")

    def close(self) -> None:
        self._opened.close()


def as_written(xy: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """Points ``[n, 2]`` on a page of ``size`` (w, h) with the two decimals of the files."""
    return np.minimum(xy.round(2), np.array(size) - 0.01)  # a point on the far edge would be outside


def colour(label: int) -> tuple[int, int, int]:
    """The colour of a class, in QuPath and in the picture."""
    return PALETTE[label % len(PALETTE)]


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open a text file to write; its bytes depend only on the text, even if it is gzipped."""
    with open(path, "wb") as file:
        if path.suffix != ".gz":
            with io.TextIOWrapper(file, "utf-8", newline="") as text:
                yield text
            return
        with gzip.GzipFile("", "wb", 5, file, mtime=0) as zipped, io.TextIOWrapper(zipped, "utf-8", newline="") as text:
            yield text


def _csv_cell(value: str) -> str:
    cell = io.StringIO()
    csv.writer(cell, lineterminator="").writerow([value])
    return cell.getvalue()


def _with_legend(picture: NDArray[np.uint8], names: Sequence[str], counts: Sequence[int]) -> Image.Image:
    """The picture above a legend with the colour, name and count of every class."""
    font = ImageFont.load_default(14)
    texts = [f"{name} {count:,}" for name, count in zip(names, counts, strict=True)]
    height, width, _ = picture.shape
    lines: list[list[tuple[float, int]]] = [[]]  # per line: left edge and label of each text
    x = 8.0
    for label, text in enumerate(texts):
        length = 34 + font.getlength(text)
        if x + length > width and lines[-1]:
            lines.append([])
            x = 8.0
        lines[-1].append((x, label))
        x += length
    sheet = Image.new("RGB", (max(width, 160), height + _LINE * len(lines)), (255, 255, 255))
    sheet.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        top = height + _LINE * number
        for left, label in line:
            draw.ellipse((left, top + 7, left + 11, top + 18), fill=colour(label), outline=(40, 40, 40))
            draw.text((left + 17, top + 4), texts[label], (40, 40, 40), font)
    return sheet
