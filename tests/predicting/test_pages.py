"""Pages at other um per pixel: every pixel is in its place, whichever level and piece it is read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images.slide import ImageSlide, Lost
from muse_fast.predicting.pages import PageFile, Scale, find_pages
from muse_fast.runtime.drawn import save_drawn
from tests.support.planted import DotDetector, assert_same_places, page_of_dots, scattered, write_pyramid

WIDTH, HEIGHT = 2003, 1507  # not multiples of a factor: 4 x 500 px are 3 px short


@pytest.fixture(scope="module")
def dots() -> np.ndarray:
    return scattered(WIDTH, HEIGHT, 60)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory, dots: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("pages") / "dots.tif"
    return write_pyramid(path, page_of_dots(WIDTH, HEIGHT, dots, 5.0), 0.25, (4, 8))


@pytest.mark.parametrize("mpp", [0.2, 0.25, 0.253, 0.3, 0.5, 0.8, 0.99, 1.0, 1.7, 2.0])
def test_dots_are_found_to_half_a_pixel(slide: Path, dots: np.ndarray, mpp: float) -> None:
    page = PageFile(slide, None).open()
    scale = Scale(page, mpp)
    assert (scale.mpp == pytest.approx(mpp)) == (mpp not in (0.253, 0.99))
    image = scale.read(page, 0, 0, scale.width, scale.height, Lost())
    found = DotDetector(mpp)._detect(255.0 - image[..., 0]).xy * scale.step
    assert_same_places(found, dots, 0.5)


def test_the_level_is_fine_enough(slide: Path) -> None:
    page = PageFile(slide, None).open()
    steps = {mpp: Scale(page, mpp) for mpp in (0.25, 0.9, 0.99, 1.01, 1.9, 1.98)}
    assert [steps[mpp]._number for mpp in steps] == [0, 0, 1, 1, 1, 2]
    assert steps[0.99].step == steps[1.01].step == (4.0, 4.0)  # not 2003 / 500
    assert steps[1.98].step == (8.0, 8.0)
    assert (steps[0.9].width, steps[0.9].height) == (556, 418)


@pytest.mark.parametrize("mpp", [0.14, 0.25, 0.37, 1.0, 1.3])
def test_pieces_agree_with_the_whole(slide: Path, mpp: float) -> None:
    page = PageFile(slide, None).open()
    scale = Scale(page, mpp)
    whole = scale.read(page, 0, 0, scale.width, scale.height, Lost()).astype(int)
    for x, y, side in ((0, 0, 100), (37, 91, 64), (scale.width - 90, scale.height - 90, 90), (50, scale.height - 1, 1)):
        piece = scale.read(page, x, y, side, side, Lost())
        # Rounding in the filter. In a coarser level OpenSlide places pixels at whole level-0 pixels, and blurs between.
        assert np.abs(piece - whole[y : y + side, x : x + side]).max() <= (1 if scale._number == 0 else 16)


def test_an_image_is_read_like_a_slide(slide: Path, tmp_path: Path) -> None:
    opened = PageFile(slide, None).open()
    pixels = opened.read(0, 0, WIDTH, HEIGHT)
    Image.fromarray(pixels).save(tmp_path / "dots.png")
    image = PageFile(tmp_path / "dots.png", 0.25).open()
    assert isinstance(image, ImageSlide)
    assert (image.width, image.height) == (WIDTH, HEIGHT)
    for place in ((0, 0, 50, 60), (-20, -30, 70, 40), (1990, 1500, 40, 40), (3000, 10, 5, 5)):
        np.testing.assert_array_equal(image.read(*place), opened.read(*place))
    difference = image.thumbnail(8.0).astype(int) - opened.thumbnail(8.0)
    assert difference.shape == (48, 63, 3)
    assert np.abs(difference).mean() < 4  # a slide's is from its coarsest level, which is 3 px short


def test_kinds_of_files(tmp_path: Path, slide: Path) -> None:
    Image.new("RGB", (64, 64), "white").save(tmp_path / "plain.tif")  # in strips, which OpenSlide does not read
    assert isinstance(PageFile(tmp_path / "plain.tif", 0.5).open(), ImageSlide)
    with pytest.raises(UserError, match=r"plain.tif: the header does not give um per pixel; give mpp=NUMBER or list"):
        PageFile(tmp_path / "plain.tif", None).open()
    (tmp_path / "broken.svs").write_bytes(b"not a slide")
    with pytest.raises(UserError, match=r"broken.svs: OpenSlide cannot read it"):
        PageFile(tmp_path / "broken.svs", None).open()
    with pytest.raises(UserError, match=r"dots.tif: 0.25 um/px is too coarse .* works at 0.12, expected at most 0.24"):
        Scale(PageFile(slide, None).open(), 0.12)


def test_um_per_pixel_come_from_the_table_then_the_option(tmp_path: Path) -> None:
    for name in ("a.png", "deep/b.png", "deep/c.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    save_drawn(Image.new("RGB", (8, 8)), tmp_path / "deep" / "overlay.png")
    (tmp_path / "mpp.csv").write_text("image,mpp\na.png,0.3\ndeep/b.png,0.4\n")
    found = {page.path.relative_to(tmp_path).as_posix(): page.mpp for page in find_pages([tmp_path], 0.5)[0]}
    assert found == {"a.png": 0.3, "deep/b.png": 0.4, "deep/c.jpg": 0.5}
    pages, without_effect = find_pages([tmp_path / "a.png", tmp_path / "a.png"], None)
    assert pages == [PageFile(tmp_path / "a.png", 0.3, listed=True)]
    assert without_effect == [f"{tmp_path / 'mpp.csv'}: 1 of 2 rows match no slide or image: deep/b.png (row 3)"]
    with pytest.raises(UserError, match=r"absent: no such file or folder"):
        find_pages([tmp_path / "absent"], None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty contains no slides or images"):
        find_pages([tmp_path / "empty"], None)
