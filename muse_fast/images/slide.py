"""`open_slide` opens any slide or plain image; a reader, which is a subclass of `Slide`, adds a file format.

A slide is never loaded whole: the overview is read in bands, everything else in squares.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images import background
from muse_fast.images.image_files import IMAGE_SUFFIXES, TO_SLIDE, count_pictures, read_stored, tiff_peculiarity
from muse_fast.images.mpp import check_mpp, tiff_mpp
from muse_fast.runtime.drawn import is_drawn
from muse_fast.runtime.folders import iter_files

_BAND_PIXELS = 16_000_000
_BOUNDS = ("x", "y", "width", "height")
_GIVE_MPP = "give mpp=NUMBER or list the file in mpp.csv (image,mpp)"
_PIECE = 256  # pixels: damage is narrowed down to squares of this side, the tiles of most files
_UNREADABLE = (160, 160, 160)  # grey in overviews: neither tissue nor glass


class Level(NamedTuple):
    """One resolution of a slide."""

    width: int
    height: int
    downsample: float  # level-0 pixels per pixel, by which positions are converted


class Frame(NamedTuple):
    """A rectangle of a slide in level-0 pixels; positions in a file count from its corner and lie inside it."""

    x: int
    y: int
    width: int
    height: int

    @property
    def origin(self) -> tuple[int, int]:
        return self.x, self.y

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in level-0 pixels."""
        return self.x, self.y, self.x + self.width, self.y + self.height

    @property
    def area(self) -> str:
        """What it is, for messages."""
        size = f"{self.width} x {self.height} px"
        return (
            f"the part that QuPath shows, {size} at {self.x}, {self.y}" if any(self.origin) else f"the slide of {size}"
        )

    @property
    def expected(self) -> str:
        """What positions should be, for messages."""
        if not any(self.origin):
            return "level-0 pixels"
        return "pixels from the corner of that part; give frame=level0 if they count from the corner of the slide"


FRAMES = ("qupath", "level0")  # the names of `Slide.frame`


class Lost:
    """The parts of a slide that could not be read.

    Args:
        limit: share of ``area``, in level-0 pixels, that may be lost.

    Attributes:
        boxes: left, top, right and bottom of each part, in level-0 pixels.
        reason: the first error; "" if nothing is lost.
    """

    def __init__(self, limit: float = 1.0, area: float = math.inf) -> None:
        self.boxes: list[tuple[int, int, int, int]] = []
        self.reason = ""
        self._limit, self._area, self._lost = limit, area, 0

    def add(self, box: tuple[int, int, int, int], error: Exception) -> None:
        """Add a part and why it could not be read.

        Raises:
            UserError: more than the limit is lost.
        """
        left, top, right, bottom = box
        self.boxes.append(box)
        self.reason = self.reason or str(error)
        self._lost += (right - left) * (bottom - top)
        if self._limit < 1 and self._lost > self._limit * self._area:
            raise UserError(
                f"{self.reason}; more than max_unreadable={self._limit:g} of the slide cannot be read, copy it again"
            )

    def mask(self, shape: tuple[int, ...], step: float) -> NDArray[np.bool_]:
        """``[h, w]`` bool: pixels with sides of ``step`` level-0 pixels whose centre is lost."""
        mask = np.zeros(shape, bool)
        for left, top, right, bottom in np.round(np.array(self.boxes).reshape(-1, 4) / step).astype(int):
            mask[top:bottom, left:right] = True
        return mask


class Overview(NamedTuple):
    """A whole slide at low resolution: ``[h, w, 3]`` uint8 RGB, grey where it is lost."""

    pixels: NDArray[np.uint8]
    lost: Lost


class Slide(ABC):
    """An open slide; `open_slide` returns one.

    A subclass is the reader of a file format: it sets ``path`` and ``levels`` and defines ``suffixes``, `header_mpp`,
    `read_stored` and `close`. Everything else builds on these.

    Attributes:
        suffixes: of the files that it opens, in lower case.
        in_memory: the file is a plain image, loaded whole. Threads may share it, and a folder of slides is searched
            for such files only on request.
        path: the file.
        levels: from level 0, each coarser than the one before.
        mpp: um per pixel of level 0; `open_slide` sets it.
    """

    suffixes: ClassVar[tuple[str, ...]]
    in_memory: ClassVar[bool] = False
    path: Path
    levels: tuple[Level, ...]
    mpp: float

    @abstractmethod
    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            UserError: it cannot be read; names the file.
        """

    @classmethod
    def opens(cls, path: Path) -> bool:
        """Whether this reader is the right one for a file with one of its suffixes."""
        return True

    @abstractmethod
    def header_mpp(self) -> float | None:
        """um per pixel of level 0 from the header; None if it does not say.

        The magnification is not enough: slides of the same magnification differ by a factor of two.

        Raises:
            UserError: the header is implausible; names the file.
        """

    @abstractmethod
    def read_stored(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        """The pixels of one level as stored, ``x`` and ``y`` in level-0 pixels.

        Returns:
            ``[height, width, 3]`` RGB, white outside the slide, or ``[height, width, 4]`` RGBA, white or transparent
            outside.

        Raises:
            UserError: the pixels are damaged; names file and position. Other pixels can still be read afterwards.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def read(self, x: int, y: int, width: int, height: int, level: int = 0) -> NDArray[np.uint8]:
        """``[height, width, 3]`` RGB of one level, ``x`` and ``y`` in level-0 pixels; white where nothing was scanned.

        Raises:
            UserError: the pixels are damaged, as in `read_stored`.
        """
        return self.read_scanned(x, y, width, height, level)[0]

    def read_scanned(
        self, x: int, y: int, width: int, height: int, level: int = 0
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """`read`, and ``[height, width]`` bool, which pixels of the slide were not scanned; see `images.background`.

        A pixel does not depend on the piece in which it is read.
        """
        pixels, unscanned = background.on_white(self.read_stored(x, y, width, height, level))
        dark = background.may_be_black(pixels)
        if not dark.any():
            return pixels, unscanned
        if dark[[0, -1]].any() or dark[:, [0, -1]].any():  # black may come in from outside
            black = self._black(x, y, width, height, level, pixels)
        else:
            black = background.black(pixels, self.mpp * self.levels[level].downsample)
        if black.any():
            pixels = np.where(black[..., None], np.uint8(255), pixels)
        return pixels, unscanned | black

    def _black(
        self, x: int, y: int, width: int, height: int, level: int, pixels: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Black among ``pixels``, judged with what is around them, or without it if that is damaged."""
        downsample = self.levels[level].downsample
        um = self.mpp * downsample
        margin = background.reach(um)
        shift = round(margin * downsample)
        try:
            around = self.read_stored(x - shift, y - shift, width + 2 * margin, height + 2 * margin, level)
        except UserError:
            return background.black(pixels, um)
        return background.black(background.on_white(around)[0], um)[margin:-margin, margin:-margin]

    @property
    def identity(self) -> str | None:
        """The same text for all files and copies of a slide, and for no other slide; None if the format has none."""
        return None

    @property
    def width(self) -> int:
        return self.levels[0].width

    @property
    def height(self) -> int:
        return self.levels[0].height

    @property
    def qupath_frame(self) -> Frame:
        """The part that QuPath shows: all, unless the header gives the bounds of what was scanned."""
        return self.frame("level0")

    def frame(self, name: str) -> Frame:
        """The frame ``qupath``, or ``level0``: all of the slide."""
        return self.qupath_frame if name == "qupath" else Frame(0, 0, self.width, self.height)

    def resized(self, field: tuple[float, float, float, float], size: tuple[int, int]) -> NDArray[np.uint8]:
        """A part of the slide (left, top, right, bottom in level-0 pixels) as ``[h, w, 3]`` RGB of ``size`` (w, h).

        It is read from the coarsest level that is fine enough, and shrunk with an antialiasing filter.

        Raises:
            UserError: the pixels are damaged.
        """
        left, top, right, bottom = field
        finest = min((right - left) / size[0], (bottom - top) / size[1])
        level = self._coarsest(finest)
        downsample = self.levels[level].downsample
        x, y = math.floor(left), math.floor(top)
        width, height = (math.ceil((far - near) / downsample) for near, far in ((x, right), (y, bottom)))
        pixels = Image.fromarray(self.read(x, y, width, height, level))
        near, far = (left - x, top - y), (right - x, bottom - y)
        box = near[0] / downsample, near[1] / downsample, far[0] / downsample, far[1] / downsample
        return np.array(pixels.resize(size, Image.Resampling.BICUBIC, box=box))

    def salvage(self, x: int, y: int, width: int, height: int, level: int, lost: Lost) -> NDArray[np.uint8]:
        """Like `read`, but damaged parts come from finer levels; what none can give is white and is added to ``lost``.

        Raises:
            UserError: too much is lost.
        """
        try:
            return self.read(x, y, width, height, level)
        except UserError as damage:
            error = damage
        downsample = self.levels[level].downsample
        ratio = downsample / self.levels[level - 1].downsample if level else 1.0
        piece = max(1, min(_PIECE, int(math.sqrt(_BAND_PIXELS) / ratio)))
        column, row = _middle(x / downsample, width, piece), _middle(y / downsample, height, piece)
        if column and (width >= height or not row):
            left = self.salvage(x, y, column, height, level, lost)
            right = self.salvage(x + round(column * downsample), y, width - column, height, level, lost)
            return np.concatenate([left, right], axis=1)
        if row:
            upper = self.salvage(x, y, width, row, level, lost)
            lower = self.salvage(x, y + round(row * downsample), width, height - row, level, lost)
            return np.concatenate([upper, lower])
        if level:
            fine = self.salvage(x, y, math.ceil(width * ratio), math.ceil(height * ratio), level - 1, lost)
            box = (0, 0, width * ratio, height * ratio)
            return np.asarray(Image.fromarray(fine).resize((width, height), Image.Resampling.BOX, box))
        lost.add((max(x, 0), max(y, 0), min(x + width, self.width), min(y + height, self.height)), error)
        return np.full((height, width, 3), 255, np.uint8)

    def overview(self, um: float, max_unreadable: float = 1.0) -> Overview:
        """The slide at about ``um`` per pixel, ``[ceil(H * mpp / um), ceil(W * mpp / um), 3]``.

        Raises:
            UserError: more than the share ``max_unreadable`` of the slide is lost.
        """
        columns, rows = math.ceil(self.width * self.mpp / um), math.ceil(self.height * self.mpp / um)
        step = um / self.mpp  # level-0 pixels per pixel of the overview
        level = self._coarsest(step)
        downsample = self.levels[level].downsample
        width = round(columns * step / downsample)
        rows_per_band = max(1, int(_BAND_PIXELS / width / (step / downsample)))
        bands, lost = [], Lost(max_unreadable, self.width * self.height)
        for top in range(0, rows, rows_per_band):
            count = min(rows_per_band, rows - top)
            height = max(1, round(count * step / downsample))
            band = self.salvage(0, round(top * step), width, height, level, lost)
            bands.append(np.asarray(Image.fromarray(band).resize((columns, count), Image.Resampling.BOX)))
        pixels = np.concatenate(bands)
        pixels[lost.mask(pixels.shape[:2], step)] = _UNREADABLE
        return Overview(pixels, lost)

    def thumbnail(self, um: float) -> NDArray[np.uint8]:
        """The pixels of the `overview`, for a picture."""
        return self.overview(um).pixels

    def _coarsest(self, downsample: float) -> int:
        """The coarsest level that is at least as fine as ``downsample``; else level 0."""
        fine = (number for number, level in enumerate(self.levels) if level.downsample <= downsample)
        return max(fine, default=0)


class OpenSlideSlide(Slide):
    """A slide that OpenSlide reads."""

    suffixes = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".dcm", ".czi")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        sizes, downsamples = self._handle.level_dimensions, self._handle.level_downsamples
        self.levels = tuple(Level(*size, downsample) for size, downsample in zip(sizes, downsamples, strict=True))
        if problem := _misread(path):
            self.close()
            raise UserError(f"{path}: a TIFF with {problem}, expected one picture in 8-bit RGB; {TO_SLIDE}")

    def _open(self) -> None:
        import openslide

        try:
            self._handle = openslide.OpenSlide(str(self.path))
        except (openslide.OpenSlideError, OSError) as error:
            raise UserError(f"{self.path}: OpenSlide cannot read it ({str(error) or type(error).__name__})") from error

    @classmethod
    def opens(cls, path: Path) -> bool:
        import openslide

        return openslide.OpenSlide.detect_format(str(path)) is not None and not _misread(path)

    def header_mpp(self) -> float | None:
        values = [self._handle.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        if None in values:
            return None
        try:
            x, y = (check_mpp(str(value), f"{self.path}: openslide.mpp in the header") for value in values)
        except UserError as error:
            raise UserError(f"{error}; {_GIVE_MPP}") from None
        if abs(x - y) > 0.02 * x:
            raise UserError(f"{self.path}: pixels are {x} x {y} um, expected squares; {_GIVE_MPP} to use it anyway")
        return (x + y) / 2

    @property
    def qupath_frame(self) -> Frame:
        """The bounds in the header, to which QuPath crops slides of MIRAX, Leica and others unless given ``--no-crop``.

        As in QuPath's ``OpenslideImageServer``, they count only if all four are whole numbers.
        """
        try:
            x, y, width, height = (int(self._handle.properties[f"openslide.bounds-{key}"]) for key in _BOUNDS)
        except (KeyError, ValueError):
            return self.frame("level0")
        return Frame(x, y, width, height)

    @property
    def identity(self) -> str | None:
        """OpenSlide's hash of the coarsest level and of what the header says, and the size of the slide.

        All files of a DICOM series have the same hash; slides with much data in their coarsest level have none.
        """
        quickhash = self._handle.properties.get("openslide.quickhash-1")
        return f"{quickhash}-{self.width}x{self.height}" if quickhash else None

    def read_stored(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        import openslide

        try:
            region = self._handle.read_region((x, y), level, (width, height))
        except openslide.OpenSlideError as error:
            self._handle.close()
            self._open()  # after an error OpenSlide refuses all further reads from the handle
            raise UserError(f"{self.path}: unreadable at {x}, {y}, level {level} ({error})") from error
        return np.asarray(region)

    def close(self) -> None:
        self._handle.close()


def _misread(path: Path) -> str:
    """What makes OpenSlide show wrong pixels of a TIFF, or not all of its pictures; "" if nothing does.

    Other formats have only what it knows.
    """
    import openslide

    kind = openslide.OpenSlide.detect_format(str(path))
    problem = tiff_peculiarity(path) if kind in ("generic-tiff", "aperio") else ""
    if kind == "generic-tiff" and not problem and (count := count_pictures(path)) > 1:
        return f"{count} pictures"
    return problem


class ImageSlide(Slide):
    """A plain image of at most 16,384 px a side, loaded whole."""

    suffixes = IMAGE_SUFFIXES
    in_memory = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pixels = read_stored(path)
        height, width, _ = self._pixels.shape
        self.levels = (Level(width, height, 1.0),)

    def header_mpp(self) -> float | None:
        return tiff_mpp(self.path)

    def read_stored(self, x: int, y: int, width: int, height: int, level: int) -> NDArray[np.uint8]:
        return cut_block(self._pixels, x, y, width, height)

    def overview(self, um: float, max_unreadable: float = 1.0) -> Overview:
        size = math.ceil(self.width * self.mpp / um), math.ceil(self.height * self.mpp / um)
        covered = (0, 0, min(self.width, size[0] * um / self.mpp), min(self.height, size[1] * um / self.mpp))
        whole = self.read(0, 0, self.width, self.height)
        return Overview(np.asarray(Image.fromarray(whole).resize(size, Image.Resampling.BOX, covered)), Lost())

    def close(self) -> None:
        """There is nothing to close."""


READERS: list[type[Slide]] = [OpenSlideSlide, ImageSlide]
"""All readers. If several have the suffix of a file, the first that opens it reads it, or the last if none does."""


def open_slide(path: Path, mpp: float | None = None) -> Slide:
    """Open a slide or an image.

    Args:
        mpp: um per pixel of level 0; None: from the header.

    Raises:
        UserError: no reader can read it, or um per pixel is unknown; names the file.
    """
    slide = _reader(path)(path)
    try:
        found = slide.header_mpp() if mpp is None else mpp
        if found is None:
            raise UserError(f"{path}: the header does not give um per pixel; {_GIVE_MPP}")
    except UserError:
        slide.close()
        raise
    slide.mpp = found
    return slide


def slide_identity(path: Path) -> str | None:
    """The `Slide.identity` of a file; errors as when it is opened. An image, which would be loaded whole, is not."""
    reader = _reader(path)
    if reader.in_memory:
        return None
    with closing(reader(path)) as slide:
        return slide.identity


def _reader(path: Path) -> type[Slide]:
    known = [reader for reader in READERS if path.suffix.lower() in reader.suffixes] or [OpenSlideSlide]
    return next((reader for reader in known[:-1] if reader.opens(path)), known[-1])


def slide_suffixes(*, images: bool = False) -> tuple[str, ...]:
    """Suffixes of slides and, with ``images``, of plain images."""
    readers = (reader for reader in READERS if images or not reader.in_memory)
    return tuple(dict.fromkeys(suffix for reader in readers for suffix in reader.suffixes))


def find_slides(path: Path, *, images: bool = False) -> list[Path]:
    """The slide at ``path``, or all slides in that folder and its subfolders, sorted.

    Of slides that consist of several files, all that can be opened are returned, see `Slide.identity`.

    Args:
        images: include plain images, but no pictures that the package has drawn.

    Raises:
        UserError: the path does not exist, or the folder contains no slides.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    suffixes = slide_suffixes(images=images)
    found = [file for file in iter_files(path, "**/*") if file.suffix.lower() in suffixes and not is_drawn(file)]
    files = sorted({*found} - {part for file in found for part in _parts(file)})
    if not files:
        raise UserError(f"{path} contains no slides{' or images' if images else ''} ({', '.join(suffixes)})")
    return files


def _parts(path: Path) -> Iterator[Path]:
    """The files that an index of Hamamatsu (VMS, VMU) names: parts of a slide that could pass for plain images."""
    if path.suffix.lower() in (".vms", ".vmu"):
        for line in path.read_text("utf-8", "replace").splitlines():
            name = line.partition("=")[2].strip()
            if name and name == Path(name).name:
                yield path.with_name(name)


def cut_block(pixels: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    """``[height, width, C]`` of an image ``[H, W, C]``, with the top-left corner at ``x``, ``y``; white outside."""
    block = np.full((height, width, pixels.shape[2]), 255, np.uint8)
    left, top = max(x, 0), max(y, 0)
    part = pixels[top : max(y + height, 0), left : max(x + width, 0)]
    block[top - y : top - y + part.shape[0], left - x : left - x + part.shape[1]] = part
    return block


def _middle(start: float, length: int, piece: int) -> int:
    """Where to cut a span of pixels: at the multiple of ``piece`` nearest to its middle; 0 if none is inside."""
    cut = round((start + length / 2) / piece) * piece - round(start)
    return cut if 0 < cut < length else 0
