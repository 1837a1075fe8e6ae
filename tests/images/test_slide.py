"""A slide: um per pixel from its header, its overview, and damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images import slide as slide_module
from muse_fast.images.slide import find_slides, open_slide, slide_identity
from muse_fast.images.tissue import MASK_UM
from tests.support.dicom import write_series
from tests.support.small_slides import Mpp, damage, page_with_tissue, write_slide


@pytest.fixture(scope="module")
def page() -> np.ndarray:
    return page_with_tissue()


@pytest.fixture
def slide(tmp_path: Path, page: np.ndarray) -> Path:
    return write_slide(tmp_path / "slide.tif", page)


@pytest.mark.parametrize(
    ("mpp", "message"),
    [
        (None, r"does not give um per pixel; give mpp=NUMBER or list the file in mpp.csv"),
        (352.8, r"openslide.mpp in the header is '352.*', expected um per pixel, 0.05 to 5.0; give mpp=NUMBER or list"),
        ((0.5, 0.6), r"pixels are 0.5 x 0.6 um, expected squares"),
    ],
)
def test_a_header_without_a_usable_mpp_is_refused(tmp_path: Path, page: np.ndarray, mpp: Mpp, message: str) -> None:
    path = write_slide(tmp_path / "bad.tif", page[:300, :300], mpp)
    with pytest.raises(UserError, match=rf"bad\.tif: .*{message}"):
        open_slide(path)
    assert open_slide(path, 0.3).mpp == 0.3


def test_real_slides(shared_data: Path) -> None:
    assert open_slide(shared_data / "wsi" / "cmu-1-small-region.svs").mpp == 0.499
    with pytest.raises(UserError, match=r"tcga-cr-7395-01a-01-ts1\.svs: the header does not give um per pixel"):
        open_slide(shared_data / "wsi" / "tcga-cr-7395-01a-01-ts1.svs")


@pytest.mark.parametrize("scale", [0.8, 1.0, 3.1, 9.0])
def test_a_part_of_a_real_slide_of_two_levels_at_any_scale(shared_data: Path, scale: float) -> None:
    """Against level 0 as a whole, shrunk by Pillow: the other level was shrunk and compressed by other software."""
    slide = open_slide(shared_data / "wsi" / "tcga-cr-7395-01a-01-ts1.svs", mpp=0.5)
    field, size = (800.5, 600.25, 2600.5, 1500.25), (round(1800 / scale), round(900 / scale))
    found = slide.resized(field, size)
    level0 = Image.fromarray(slide.read(0, 0, slide.width, slide.height))
    expected = np.asarray(level0.resize(size, Image.Resampling.BICUBIC, box=field))
    error = np.abs(found.astype(int) - expected)
    assert found.shape == (size[1], size[0], 3) and expected.std() > 20
    assert error.mean() < (0.5 if scale < 2 else 6)
    shifted = np.abs(found[:, 1:].astype(int) - expected[:, :-1]).mean()
    assert error.mean() < shifted / 2  # an error of one pixel would show


def test_a_file_that_is_not_a_slide(tmp_path: Path) -> None:
    (tmp_path / "broken.svs").write_bytes(b"not a slide")
    with pytest.raises(UserError, match=r"broken.svs: OpenSlide cannot read it"):
        open_slide(tmp_path / "broken.svs")


def test_a_thumbnail_in_bands_is_the_thumbnail(slide: Path, page: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_slide(slide).thumbnail(MASK_UM)
    monkeypatch.setattr(slide_module, "_BAND_PIXELS", 100_000)
    np.testing.assert_array_equal(open_slide(slide).thumbnail(MASK_UM), whole)
    mean = page[16:32, 320:336].reshape(-1, 3).mean(0)  # the 16 x 16 px under mask pixel (20, 1)
    np.testing.assert_allclose(whole[1, 20], mean, atol=1)


def test_pixels_away_from_damage_can_be_read(tmp_path: Path, page: np.ndarray) -> None:
    """OpenSlide blocks a handle after an error; the slide is opened again and the rest can be read."""
    path = write_slide(tmp_path / "slide.tif", page, compression="zlib")
    damage(path, 9)  # of 6 columns: x 768 to 1023, y 256 to 511
    slide = open_slide(path)
    with pytest.raises(UserError, match=r"slide.tif: unreadable at 800, 300, level 0 \("):
        slide.read(800, 300, 20, 20)
    np.testing.assert_array_equal(slide.read(300, 300, 50, 50), page[300:350, 300:350])

    found, lost = slide.overview(MASK_UM)
    assert lost.boxes == [(768, 256, 1024, 512)] and "slide.tif: unreadable at 768, 256, level 0" in lost.reason
    grey = lost.mask(found.shape[:2], 16)
    assert grey.sum() == 16 * 16 and grey[16:32, 48:64].all()
    assert (found[grey] == found[20, 52]).all() and np.ptp(found[20, 52]) == 0 and 100 < found[20, 52, 0] < 200
    intact = open_slide(write_slide(tmp_path / "intact.tif", page)).thumbnail(MASK_UM)
    np.testing.assert_array_equal(found[~grey], intact[~grey])
    share = 256**2 / page.shape[0] / page.shape[1]
    np.testing.assert_array_equal(slide.overview(MASK_UM, share * 1.01).pixels, found)
    with pytest.raises(UserError, match=r"slide.tif: unreadable at .*; more than max_unreadable=0.03\d* of the slide"):
        slide.overview(MASK_UM, share * 0.99)


def test_slides_are_found_in_subfolders(tmp_path: Path) -> None:
    for name in ("b.svs", "deep/er/a.NDPI", ".hidden.svs", "notes.txt", "c.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.svs").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in find_slides(tmp_path)] == [
        "b.svs",
        "c.tiff",
        "deep/er/a.NDPI",
    ]
    assert find_slides(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]  # OpenSlide decides on a named file
    with pytest.raises(UserError, match="no such file or folder"):
        find_slides(tmp_path / "absent")
    with pytest.raises(UserError, match=r"folder.svs contains no slides"):
        find_slides(tmp_path / "folder.svs")


# -------------------------------------------------------------------------------------- slides of several files


def test_the_files_of_a_dicom_series_are_one_slide(tmp_path: Path, page: np.ndarray) -> None:
    part = page[:600, 200:1000]
    one, other = (write_series(tmp_path, name, part, 0.5, number) for number, name in enumerate("ab", start=1))
    assert find_slides(tmp_path) == [*one, *other]
    slide = open_slide(one[2])  # the label leads to the slide too
    assert (slide.width, slide.height, len(slide.levels)) == (800, 600, 2) and slide.mpp == pytest.approx(0.5)
    assert np.abs(slide.read(0, 0, 800, 600).astype(int) - part).mean() < 3  # JPEG
    assert len({slide_identity(path) for path in one}) == len({slide_identity(path) for path in other}) == 1
    assert slide_identity(one[0]) != slide_identity(other[0])


def test_copies_are_the_same_slide_and_others_are_not(tmp_path: Path, page: np.ndarray) -> None:
    slide = write_slide(tmp_path / "slide.tif", page[:300, 300:600])
    rescaled = write_slide(tmp_path / "rescaled.tif", page[:300, 300:600], 0.25)
    other = write_slide(tmp_path / "other.tif", page[300:600, 300:600])
    assert slide_identity(slide) == slide_identity(rescaled) != slide_identity(other)
    Image.fromarray(page[:64, :64]).save(tmp_path / "image.png")
    assert slide_identity(tmp_path / "image.png") is None  # not opened


def test_the_pictures_of_a_hamamatsu_slide_are_not_slides_of_their_own(tmp_path: Path, page: np.ndarray) -> None:
    picture = Image.fromarray(page[40:296, 300:812])
    picture.save(tmp_path / "s(0,0).jpg", quality=95, restart_marker_blocks=8)
    for name in ("s_map.jpg", "s_macro.jpg", "unrelated.jpg"):
        picture.resize((64, 32)).save(tmp_path / name, restart_marker_blocks=1)
    (tmp_path / "s.vms").write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nImageFile=s(0,0).jpg\n"
        "MapFile=s_map.jpg\nMacroImage=s_macro.jpg\nPhysicalWidth=256000\nPhysicalHeight=128000\nSourceLens=20\n"
    )
    assert find_slides(tmp_path, images=True) == [tmp_path / "s.vms", tmp_path / "unrelated.jpg"]
    slide = open_slide(tmp_path / "s.vms")
    assert (slide.width, slide.height, slide.mpp) == (512, 256, 0.5)
