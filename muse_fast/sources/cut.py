"""From one slide to its ROIs: a survey finds the squares with tissue, then each square is read and its nuclei detected.

Both steps are pure functions and can run in any process, so the ROIs do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.finders.learned import load_finder
from muse_fast.images.geojson import MULTI
from muse_fast.images.nuclei_files import read_nuclei
from muse_fast.images.points import Points
from muse_fast.images.slide import FRAMES, Frame, Lost, Slide, open_slide
from muse_fast.images.tissue import MASK_UM, Damage, read_tissue, tissue_mask
from muse_fast.roiset.records import encode_jpeg
from muse_fast.runtime.options import setting, split_list
from muse_fast.sources.base import Source

THUMBNAIL_SIDE = 1024
_HANDLES = 8  # open slides per process; several slides are processed at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class CutSettings(Source.Options):
    """The options of ``wsi:`` on which the ROIs of a slide depend."""

    roi_um: float = setting(512.0, ge=16, le=4096)
    """Side of a ROI in um."""
    min_tissue: float = setting(0.5, ge=0, le=1)
    """Minimum share of tissue in a ROI."""
    max_unscanned: float = setting(0.1, ge=0, le=1)
    """Maximum share of a ROI that was not scanned: black or transparent."""
    min_nuclei: int = setting(20, ge=0, le=1_000_000)
    """Minimum number of nuclei in a ROI."""
    labels: str = ""
    r"""Names of the classes of the user's nuclei, separated by commas; ``\,`` is a comma in a name."""
    multi: str = setting("auto", choices=MULTI)
    """In the user's GeoJSON, a MultiPolygon is ``one`` nucleus, or ``each`` part is one, as written by CellViT;
    ``auto``: one if its parts are few and close."""
    frame: str = setting("qupath", choices=FRAMES)
    """From where the user's GeoJSON counts if it does not say so: the corner of what QuPath shows, or of level 0."""
    detector: str = "default"
    """Detector of nuclei: ``default``, ``classical``, ``resnet18`` or a .safetensors file."""
    threshold: float | None = setting(None, ge=0, le=1)
    """Threshold of the detector, instead of its default."""
    per_slide: int | None = setting(None, ge=1, le=1_000_000)
    """Maximum number of ROIs per slide, drawn at random."""
    seed: int = setting(0, ge=0, le=2**31)
    """Seed of the draws for ``per_slide``, ``per_group`` and ``max_rois``."""
    max_unreadable: float = setting(0.05, ge=0, lt=1)
    """Share of the tissue that may be unreadable; with more, the slide is skipped."""

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(split_list(self.labels))


@dataclass(frozen=True, slots=True)
class SlideFile:
    """A slide file and the settings, tables and files that apply to it, known before it is opened.

    Attributes:
        name: the file's stem, which masks and nuclei are named after; ``slide`` is the slide's name in the set.
        mpp: um per pixel of level 0; None: read it from the header.
    """

    path: Path
    name: str
    slide: str
    split: str = ""
    group: str = ""
    mpp: float | None = None
    mpp_from: str = "header"
    tissue: Path | None = None
    nuclei: Path | None = None


@dataclass(frozen=True, slots=True)
class Square:
    """A candidate for a ROI, in level-0 pixels, with its nuclei if they come from the user's file."""

    path: Path
    mpp: float
    x: int
    y: int
    side: int
    nuclei: Points | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """The squares with tissue of a slide.

    Attributes:
        squares: in the order in which they are examined.
        dropped: number of squares dropped so far, and of objects in the user's file that are not nuclei, by reason.
        tissue: ``[h, w]`` bool, the mask with pixels of ``MASK_UM``.
        damage: what of the tissue, or of what may be tissue, the overview lacks.
        thumbnail: ``[h, w, 3]`` uint8 RGB, at most ``THUMBNAIL_SIDE`` a side.
    """

    width: int
    height: int
    mpp: float
    qupath_frame: Frame
    side: int
    squares: list[Square]
    dropped: Counter[str]
    tissue: NDArray[np.bool_]
    damage: Damage
    thumbnail: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Found:
    """The pixels of a square, ``[side, side, 3]`` or as JPEG, its nuclei, and the share of it that was not scanned."""

    image: NDArray[np.uint8] | bytes
    nuclei: Points
    unscanned: float


Examine = Callable[[Square], Found | Lost]
# ``map``, or ``Pool.map``, which distributes the work over processes.
OrderedMap = Callable[[Examine, Iterable[Square]], Iterable[Found | Lost]]


class TransientError(UserError):
    """Something that may go well the next time."""


def survey(file: SlideFile, settings: CutSettings) -> Survey | UserError:
    """Find the tissue and squares of a slide. Errors are returned, so that they reach other processes unchanged.

    A `TransientError` is of the machine, such as a file system that fails for a moment, and not of the slide.
    """
    try:
        slide = open_slide(file.path, file.mpp)
        try:
            return _survey(slide, file, settings)
        finally:
            slide.close()
    except UserError as error:
        return error
    except (OSError, MemoryError) as error:
        return TransientError(f"{file.path}: {type(error).__name__} ({error})")


def _survey(slide: Slide, file: SlideFile, settings: CutSettings) -> Survey:
    side = round(settings.roi_um / slide.mpp)
    step = MASK_UM / slide.mpp
    if file.tissue is None:
        overview, lost = slide.overview(MASK_UM, settings.max_unreadable)
        unreadable = lost.mask(overview.shape[:2], step)
        mask = tissue_mask(overview, MASK_UM) & ~unreadable
        searched = mask | unreadable
    else:  # damage beside the tissue does not matter
        overview, lost = slide.overview(MASK_UM)
        mask = searched = read_tissue(file.tissue, overview.shape[:2], step, slide.frame(settings.frame))
    if not settings.min_tissue:
        searched = np.ones_like(mask)
    damage = Damage(searched, step, settings.max_unreadable)
    damage.add(lost)
    given, dropped = None, Counter[str]()
    if file.nuclei is not None:
        given, dropped = read_nuclei(file.nuclei, slide, settings.label_names, settings.multi, settings.frame)
    squares = []
    for y in range(0, slide.height - side + 1, side):
        for x in range(0, slide.width - side + 1, side):
            square = Square(file.path, slide.mpp, x, y, side)
            if _share(searched, square) < settings.min_tissue:
                dropped["too little tissue"] += 1
            else:
                squares.append(square)
    if given is not None:
        squares = [replace(square, nuclei=given.within(square.x, square.y, side)) for square in squares]
    if settings.per_slide is not None:
        order = priorities(settings.seed, file.name, np.array([(s.x, s.y) for s in squares]).reshape(-1, 2))
        squares = [squares[i] for i in np.argsort(order, kind="stable")]
    picture = _thumbnail(slide, overview)
    return Survey(
        slide.width, slide.height, slide.mpp, slide.qupath_frame, side, squares, dropped, mask, damage, picture
    )


def _thumbnail(slide: Slide, overview: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Reduce the overview, or read a finer one of a small slide."""
    if max(overview.shape) < THUMBNAIL_SIDE:
        um = max(slide.width, slide.height) * slide.mpp / THUMBNAIL_SIDE
        overview = slide.thumbnail(max(slide.mpp, um))
    picture = Image.fromarray(overview)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return np.asarray(picture)


def _share(mask: NDArray[np.bool_], square: Square) -> float:
    """Return the share of tissue in a square."""
    corners = (square.x, square.y, square.x + square.side, square.y + square.side)
    left, top, right, bottom = (round(value * square.mpp / MASK_UM) for value in corners)
    return float(mask[top : max(bottom, top + 1), left : max(right, left + 1)].mean())


def priorities(seed: int, name: str, origins: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Draw a number for each square of a slide. Sampling within and over slides takes the lowest numbers.

    The numbers depend only on the seed, the slide's name and the square's position.
    """
    texts = (f"{seed}/{name}/{x}/{y}".encode() for x, y in origins.tolist())
    digests = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in texts]
    return np.array(digests, np.uint64)


# Open slides cannot be sent to another process, so each process keeps its own.
_opened = lru_cache(maxsize=_HANDLES)(open_slide)


def close_slides() -> None:
    """Close the slides that this process has open."""
    _opened.cache_clear()


def examine(square: Square, settings: CutSettings) -> Found | Lost:
    """Read a square and detect its nuclei; return what of it is lost if it cannot be read."""
    side, lost = square.side, Lost()
    reach_um = 0.0 if square.nuclei is not None else load_finder(settings.detector).reach_um
    margin = math.ceil(reach_um / square.mpp)  # a nucleus at the border is detected with the tissue on both sides
    try:
        slide = _opened(square.path, square.mpp)
        corner, whole = (square.x - margin, square.y - margin), side + 2 * margin
        try:
            block, unscanned = slide.read_scanned(*corner, whole, whole)
        except UserError:
            slide.salvage(*corner, whole, whole, 0, lost)  # which parts of it are lost
            raise
    except (UserError, OSError, MemoryError) as error:
        if not lost.boxes:
            known = isinstance(error, UserError)
            reason = error if known else UserError(f"{square.path}: {type(error).__name__} ({error})")
            lost.add((square.x, square.y, square.x + side, square.y + side), reason)
        return lost
    inner = slice(margin, margin + side), slice(margin, margin + side)
    image, share = np.ascontiguousarray(block[inner]), float(unscanned[inner].mean())
    if share > settings.max_unscanned:
        return Found(image, Points(np.zeros((0, 2), np.float32)), share)
    return Found(image, _detect(block, square, settings).within(margin, margin, side), share)


def _detect(block: NDArray[np.uint8], square: Square, settings: CutSettings) -> Points:
    """Return the nuclei of a square and its margin: the user's, or detected ones."""
    if square.nuclei is not None:
        return square.nuclei
    return load_finder(settings.detector)(block, square.mpp, threshold=settings.threshold)


def examine_to_jpeg(square: Square, settings: CutSettings, quality: int) -> Found | Lost:
    """``examine`` with the pixels as JPEG, a fifth of the bytes; without pixels if the square is not kept."""
    found = examine(square, settings)
    if isinstance(found, Lost):
        return found
    assert not isinstance(found.image, bytes)
    kept = found.unscanned <= settings.max_unscanned and len(found.nuclei) >= settings.min_nuclei
    return replace(found, image=encode_jpeg(found.image, quality) if kept else b"")


class Cut:
    """The ROIs of a surveyed slide, one by one.

    Attributes:
        dropped: number of squares dropped so far, by reason.
        refused: positions ``x, y`` of squares that were examined but not kept, by reason.
        damage: what of the tissue is unreadable so far.
    """

    def __init__(self, survey: Survey, settings: CutSettings, quality: int | None = None) -> None:
        self._survey, self._settings = survey, settings
        self._examine: Examine = (
            partial(examine, settings=settings)
            if quality is None
            else partial(examine_to_jpeg, settings=settings, quality=quality)
        )
        self.dropped = survey.dropped.copy()
        self.damage = deepcopy(survey.damage)
        self._kept = self._nuclei = 0
        self.refused: dict[str, list[tuple[int, int]]] = {"too few nuclei": [], "unreadable": [], "unscanned": []}

    def rois(self, ordered_map: OrderedMap = map) -> Iterator[tuple[Square, Found]]:
        """Examine the squares in order.

        Raises:
            UserError: too much of the tissue cannot be read.
        """
        limit = self._settings.per_slide
        candidates = [square for square in self._survey.squares if self._worth_reading(square)]
        examined = 0
        for square, found in zip(candidates, ordered_map(self._examine, candidates), strict=False):
            examined += 1
            if isinstance(found, Lost):
                self._refuse(square, "unreadable")
                self.damage.add(found)
            elif found.unscanned > self._settings.max_unscanned:
                self._refuse(square, "unscanned")
            elif self._enough(found.nuclei, square):
                yield square, found
                self._kept += 1
                if self._kept == limit:
                    break
        if examined < len(candidates):
            self.dropped["beyond per_slide"] += len(candidates) - examined

    def _worth_reading(self, square: Square) -> bool:
        """Return False for a square with too few of the user's nuclei, which need not be read."""
        return square.nuclei is None or self._enough(square.nuclei, square)

    def nothing_found(self) -> str:
        """The likely reason if ``rois`` yielded nothing, else ""."""
        slide, settings, count = self._survey, self._settings, len(self._survey.squares)
        if self._kept:
            return ""
        if slide.side > min(slide.width, slide.height):
            width, height = slide.width * slide.mpp, slide.height * slide.mpp
            return f"smaller than a ROI: {width:.0f} x {height:.0f} um, roi_um={settings.roi_um:g}"
        if not slide.tissue.any():
            return "no tissue found; tissue=FOLDER takes yours, min_tissue=0 searches everywhere"
        if not count:
            return f"no square has enough tissue for min_tissue={settings.min_tissue:g}"
        if self.dropped["unreadable"] == count:
            return f"none of the {count} squares with tissue can be read"
        if (gaps := self.dropped["unscanned"]) and gaps + self.dropped["unreadable"] == count:
            return f"more than max_unscanned={settings.max_unscanned:g} of every square is black or transparent"
        if not self._nuclei:
            return f"no nuclei found in {count} squares with tissue: is {slide.mpp:g} um/px right, and is it H&E?"
        return f"none of {count} squares with tissue has min_nuclei={settings.min_nuclei} nuclei"

    def _enough(self, nuclei: Points, square: Square) -> bool:
        self._nuclei += len(nuclei)
        if len(nuclei) >= self._settings.min_nuclei:
            return True
        self._refuse(square, "too few nuclei")
        return False

    def _refuse(self, square: Square, reason: str) -> None:
        self.dropped[reason] += 1
        self.refused[reason].append((square.x, square.y))
