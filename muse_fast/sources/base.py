"""The base classes of all sources of ROIs, and helpers for reading folders of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images.background import whitened
from muse_fast.images.image_files import IMAGE_SUFFIXES, read_image
from muse_fast.images.mpp import MPP_RANGE, MppRow, MppTables
from muse_fast.images.points import Points, drop_outside
from muse_fast.images.slide import open_slide
from muse_fast.runtime.drawn import is_drawn
from muse_fast.runtime.folders import find_files, iter_files
from muse_fast.runtime.options import Config, setting, split_list

SPLITS = ("train", "val", "test")
Field: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Context:
    """The tissue around an annotated image: a larger image without annotations, read only when needed.

    Attributes:
        path: the larger image.
        box: left, top, right and bottom of the annotated image, in pixels of the larger one (level 0 of a slide); may
            be fractional.
        is_slide: the larger image is a slide, of which only the required part is read.
    """

    path: Path
    box: Field
    is_slide: bool = False

    def read(self, mpp: float, choose: Callable[[int, int], tuple[Field, tuple[int, int]]]) -> NDArray[np.uint8]:
        """Return a resized part of the larger image, ``[h, w, 3]`` RGB.

        Args:
            mpp: um per pixel of the larger image.
            choose: maps the width and height of the larger image to the part to read (left, top, right, bottom) and
                the width and height to resize it to.

        Raises:
            UserError: the image or slide is damaged, or does not contain ``box``.
        """
        if self.is_slide:
            with closing(open_slide(self.path, mpp)) as slide:
                self._check(slide.width, slide.height)
                return slide.resized(*choose(slide.width, slide.height))
        larger, _ = whitened(read_image(self.path), mpp)
        height, width = larger.shape[:2]
        self._check(width, height)
        field, size = choose(width, height)
        return np.array(Image.fromarray(larger).resize(size, Image.Resampling.BICUBIC, box=field))

    def _check(self, width: int, height: int) -> None:
        left, top, right, bottom = self.box
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            sides = f"{width} x {height} px"
            raise UserError(f"{self.path}: {sides}, expected a larger image that contains its ROI at {self.box}")


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of a source and its nuclei."""

    name: str
    slide: str
    split: str  # "" if the source has no splits
    image: NDArray[np.uint8]  # [H, W, 3] RGB
    mpp: float  # um per pixel
    xy: NDArray[np.float32]  # [n, 2] pixels of the image
    label: NDArray[np.int16] | None  # [n], index into the source's label_names, -1 unknown
    score: NDArray[np.float32] | None  # [n]
    origin: tuple[int, int] = (0, 0)  # x, y of the top-left corner in level-0 pixels of the slide
    context: Context | None = None


class Source(ABC):
    """An iterable of ``SourceImage``, with ``len()`` if the length is known before reading.

    To add an option, add a field to the source's ``Options``, from which parsing, checks and messages follow.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Config):
        """No options; a source with options overrides this class."""

    kind: ClassVar[str]
    title: ClassVar[str] = ""  # shown to the user
    layouts: ClassVar[tuple[tuple[str, ...], ...]] = ()  # alternatives: all patterns of one match something
    label_names: tuple[str, ...] = ()

    def __init__(self, target: str, options: Options) -> None:
        """
        Args:
            target: the text after ``KIND:``, usually a folder.
        """
        self.dropped: Counter[str] = Counter()  # number of items skipped so far, by reason
        self.without_effect: list[str] = []  # lines for the user about rows of tables, names and files of no slide

    @abstractmethod
    def __iter__(self) -> Iterator[SourceImage]: ...

    def slides(self) -> Iterator[tuple[str, str]]:
        """Yield slide and split of every image, without reading the images if the source can."""
        yield from ((item.slide, item.split) for item in self)


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a dataset, before it is read."""

    name: str
    slide: str
    split: str
    image: Path
    labels: Path
    mpp: float
    origin: tuple[int, int] = (0, 0)
    row: int = 0  # index of the image in a file with many images
    context: Context | None = None


class Dataset(Source):
    """A source that lists all its images in ``entries`` before reading the first."""

    entries: list[Entry]

    def __init__(self, target: str, options: Source.Options) -> None:
        super().__init__(target, options)
        self.folder = Path(target)
        if not self.folder.is_dir():
            raise UserError(f"{target} is not a folder; expected {self.title}")

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[SourceImage]:
        return map(self.read, self.entries)

    def slides(self) -> Iterator[tuple[str, str]]:
        return ((entry.slide, entry.split) for entry in self.entries)

    def read(self, entry: Entry) -> SourceImage:
        """Read the pixels and nuclei of one entry.

        Raises:
            UserError: a file is missing, damaged or has the wrong content; names the file and the place in it.
        """
        image, _ = whitened(self._pixels(entry), entry.mpp)
        nuclei = self._nuclei(entry, image.shape[1], image.shape[0])
        xy = nuclei.xy.astype(np.float32)
        return SourceImage(
            entry.name,
            entry.slide,
            entry.split,
            image,
            entry.mpp,
            xy,
            nuclei.label,
            nuclei.score,
            entry.origin,
            entry.context,
        )

    def _pixels(self, entry: Entry) -> NDArray[np.uint8]:
        return read_image(entry.image)

    @abstractmethod
    def _nuclei(self, entry: Entry, width: int, height: int) -> Points:
        """Read the nuclei of an image of ``width`` x ``height`` px; all must lie inside it."""

    def _inside(self, nuclei: Points, width: int, height: int, path: Path) -> Points:
        """Drop nuclei whose centre lies outside the image: outlines may cross its border.

        Raises:
            UserError: too many lie outside, so the coordinates must belong to something else.
        """
        area, expected = f"the image of {width} x {height} px", "pixels of the image, not of the slide it was cut from"
        kept, outside = drop_outside(nuclei, (0, 0, width, height), path, area, expected)
        if outside:
            self.dropped["nucleus outside its image"] += outside
        return kept


class _HasNuclei(Protocol):
    @property
    def xy(self) -> Sized: ...


_Image = TypeVar("_Image", bound=_HasNuclei)


def read_splits(
    source: Source, splits: Sequence[str], make: Callable[[SourceImage], _Image]
) -> dict[str, list[_Image]]:
    """Read the images of each of ``splits``, convert them with ``make`` and keep the results; "" means all images.

    Raises:
        UserError: a split has no images or no nuclei, or ``make`` raises it.
    """
    found: dict[str, list[_Image]] = {split: [] for split in splits}
    seen: Counter[str] = Counter()
    for item in source:
        seen[item.split] += 1
        wanted = [split for split in splits if split in ("", item.split)]
        if wanted:
            image = make(item)
            for split in wanted:
                found[split].append(image)
    counts = ", ".join(f"{count} in {split or 'no split'}" for split, count in sorted(seen.items()))
    for split, images in found.items():
        if not images:
            raise UserError(f"no image in the split {split!r}; the source has {counts or 'no images'}")
        if not any(len(image.xy) for image in images):
            raise UserError(f"the {len(images)} images of the split {split!r} contain no nuclei")
    return found


def list_images(folder: Path) -> list[Path]:
    """List the image files of a folder by name, without pictures that the package has drawn.

    Raises:
        UserError: the folder contains no images.
    """
    images = [path for path in find_files(folder, "*") if path.suffix.lower() in IMAGE_SUFFIXES and not is_drawn(path)]
    if not images:
        raise UserError(f"{folder} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    return images


def pair_files(images: Path, labels: Path, suffix: str) -> list[tuple[Path, Path]]:
    """Pair each image of one folder with the file ``STEM`` + ``suffix`` of another folder.

    Raises:
        UserError: a file has no partner.
    """
    pairs = [(path, labels / f"{path.stem}{suffix}") for path in list_images(images)]
    found = {path.name for path in iter_files(labels, f"*{suffix}")}
    for image, label in pairs:
        if label.name not in found:
            raise UserError(f"{label} is missing, the labels of {image}")
    if extra := sorted(found - {label.name for _, label in pairs}):
        raise UserError(f"{labels / extra[0]}: {images} has no image of that name")
    return pairs


def find_mpp(folder: Path, images: Sequence[Path], mpp: float | None) -> Iterator[MppRow]:
    """Yield um per pixel, slide and split of each image of a folder: its row of ``mpp.csv``, or else ``mpp``, no split.

    Without a slide in its row, an image counts as a slide of its own.

    Raises:
        UserError: neither the table nor ``mpp`` gives the um per pixel, or the table lists something else.
    """
    tables = MppTables()
    found = [tables.find(image, folder) for image in images]
    for table in tables.tables():
        for number, name in table.unused():
            raise UserError(f"{table.path}, row {number}: there is no file {name!r} in {folder}")
    for image, row in zip(images, found, strict=True):
        known = row.mpp if row else mpp
        if known is None:
            raise UserError(f"{image}: um per pixel unknown; give mpp=NUMBER or list the image in mpp.csv (image,mpp)")
        yield MppRow(known, (row.slide if row else "") or image.stem, row.split if row else "")


def put_in_split(split_of: dict[str, str], name: str, split: str, where: str) -> None:
    """Record in ``split_of`` that the list at ``where`` puts ``name`` into ``split``.

    Raises:
        UserError: ``name`` is in a split already.
    """
    if name in split_of:
        raise UserError(f"{where}: {name} is also listed in the split {split_of[name]}")
    split_of[name] = split


def require_file(path: Path, hint: str) -> Path:
    """Return ``path``.

    Raises:
        UserError: it is not a file; ``hint`` says what was expected.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; {hint}")
    return path


def mpp_setting(default: float | None = None) -> Any:
    """Declare the option ``mpp`` of a source, um per pixel."""
    low, high = MPP_RANGE
    return setting(default, ge=low, le=high)


def split_names(kind: str, text: str, parts: Sequence[str]) -> dict[str, str]:
    """Assign a split to each of ``parts``, from one name per part such as ``train,val,test``.

    Raises:
        UserError: the number of names differs from the number of parts.
    """
    names = split_list(text)
    if len(names) != len(parts):
        raise UserError(
            f"{kind}: splits={text} has {len(names)} names, expected one for each of {', '.join(parts)}, "
            f"such as splits={','.join((*SPLITS, *'abcdefgh')[: len(parts)])}"
        )
    return dict(zip(parts, names, strict=True))
