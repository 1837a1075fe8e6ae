"""A new slide format needs only a reader: ROIs and nuclei are the same as from a TIFF with the same pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.images import slide as slides
from muse_fast.images.slide import Level, Slide, cut_block, find_slides, open_slide
from muse_fast.predict import main as predict
from muse_fast.sources import open_source
from tests.support.small_slides import page_with_tissue, write_slide


class NpySlide(Slide):
    """Pixels at 0.5 um/px in a NumPy file."""

    suffixes = (".npy",)

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pixels = np.load(path, mmap_mode="r")
        height, width, _ = self._pixels.shape
        self.levels = (Level(width, height, 1.0),)

    def header_mpp(self) -> float | None:
        return 0.5

    def read_stored(self, x: int, y: int, width: int, height: int, level: int) -> np.ndarray:
        if self._pixels[y, x].tolist() == [1, 2, 3]:
            raise UserError(f"{self.path}: unreadable at {x}, {y}")
        return cut_block(self._pixels, x, y, width, height)

    def close(self) -> None:
        del self._pixels


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The same slide in two formats, each in its own folder."""
    monkeypatch.setattr(slides, "READERS", [*slides.READERS, NpySlide])
    page = page_with_tissue(side=600, height=700, width=800)
    for suffix in ("tif", "npy"):
        (tmp_path / suffix).mkdir()
    write_slide(tmp_path / "tif" / "a.tif", page)
    np.save(tmp_path / "npy" / "a.npy", page)
    return {suffix: tmp_path / suffix for suffix in ("tif", "npy")}


def test_prepare_reads_it(folders: dict[str, Path]) -> None:
    options = {"roi_um": 100, "detector": "classical", "min_nuclei": 1, "workers": 0}
    expected, found = (list(open_source(f"wsi:{folders[suffix]}", **options)) for suffix in ("tif", "npy"))
    assert len(expected) >= 4
    assert [roi.origin for roi in found] == [roi.origin for roi in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.xy, other.xy)


def test_predict_reads_it(folders: dict[str, Path], tmp_path: Path) -> None:
    for suffix, folder in folders.items():
        assert predict(["--weights", "classical", "--out", str(tmp_path / f"out_{suffix}"), str(folder)]) == 0
    expected, found = ((tmp_path / f"out_{suffix}" / "a" / "cells.csv").read_text() for suffix in ("tif", "npy"))
    assert expected.count("\n") > 100
    assert found == expected


def test_it_is_found_and_its_damaged_parts_are_known(folders: dict[str, Path]) -> None:
    assert find_slides(folders["npy"]) == [folders["npy"] / "a.npy"]
    pixels = np.load(folders["npy"] / "a.npy")
    pixels[0, 0] = (1, 2, 3)
    np.save(folders["npy"] / "a.npy", pixels)
    slide = open_slide(folders["npy"] / "a.npy")
    with pytest.raises(UserError, match=r"a.npy: unreadable at 0, 0"):
        slide.overview(2.0, 0)
    overview = slide.overview(2.0)
    assert overview.lost.boxes == [(0, 0, 256, 256)]
    assert np.ptp(overview.pixels[:64, :64], axis=(0, 1)).tolist() == [0, 0, 0]
