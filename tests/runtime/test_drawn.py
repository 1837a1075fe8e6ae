"""Pictures of the package are recognised by a mark inside the file, not by their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images.drawing import Sheet
from muse_fast.images.slide import find_slides
from muse_fast.runtime.drawn import is_drawn, save_drawn
from muse_fast.sources.base import list_images

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_the_mark_does_not_change_the_picture(tmp_path: Path, suffix: str) -> None:
    picture, drawn, image = Image.fromarray(PIXELS), tmp_path / f"drawn{suffix}", tmp_path / f"image{suffix}"
    save_drawn(picture, drawn)
    picture.save(image)
    assert (np.asarray(Image.open(drawn)) == np.asarray(Image.open(image))).all()
    assert is_drawn(drawn) and not is_drawn(image)
    assert is_drawn(drawn.rename(tmp_path / f"b{suffix.upper()}"))
    image.write_bytes(b"")
    assert not is_drawn(image)


def test_folders_with_pictures(tmp_path: Path) -> None:
    """Only images are found, also one that has the name of a picture."""
    Sheet(30, 20).save(tmp_path / "atlas.png")
    (tmp_path / "a").mkdir()
    save_drawn(Image.fromarray(PIXELS), tmp_path / "a" / "thumbnail.jpg", quality=90)
    for find in (lambda folder: find_slides(folder, images=True), list_images):
        with pytest.raises(UserError, match="contains no "):
            find(tmp_path)
    Image.fromarray(PIXELS).save(tmp_path / "overview.png")
    assert find_slides(tmp_path, images=True) == list_images(tmp_path) == [tmp_path / "overview.png"]
    assert find_slides(tmp_path / "atlas.png", images=True) == [tmp_path / "atlas.png"]  # if it is asked for
