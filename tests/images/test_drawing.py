"""Dots on nuclei, and sheets that are written atomically."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast.images.drawing import PALETTE, Sheet, overlay


def test_overlay_draws_a_dot_of_its_class_on_every_nucleus() -> None:
    image = np.full((40, 60, 3), 120, np.uint8)
    xy = np.array([[10.5, 20.5], [40.5, 5.5], [50.5, 30.5]], np.float32)
    picture = np.asarray(overlay(image, xy, np.array([0, 2, -1])))
    assert picture.shape == image.shape
    assert tuple(picture[20, 10]) == PALETTE[0]
    assert tuple(picture[5, 40]) == PALETTE[2]
    assert tuple(picture[30, 50]) == (150, 150, 150)
    assert tuple(picture[38, 2]) == (120, 120, 120)
    assert (image == 120).all()


def test_a_failed_save_leaves_no_partial_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_half(self: Image.Image, target: Path, *arguments: object, **options: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", save_half)
    with pytest.raises(OSError, match="no space"):
        Sheet(20, 20).save(tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []
