"""Pictures that the package draws for people, marked so that no command takes them for slides or images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

_MARK = "drawn by muse_fast"
_BEGINNING = 1024  # bytes of a file in which the mark is


def save_drawn(picture: Image.Image, path: Path, **settings: Any) -> None:
    """Write a marked PNG or JPEG, by the suffix of ``path``; ``settings`` are Pillow's."""
    if path.suffix == ".png":
        notes = PngInfo()
        notes.add_text("Comment", _MARK)
        picture.save(path, "PNG", pnginfo=notes, **settings)
    else:
        picture.save(path, "JPEG", comment=_MARK.encode(), **settings)


def is_drawn(path: Path) -> bool:
    """Whether `save_drawn` wrote this file, whatever its name is now."""
    if path.suffix.lower() not in (".png", ".jpg"):
        return False
    try:
        with open(path, "rb") as file:
            return _MARK.encode() in file.read(_BEGINNING)
    except OSError:  # whoever reads the image says what is wrong with it
        return False
