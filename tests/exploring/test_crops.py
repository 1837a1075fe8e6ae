from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.exploring.crops import open_slide_of, read_crops
from muse_fast.exploring.vectors import VectorFile, open_vectors
from tests.support.vector_files import MPP, draw_slide, write_vectors

XY = np.array([[30.0, 30], [200, 100], [398, 100]])
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])


@pytest.fixture
def files(tmp_path: Path) -> list[VectorFile]:
    """Three nuclei on each of two slides; the second slide has other colours."""
    for name, colours in (("a", COLOURS), ("b", 255 - COLOURS)):
        write_vectors(tmp_path / f"{name}.h5ad", np.eye(3), XY)
        draw_slide(tmp_path / f"{name}.png", XY, colours)
    return open_vectors([tmp_path / "a.h5ad", tmp_path / "b.h5ad"])


def test_the_nucleus_is_in_the_middle_of_its_crop(files: list[VectorFile]) -> None:
    """Crops come in the given order; 24 um are 48 px here, shown as 24: the square of 12 px becomes 6."""
    file_of, which = np.array([1, 0, 0, 1]), [0, 2, 1, 0]
    crops = read_crops(files, file_of, XY[which], um=24, side=24)
    assert crops.problems == {}
    expected = [255 - COLOURS[0], COLOURS[2], COLOURS[1], 255 - COLOURS[0]]
    for picture, colour in zip(crops.pictures, expected, strict=True):
        pixels = np.asarray(picture)
        assert pixels.shape == (24, 24, 3)
        np.testing.assert_array_equal(pixels[11, 11], colour)
        assert (pixels[:8] == 255).all() and (pixels[16:] == 255).all() and (pixels[:, :8] == 255).all()
        square = (np.abs(pixels.astype(int) - colour) < 128).all(axis=2)
        assert square.sum() == (36 if colour is not expected[1] else 6 * 4)  # cut off where the slide ends, white


def test_no_nuclei(files: list[VectorFile]) -> None:
    assert read_crops(files, np.zeros(0, int), np.zeros((0, 2)), 24, 24) == ([], {})


def test_a_slide_that_has_moved(files: list[VectorFile], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "a.png").rename(moved / "a.png")
    with pytest.raises(UserError, match=r"a\.png: no such slide; .* --slides DIR"):
        open_slide_of(files[0])
    crops = read_crops(files, np.array([0, 1]), XY[:2], 24, 24)
    assert list(crops.problems) == ["a"]
    assert [len(np.unique(np.asarray(picture))) > 1 for picture in crops.pictures] == [False, True]
    found = read_crops(files, np.array([0]), XY[:1], 24, 24, moved)
    assert found.problems == {} and tuple(np.asarray(found.pictures[0])[11, 11]) == (255, 0, 0)


def test_a_slide_that_cannot_be_read(files: list[VectorFile], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    crops = read_crops(files, np.array([0, 1]), XY[:2], 24, 24)
    assert list(crops.problems) == ["a"] and str(tmp_path / "a.png") in crops.problems["a"]


def test_damage_spoils_only_its_own_crops(tmp_path: Path) -> None:
    from tests.support.small_slides import damage, write_slide

    image = np.full((256, 512, 3), 200, np.uint8)
    path = write_slide(tmp_path / "s.tif", image, MPP, compression="zlib")
    damage(path, 0)
    places = np.array([[60.0, 60], [400, 100]])
    files = open_vectors([write_vectors(tmp_path / "s.h5ad", np.eye(2), places, slide_path=str(path))])
    crops = read_crops(files, np.zeros(2, int), places, 24, 24)
    assert list(crops.problems) == ["s"] and "unreadable" in crops.problems["s"]
    assert [int(np.asarray(picture)[12, 12, 0]) for picture in crops.pictures] == [225, 200]
