"""``images:DIR[,DIR ...]``: folders of plain images without annotations, whose nuclei a detector finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from muse_fast.errors import UserError
from muse_fast.finders.learned import load_finder
from muse_fast.images.background import whitened
from muse_fast.images.image_files import read_image
from muse_fast.images.mpp import MppRow
from muse_fast.runtime.options import setting, split_list
from muse_fast.sources.base import Source, SourceImage, find_mpp, list_images, mpp_setting


class Images(Source):
    """Every image (png, jpg, tif) in the folders is a ROI and, unless ``mpp.csv`` says otherwise, a slide of its own.

    The um per pixel comes from the folder's ``mpp.csv`` (``image,mpp[,slide][,split]``), else from the option ``mpp``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Source.Options):
        mpp: float | None = mpp_setting()
        """Um per pixel of images without a row in ``mpp.csv``."""
        min_nuclei: int = setting(20, ge=0, le=1_000_000)
        """Images with fewer nuclei are skipped."""
        max_unscanned: float = setting(0.1, ge=0, le=1)
        """Images of which a larger share is black or transparent are skipped."""
        detector: str = "default"
        """Detector of nuclei: ``default``, ``classical``, ``resnet18`` or a .safetensors file."""
        threshold: float | None = setting(None, ge=0, le=1)
        """Threshold of the detector, instead of its default."""

    kind = "images"
    title = "a folder of plain images, whose nuclei are detected"

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        self._detect, self._options = load_finder(options.detector), options
        self._images: dict[str, tuple[Path, MppRow]] = {}  # by stem
        for folder in split_list(target):
            self._add(Path(folder))

    def _add(self, folder: Path) -> None:
        if not folder.is_dir():
            hint = r"a comma in a name is written \,"
            raise UserError(f"{folder} is not a folder; expected images:DIR or images:DIR,DIR ({hint})")
        images = list_images(folder)
        for path, row in zip(images, find_mpp(folder, images, self._options.mpp), strict=True):
            if path.stem in self._images:
                raise UserError(f"{path}: {self._images[path.stem][0]} has the same stem, which names the ROI")
            self._images[path.stem] = path, row

    def __len__(self) -> int:
        return len(self._images)

    def slides(self) -> Iterator[tuple[str, str]]:
        yield from ((row.slide, row.split) for _, row in self._images.values())

    def __iter__(self) -> Iterator[SourceImage]:
        for path, row in self._images.values():
            image, unscanned = whitened(read_image(path), row.mpp)
            if unscanned.mean() > self._options.max_unscanned:
                self.dropped["unscanned"] += 1
                continue
            try:
                found = self._detect(image, row.mpp, threshold=self._options.threshold)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            if len(found) < self._options.min_nuclei:
                self.dropped["too few nuclei"] += 1
                continue
            yield SourceImage(path.name, row.slide, row.split, image, row.mpp, found.xy, None, found.score)
