"""``images:DIR[,DIR ...]``: folders of plain images without annotations, whose nuclei a detector finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from muse_fast.errors import UserError
from muse_fast.finders.learned import load_finder
from muse_fast.images.image_files import read_image
from muse_fast.images.mpp import MPP_RANGE, read_mpp_table
from muse_fast.sources.base import Source, SourceImage, list_images


class Images(Source):
    """Every image (png, jpg, tif) of the folders is a ROI and, unless ``mpp.csv`` says otherwise, a slide of its own.

    The um per pixel comes from ``mpp.csv`` of the folder (``image,mpp[,slide][,split]``), else from the option ``mpp``.
    """

    kind = "images"
    title = "a folder of plain images, whose nuclei are detected"
    options: ClassVar[dict[str, tuple[type, float, float]]] = {
        "mpp": (float, *MPP_RANGE),
        "min_nuclei": (int, 0, 1_000_000),
        "detector": (str, 0, 0),  # default, classical, resnet18 or a .safetensors file
        "threshold": (float, 0, 1),  # of the detector, in place of its own
    }

    def __init__(
        self,
        folders: str,
        mpp: float | None = None,
        min_nuclei: int = 20,
        detector: str = "default",
        threshold: float | None = None,
    ) -> None:
        super().__init__()
        self._detect, self._threshold, self._min_nuclei = load_finder(detector), threshold, min_nuclei
        self._images: dict[str, tuple[Path, float, str, str]] = {}  # by stem: file, um/px, slide, split
        for folder in folders.split(","):
            self._add(Path(folder), mpp)

    def _add(self, folder: Path, mpp: float | None) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; expected images:DIR or images:DIR,DIR")
        table = read_mpp_table(folder)
        for path in list_images(folder):
            if path.stem in self._images:
                raise UserError(f"{path}: {self._images[path.stem][0]} has the same stem, which names the ROI")
            row = table.get(path.name)
            known = row.mpp if row else mpp
            if known is None:
                raise UserError(
                    f"{path}: um per pixel unknown; give mpp=NUMBER or list the image in mpp.csv beside it (image,mpp)"
                )
            slide, split = (row.slide or path.stem, row.split) if row else (path.stem, "")
            self._images[path.stem] = path, known, slide, split

    def __len__(self) -> int:
        return len(self._images)

    def slides(self) -> Iterator[tuple[str, str]]:
        yield from ((slide, split) for _, _, slide, split in self._images.values())

    def __iter__(self) -> Iterator[SourceImage]:
        for path, mpp, slide, split in self._images.values():
            image = read_image(path)
            try:
                xy, score = self._detect(image, mpp, threshold=self._threshold)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            if len(xy) < self._min_nuclei:
                self.dropped["too few nuclei"] += 1
                continue
            yield SourceImage(path.name, slide, split, image, mpp, xy, None, score)
