"""One whole slide, opened with OpenSlide. It is never held as a whole: bands for the overview, squares for the rest."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images.mpp import check_mpp

SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".dcm", ".czi")
_BAND_PIXELS = 16_000_000
_UNREADABLE_PIXELS = 256  # side below which an unreadable part of the overview is not divided further


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

    def resized(self, field: tuple[float, float, float, float], size: tuple[int, int]) -> NDArray[np.uint8]:
        """A part of the slide, left, top, right and bottom in level-0 pixels, as ``[h, w, 3]`` RGB of ``size`` (w, h).

        It is read from the coarsest level that is finer than that, and shrunk with a filter that lets nothing alias.

        Raises:
            UserError: the pixels are damaged.
        """
        left, top, right, bottom = field
        finest = min((right - left) / size[0], (bottom - top) / size[1])
        level = self._handle.get_best_level_for_downsample(max(1.0, finest))
        downsample = self._handle.level_downsamples[level]
        x, y = math.floor(left), math.floor(top)
        width, height = (math.ceil((far - near) / downsample) for near, far in ((x, right), (y, bottom)))
        pixels = Image.fromarray(self.read(x, y, width, height, level))
        near, far = (left - x, top - y), (right - x, bottom - y)
        box = near[0] / downsample, near[1] / downsample, far[0] / downsample, far[1] / downsample
        return np.array(pixels.resize(size, Image.Resampling.BICUBIC, box=box))

    def thumbnail(self, um: float, max_unreadable: float = 0) -> NDArray[np.uint8]:
        """The slide at about ``um`` per pixel, ``[ceil(H * mpp / um), ceil(W * mpp / um), 3]`` RGB.

        Raises:
            UserError: more than ``max_unreadable`` pixels of level 0 cannot be read; up to that many are left white.
        """
        columns, rows = math.ceil(self.width * self.mpp / um), math.ceil(self.height * self.mpp / um)
        level = self._handle.get_best_level_for_downsample(max(1.0, um / self.mpp))
        downsample = self._handle.level_downsamples[level]
        step = um / self.mpp  # level-0 pixels per mask pixel
        width = round(columns * step / downsample)
        rows_per_band = max(1, int(_BAND_PIXELS / width / (step / downsample)))
        bands, damage = [], _Damage(max_unreadable)
        for top in range(0, rows, rows_per_band):
            count = min(rows_per_band, rows - top)
            height = max(1, round(count * step / downsample))
            band = self._read_sound(0, round(top * step), width, height, level, damage)
            bands.append(np.asarray(Image.fromarray(band).resize((columns, count), Image.Resampling.BOX)))
        return np.concatenate(bands)

    def _read_sound(self, x: int, y: int, width: int, height: int, level: int, damage: _Damage) -> NDArray[np.uint8]:
        """Like ``read``, with the parts that cannot be read left white: halved until they are small."""
        try:
            return self.read(x, y, width, height, level)
        except UserError as error:
            if max(width, height) <= _UNREADABLE_PIXELS:
                damage.add(width * height * self._handle.level_downsamples[level] ** 2, error)
                return np.full((height, width, 3), 255, np.uint8)
        downsample = self._handle.level_downsamples[level]
        axis, half = int(width >= height), max(width, height) // 2
        sizes = [(half, height), (width - half, height)] if axis else [(width, half), (width, height - half)]
        shift = round(half * downsample)
        places = [(x, y), (x + shift, y) if axis else (x, y + shift)]
        halves = (self._read_sound(*place, *size, level, damage) for place, size in zip(places, sizes, strict=True))
        return np.concatenate(list(halves), axis=axis)

    def close(self) -> None:
        self._handle.close()


class _Damage:
    """Pixels of one slide that cannot be read, up to a limit."""

    def __init__(self, limit: float) -> None:
        self._left = limit

    def add(self, pixels: float, error: UserError) -> None:
        self._left -= pixels
        if self._left < 0:
            raise error


def find_slides(path: Path) -> list[Path]:
    """The slide at ``path``, or all slides in that folder and the folders within, sorted.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise UserError(f"{path} holds no slide ({', '.join(SUFFIXES)})")
    return files
