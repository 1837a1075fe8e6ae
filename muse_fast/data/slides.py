"""Whole slides: tissue, a grid of ROIs over it, and the nuclei in each.

A slide is never held as a whole: the tissue mask comes from bands of its coarsest level, ROIs are read one by one.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.data.detect_nuclei import REACH_UM, THRESHOLD, detect_nuclei
from muse_fast.data.roiset_format import MAX_SIDE
from muse_fast.data.sources import Source, SourceImage
from muse_fast.data.tables import MPP_RANGE, check_mpp, read_mpp_table
from muse_fast.errors import UserError

MASK_UM = 8.0  # side of a mask pixel
SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".dcm", ".czi")
_BAND_PIXELS = 16_000_000
_MAX_UNREADABLE = 20  # ROIs of one slide


class Slide:
    """A slide opened with OpenSlide.

    Args:
        path: the slide.
        mpp: um per pixel of level 0; None: what the header says. The magnification is never taken for it: slides with
            the same one differ by a factor of two.

    Raises:
        UserError: no slide, or um per pixel are unknown.
    """

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        self.path = path
        self._open()
        self.width, self.height = self._handle.dimensions
        self.mpp = self._header_mpp() if mpp is None else mpp

    def _open(self) -> None:
        import openslide

        try:
            self._handle = openslide.OpenSlide(str(self.path))
        except (openslide.OpenSlideError, OSError) as error:
            raise UserError(f"{self.path}: OpenSlide cannot read it ({str(error) or type(error).__name__})") from error

    def _header_mpp(self) -> float:
        values = [self._handle.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        if None in values:
            raise UserError(
                f"{self.path}: the header does not tell um per pixel; give mpp=NUMBER or list the slide in mpp.csv"
            )
        x, y = (check_mpp(str(value), f"{self.path}: openslide.mpp in the header") for value in values)
        if abs(x - y) > 0.02 * x:
            raise UserError(f"{self.path}: pixels are {x} x {y} um, expected squares; give mpp=NUMBER to go on anyway")
        return (x + y) / 2

    def read(self, x: int, y: int, width: int, height: int, level: int = 0) -> NDArray[np.uint8]:
        """``[height, width, 3]`` RGB of one level, ``x`` and ``y`` in level-0 pixels; white where nothing was scanned.

        Raises:
            UserError: the pixels are damaged. Other places can still be read: the slide is opened anew, as the library
                bars a handle that has met an error.
        """
        import openslide

        try:
            region = self._handle.read_region((x, y), level, (width, height))
        except openslide.OpenSlideError as error:
            self._handle.close()
            self._open()
            raise UserError(f"{self.path}: unreadable at {x}, {y}, level {level} ({error})") from error
        page = Image.new("RGB", region.size, (255, 255, 255))
        page.paste(region, mask=region.getchannel("A"))
        return np.asarray(page)

    def thumbnail(self, um: float) -> NDArray[np.uint8]:
        """The slide at about ``um`` per pixel, ``[ceil(H * mpp / um), ceil(W * mpp / um), 3]`` RGB."""
        columns, rows = math.ceil(self.width * self.mpp / um), math.ceil(self.height * self.mpp / um)
        level = self._handle.get_best_level_for_downsample(max(1.0, um / self.mpp))
        downsample = self._handle.level_downsamples[level]
        step = um / self.mpp  # level-0 pixels per mask pixel
        width = round(columns * step / downsample)
        rows_per_band = max(1, int(_BAND_PIXELS / width / (step / downsample)))
        bands = []
        for top in range(0, rows, rows_per_band):
            count = min(rows_per_band, rows - top)
            band = self.read(0, round(top * step), width, max(1, round(count * step / downsample)), level)
            bands.append(np.asarray(Image.fromarray(band).resize((columns, count), Image.Resampling.BOX)))
        return np.concatenate(bands)

    def close(self) -> None:
        self._handle.close()


def tissue_mask(thumbnail: NDArray[np.uint8], um: float) -> NDArray[np.bool_]:
    """Where there is tissue: colour saturation above Otsu's threshold, gaps closed, specks removed.

    Args:
        thumbnail: ``[h, w, 3]`` uint8 RGB.
        um: um per pixel of the thumbnail.

    Returns:
        ``[h, w]`` bool.
    """
    from scipy.ndimage import binary_closing, label
    from skimage.filters import threshold_otsu

    high = thumbnail.max(axis=2).astype(np.float32)
    saturation = (high - thumbnail.min(axis=2)) / np.maximum(high, 1)
    saturation[high < 40] = 0  # pen and holes in the scan are black
    # On a slide that is all glass or all tissue Otsu would split noise; glass stays below 0.03, most tissue above 0.1.
    mask = saturation > np.clip(threshold_otsu(saturation), 0.03, 0.1)
    reach = max(1, round(20 / um))
    mask = binary_closing(np.pad(mask, reach), iterations=reach)[reach:-reach, reach:-reach]
    parts, _ = label(mask)
    large = np.bincount(parts.ravel()) * um**2 >= 100.0**2
    large[0] = False  # what is no tissue
    return large[parts]


class Slides(Source):
    """``wsi:PATH``: a slide or a folder of slides, cut into squares where there is tissue with nuclei.

    The um per pixel comes from the option ``mpp``, then from ``mpp.csv`` beside the slides
    (``image,mpp[,slide][,split]``), then from the header.
    """

    kind = "wsi"
    options: ClassVar[dict[str, tuple[type, float, float]]] = {
        "mpp": (float, *MPP_RANGE),
        "roi_um": (float, 16, 4096),  # side of a ROI in um
        "min_tissue": (float, 0, 1),  # lowest share of tissue in a ROI
        "min_nuclei": (int, 0, 1_000_000),
        "threshold": (float, 0, 1),  # of the nucleus detector
        "workers": (int, 0, 256),  # processes that read and detect; the ROIs come out the same with any number
    }

    def __init__(
        self,
        path: str,
        mpp: float | None = None,
        roi_um: float = 512.0,
        min_tissue: float = 0.5,
        min_nuclei: int = 20,
        threshold: float = THRESHOLD,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self._roi_um, self._min_tissue, self._min_nuclei = roi_um, min_tissue, min_nuclei
        self._threshold, self._workers = threshold, workers
        files = _find_slides(Path(path))
        self._table = read_mpp_table(files[0].parent)
        known = {name: row.mpp for name, row in self._table.items()}
        self._slides = [(file, known.get(file.name) if mpp is None else mpp) for file in files]
        self._probe()

    def _probe(self) -> None:
        """Open every slide once, so that all that is wrong is told before hours of work."""
        problems = []
        for path, mpp in self._slides:
            try:
                slide = Slide(path, mpp)
            except UserError as error:
                problems.append(str(error))
                continue
            if (side := round(self._roi_um / slide.mpp)) > MAX_SIDE:
                problems.append(f"{path}: roi_um={self._roi_um:g} is {side} px, expected {MAX_SIDE} at most")
            slide.close()
        if problems:
            raise UserError("\n".join(problems))

    def __iter__(self) -> Iterator[SourceImage]:
        unreadable: Counter[Path] = Counter()
        examine = partial(_examine, threshold=self._threshold)
        for square, found in _ordered_map(examine, self._squares(), self._workers):
            if isinstance(found, UserError):
                self.dropped["unreadable"] += 1
                unreadable[square.path] += 1
                if unreadable[square.path] > _MAX_UNREADABLE:
                    raise UserError(
                        f"{found}; {unreadable[square.path]} ROIs of it cannot be read, copy the slide anew"
                    )
                continue
            image, xy, score = found
            if len(xy) < self._min_nuclei:
                self.dropped["too few nuclei"] += 1
                continue
            name = f"{square.path.stem}_{square.x}_{square.y}"
            row = self._table.get(square.path.name)
            slide, split = (row.slide or square.path.stem, row.split) if row else (square.path.stem, "")
            yield SourceImage(name, slide, split, image, square.mpp, xy, None, score, (square.x, square.y))

    def _squares(self) -> Iterator[_Square]:
        """The squares with enough tissue, slide by slide, row by row."""
        for path, mpp in self._slides:
            slide = Slide(path, mpp)
            side = round(self._roi_um / slide.mpp)
            mask = tissue_mask(slide.thumbnail(MASK_UM), MASK_UM)
            slide.close()
            for y in range(0, slide.height - side + 1, side):
                for x in range(0, slide.width - side + 1, side):
                    if _share(mask, x, y, side, slide.mpp) >= self._min_tissue:
                        yield _Square(path, slide.mpp, x, y, side)
                    else:
                        self.dropped["too little tissue"] += 1


@dataclass(frozen=True, slots=True)
class _Square:
    """A place for a ROI, in level-0 pixels."""

    path: Path
    mpp: float
    x: int
    y: int
    side: int


# One handle per process: slides come one after the other, and handles do not survive the way to another process.
_opened = lru_cache(maxsize=1)(Slide)
_Found = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]


def _examine(square: _Square, threshold: float) -> _Found | UserError:
    """Pixels of a square, its nuclei ``[n, 2]`` and their scores; the error where it cannot be read."""
    side, margin = square.side, math.ceil(REACH_UM / square.mpp)  # a nucleus at the border sees both its sides
    try:
        slide = _opened(square.path, square.mpp)
        block = slide.read(square.x - margin, square.y - margin, side + 2 * margin, side + 2 * margin)
    except UserError as error:
        return error
    xy, score = detect_nuclei(block, square.mpp, threshold=threshold)
    xy -= margin
    inside = ((xy >= 0) & (xy < side)).all(axis=1)
    return np.ascontiguousarray(block[margin : margin + side, margin : margin + side]), xy[inside], score[inside]


def _ordered_map(
    function: Callable[[_Square], _Found | UserError], squares: Iterable[_Square], workers: int
) -> Iterator[tuple[_Square, _Found | UserError]]:
    """Pairs of square and result in the order of the squares; at most two results wait per worker."""
    if workers == 0:
        try:
            yield from ((square, function(square)) for square in squares)
        finally:
            _opened.cache_clear()
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"))  # a fork would copy the locks of running threads
    waiting: deque[tuple[_Square, Future[_Found | UserError]]] = deque()
    try:
        for square in squares:
            waiting.append((square, pool.submit(function, square)))
            if len(waiting) > 2 * workers:
                done, result = waiting.popleft()
                yield done, result.result()
        for done, result in waiting:
            yield done, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _find_slides(path: Path) -> list[Path]:
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    else:
        raise UserError(f"{path}: no such file or folder")
    if not files:
        raise UserError(f"{path} holds no slide ({', '.join(SUFFIXES)})")
    return files


def _share(mask: NDArray[np.bool_], x: int, y: int, side: int, mpp: float) -> float:
    """Share of tissue in a square given in level-0 pixels."""
    left, top, right, bottom = (round(value * mpp / MASK_UM) for value in (x, y, x + side, y + side))
    return float(mask[top : max(bottom, top + 1), left : max(right, left + 1)].mean())
