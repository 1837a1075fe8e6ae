"""One field of nuclei at known places in many files: sound ones, which all show the same, and damaged or odd ones.

Each function writes into an empty folder and returns a `Twin`: what to give to ``predict``, and the nuclei in it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support.dicom import write_series
from tests.support.planted import scattered, write_pyramid
from tests.support.small_slides import damage, tifffile, write_scn, write_slide

MPP = 0.5
SIDE = 640  # px, of the field
CORNER = (160, 96)  # x, y of the field on a page
SIZE = (960, 832)  # width, height of a page
LEVELS = (4, 16)  # the coarsest is that of the tissue mask
_ALL = tuple(range(len(LEVELS) + 1))
_HEMATOXYLIN, _EOSIN = np.array([0.563, 0.720, 0.406]), np.array([0.216, 0.801, 0.558])  # Macenko et al. (2009)

Pixels = NDArray[np.uint8]


class Twin(NamedTuple):
    """A slide or image of the field, or of a part of it."""

    path: Path  # what `predict` is given: a file or a folder
    xy: NDArray[np.float64]  # [n, 2] the nuclei in it, level-0 pixels
    words: tuple[str, ...] = ()  # settings


Maker = Callable[[Path], Twin]


@functools.cache
def field() -> tuple[Pixels, NDArray[np.float64]]:
    """The field ``[SIDE, SIDE, 3]`` and its nuclei ``[n, 2]``: discs of 4 um radius, 10 um or more from its edge."""
    xy = scattered(SIDE, SIDE, 20.0)
    hematoxylin = np.zeros((SIDE, SIDE))
    for x, y in xy:
        rows, columns = slice(int(y) - 14, int(y) + 15), slice(int(x) - 14, int(x) + 15)
        v, u = np.mgrid[rows, columns] + 0.5
        disc = 1 / (1 + np.exp((np.hypot(u - x, v - y) - 4 / MPP) / 0.6))
        hematoxylin[rows, columns] = np.maximum(hematoxylin[rows, columns], disc)
    density = 0.7 * hematoxylin[..., None] * _HEMATOXYLIN + 0.3 * _EOSIN
    return np.round(250 * 10**-density).astype(np.uint8), xy


def page(padding: int = 245) -> Pixels:
    """The field on a page of one grey value."""
    whole = np.full((SIZE[1], SIZE[0], 3), padding, np.uint8)
    whole[_shown()] = field()[0]
    return whole


def _shown() -> tuple[slice, slice]:
    return slice(CORNER[1], CORNER[1] + SIDE), slice(CORNER[0], CORNER[0] + SIDE)


def _transparent() -> Pixels:
    """The page ``[H, W, 4]``, with nothing around the field: transparent black, as most programs write it."""
    opacity = np.zeros((SIZE[1], SIZE[0], 1), np.uint8)
    opacity[_shown()] = 255
    return np.concatenate([page(0), opacity], axis=2)


def _placed(path: Path, *words: str) -> Twin:
    return Twin(path, field()[1] + CORNER, words)


def _image(folder: Path, name: str, pixels: Pixels, **options: Any) -> Path:
    Image.fromarray(pixels).save(folder / name, **options)
    return folder / name


def _pyramid(folder: Path) -> Path:
    return write_pyramid(folder / "slide.tif", page(), MPP, LEVELS, "zlib")


# --------------------------------------------------------------------------------------- the same nuclei in all of them


def white(folder: Path) -> Twin:
    return _placed(write_slide(folder / "slide.tif", page()))


def black(folder: Path) -> Twin:
    return _placed(write_slide(folder / "slide.tif", page(0)))


def black_image(folder: Path) -> Twin:
    return _placed(_image(folder, "image.png", page(0)), "mpp=0.5")


def transparent_image(folder: Path) -> Twin:
    return _placed(_image(folder, "image.png", _transparent()), "mpp=0.5")


def transparent_slide(folder: Path) -> Twin:
    return _placed(write_slide(folder / "slide.tif", _transparent(), extrasamples=["unassalpha"]))


def bounds(folder: Path) -> Twin:
    """Only the field was scanned; OpenSlide gives its place as ``openslide.bounds-*``."""
    return _placed(write_scn(folder / "slide.scn", field()[0], CORNER, SIZE))


def dicom(folder: Path) -> Twin:
    """A series of three files, which are one slide."""
    write_series(folder, "slide", page(), MPP)
    return _placed(folder)


def sixteen_bits(folder: Path) -> Twin:
    return _placed(write_slide(folder / "slide.tif", page().astype(np.uint16) * 257))


def sixteen_bits_image(folder: Path) -> Twin:
    tifffile.imwrite(folder / "image.tif", page().astype(np.uint16) * 257, photometric="rgb")
    return _placed(folder / "image.tif", "mpp=0.5")


def damaged_overview(folder: Path) -> Twin:
    damage(path := _pyramid(folder), level=len(LEVELS))
    return _placed(path)


def damaged_levels(folder: Path) -> Twin:
    """Only level 0 is sound."""
    path = _pyramid(folder)
    for level in range(1, len(LEVELS) + 1):
        damage(path, level=level)
    return _placed(path)


SOUND: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        white, black, black_image, transparent_image, transparent_slide, bounds, dicom, sixteen_bits,
        sixteen_bits_image, damaged_overview, damaged_levels,
    )
}  # fmt: skip
"""Slides that give the same nuclei."""


# ---------------------------------------------------------------------------- fewer, or none, but never without a word


def _copy(twin: Twin, name: str) -> Path:
    """Another copy of a file, beside it."""
    (path := twin.path.with_name(name)).write_bytes(twin.path.read_bytes())
    return path


def _cut(path: Path, share: float) -> Path:
    """The file without its end."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def _truncated(share: float) -> Maker:
    """A slide whose tags come first, as cloud-optimised TIFFs have them, or last."""

    def make(folder: Path) -> Twin:
        return _placed(_cut(_pyramid(folder), share))

    return make


def _truncated_image(name: str) -> Maker:
    def make(folder: Path) -> Twin:
        return _placed(_cut(_image(folder, name, page()), 0.6), "mpp=0.5")

    return make


def _damaged(*tiles: int, levels: tuple[int, ...] = (0,)) -> Maker:
    """A slide some of whose tiles cannot be decoded, or all."""

    def make(folder: Path) -> Twin:
        path = _pyramid(folder)
        for level in levels:
            damage(path, *tiles, level=level)
        return _placed(path)

    return make


def damaged_at_random(rng: random.Random) -> Maker:
    """A slide some of whose levels lack some of their tiles, or all; most of it may be unreadable."""

    def make(folder: Path) -> Twin:
        path = _pyramid(folder)
        for level in rng.sample(_ALL, rng.randint(1, len(_ALL))):
            share = rng.choice((0.1, 0.3, 1.0))
            if tiles := [tile for tile in range(_tiles(path, level)) if rng.random() < share]:
                damage(path, *tiles, level=level)
        return _placed(path, "max_unreadable=0.9")

    return make


def _tiles(path: Path, level: int) -> int:
    with tifffile.TiffFile(path) as file:
        return len(file.pages[level].dataoffsets)


def floats(folder: Path) -> Twin:
    """OpenSlide opens it but cannot decode it."""
    return _placed(write_slide(folder / "slide.tif", (page() / 255).astype(np.float32)))


def not_a_slide(folder: Path) -> Twin:
    (folder / "slide.svs").write_text("<html><title>404</title></html>")
    return _placed(folder / "slide.svs")


def one_of_two_is_empty(folder: Path) -> Twin:
    """Nothing was copied of the second."""
    white(folder)
    (folder / "other.tif").touch()
    return Twin(folder, np.concatenate([field()[1] + CORNER] * 2))


def twelve_bits(folder: Path) -> Twin:
    return _placed(write_slide(folder / "slide.tif", page().astype(np.uint16) * 16))


def twelve_bits_image(folder: Path) -> Twin:
    tifffile.imwrite(folder / "image.tif", page().astype(np.uint16) * 16, photometric="rgb")
    return _placed(folder / "image.tif", "mpp=0.5")


def grey_slide(folder: Path) -> Twin:
    tifffile.imwrite(folder / "slide.tif", page()[..., 1], tile=(256, 256), photometric="minisblack")
    return _placed(folder / "slide.tif", "mpp=0.5")


def _mode(mode: str, name: str) -> Maker:
    """An image of another mode than RGB."""

    def make(folder: Path) -> Twin:
        Image.fromarray(page()).convert(mode).save(folder / name)
        return _placed(folder / name, "mpp=0.5")

    return make


def _patch(side: int) -> Maker:
    """A patch inside the field, as datasets of small images have them; its border cuts no nucleus."""

    def make(folder: Path) -> Twin:
        image, xy = field()
        path = _image(folder, "patch.png", image[:side, :side])
        return Twin(path, xy[(xy < side).all(axis=1)], ("mpp=0.5",))

    return make


def turned(folder: Path) -> Twin:
    """A photograph that is stored lying on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = _image(folder, "image.jpg", page(), quality=95, exif=exif)
    return _placed(path, "mpp=0.5")


def _scaled(words: tuple[str, ...] = (), table: str = "", mpp: float | None = MPP, name: str = "slide.tif") -> Maker:
    """A slide whose header, settings or table give an odd um/px, or none."""

    def make(folder: Path) -> Twin:
        path = write_slide(folder / name, page(), mpp)
        if table:
            (folder / "mpp.csv").write_text(table)
        return _placed(folder if table else path, *words)

    return make


def linked_folder(folder: Path) -> Twin:
    """The second of two slides lies in a folder elsewhere, to which a link leads."""
    (folder / "given").mkdir()
    (folder / "elsewhere").mkdir()
    write_slide(folder / "given" / "a.tif", page())
    write_slide(folder / "elsewhere" / "b.tif", page(230))
    (folder / "given" / "more").symlink_to(folder / "elsewhere", target_is_directory=True)
    return Twin(folder / "given", np.concatenate([field()[1] + CORNER] * 2))


def linked_slide(folder: Path) -> Twin:
    write_slide(folder / "elsewhere" / "a.tif", page())
    (folder / "given").mkdir()
    (folder / "given" / "a.tif").symlink_to(folder / "elsewhere" / "a.tif")
    return _placed(folder / "given")


def broken_link(folder: Path) -> Twin:
    white(folder)
    (folder / "gone.tif").symlink_to(folder / "nowhere.tif")
    return Twin(folder, np.concatenate([field()[1] + CORNER] * 2))


def copied_by_a_mac(folder: Path) -> Twin:
    """Beside each file lies another that only its system reads."""
    twin = white(folder)
    (folder / "._slide.tif").write_bytes(b"\0\5\x16\7Mac OS X")
    return _placed(twin.path.parent)


def the_same_twice(folder: Path) -> Twin:
    """Two names for one slide: its nuclei must not count twice."""
    _copy(white(folder), "copy.tif")
    return _placed(folder)


def two_of_one_name(folder: Path) -> Twin:
    white(folder)
    _image(folder, "slide.png", page(230))
    return Twin(folder, np.concatenate([field()[1] + CORNER] * 2), ("mpp=0.5",))


ODD: dict[str, Maker] = SOUND | {
    "some tiles damaged": _damaged(5),
    "tiles damaged in all levels": _damaged(0, levels=_ALL),
    "level 0 damaged": _damaged(),
    "all levels damaged": _damaged(levels=_ALL),
    "truncated in level 0": _truncated(0.3),
    "truncated in the overview": _truncated(0.98),
    "truncated PNG": _truncated_image("image.png"),
    "truncated JPEG": _truncated_image("image.jpg"),
    "floats": floats,
    "not a slide": not_a_slide,
    "one of two is empty": one_of_two_is_empty,
    "12 bits": twelve_bits,
    "12 bits, image": twelve_bits_image,
    "grey slide": grey_slide,
    "grey image": _mode("L", "image.png"),
    "palette": _mode("P", "image.png"),
    "CMYK": _mode("CMYK", "image.jpg"),
    "patch of 123 um": _patch(246),
    "patch of 38 um": _patch(76),
    "turned": turned,
    "no um/px": _scaled(mpp=None),
    "um/px out of range": _scaled(mpp=353.0),
    "too coarse": _scaled(words=("mpp=3",)),
    "too fine": _scaled(words=("mpp=0.05",)),
    "suffix in capitals": _scaled(name="SLIDE.TIF"),
    "table by name": _scaled(mpp=0.05, table="image,mpp\nslide,0.5\n"),
    "table of other slides": _scaled(mpp=0.05, table="image,mpp\nslides.tif,0.5\n"),
    "table with a byte-order mark": _scaled(mpp=0.05, table="\ufeffimage,mpp\nslide.tif,0.5\n"),
    "table with semicolons": _scaled(mpp=0.05, table="image;mpp\nslide.tif;0.5\n"),
    "table with an open quote": _scaled(mpp=0.05, table='"image,mpp\nslide.tif,0.5\n'),
    "linked folder": linked_folder,
    "linked slide": linked_slide,
    "broken link": broken_link,
    "copied by a Mac": copied_by_a_mac,
    "the same twice": the_same_twice,
    "two of one name": two_of_one_name,
}
"""Files of all kinds: ``predict`` must find all nuclei, or say what is missing."""
