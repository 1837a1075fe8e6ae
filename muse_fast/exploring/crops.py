"""Crops of nuclei, read from their slides."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.exploring.vectors import VectorFile
from muse_fast.images.slide import Slide, open_slide
from muse_fast.runtime.names import text_of

_MISSING = (225, 225, 225)  # grey in place of a crop that cannot be read


class Crops(NamedTuple):
    """Pictures of nuclei, and why some could not be read, by slide."""

    pictures: list[Image.Image]
    problems: dict[str, str]


def open_slide_of(file: VectorFile, folder: Path | None = None) -> Slide:
    """Open the slide whose nuclei are in ``file``.

    Args:
        folder: where the slides are now; None: where they were.

    Raises:
        UserError: it is not there or cannot be read; names the file.
    """
    recorded = Path(file.record["slide_path"])
    path = folder / recorded.name if folder else recorded
    if not path.exists():
        raise UserError(f"{text_of(path)}: no such slide; if the slides have moved, give their folder as --slides DIR")
    return open_slide(path, file.slide_mpp)


def read_crops(
    files: Sequence[VectorFile],
    file_of: NDArray[np.int64],
    xy: NDArray[np.float64],
    um: float,
    side: int,
    folder: Path | None = None,
) -> Crops:
    """Squares of ``um`` micrometres around nuclei, as pictures of ``side`` pixels; white outside the slide.

    Every slide is opened once. A crop that cannot be read is grey.

    Args:
        file_of: ``[n]``, which of ``files`` each nucleus is from.
        xy: ``[n, 2]``, level-0 pixels.
        folder: see `open_slide_of`.
    """
    pictures = [Image.new("RGB", (side, side), _MISSING) for _ in xy]
    problems: dict[str, str] = {}
    for number in np.unique(file_of).tolist():
        file = files[number]
        half = um / file.slide_mpp / 2
        try:
            with closing(open_slide_of(file, folder)) as slide:
                for index in np.flatnonzero(file_of == number).tolist():
                    x, y = xy[index].tolist()
                    try:
                        pixels = slide.resized((x - half, y - half, x + half, y + half), (side, side))
                    except UserError as error:  # damage here; other parts can still be read
                        problems[file.slide] = str(error)
                        continue
                    pictures[index] = Image.fromarray(pixels)
        except UserError as error:
            problems[file.slide] = str(error)
    return Crops(pictures, problems)
