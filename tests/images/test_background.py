"""Black and transparent areas are background to every reader and command; tissue never is."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial import KDTree

from muse_fast.finders.classical import detect_nuclei
from muse_fast.images import background
from muse_fast.images import slide as slides
from muse_fast.images.background import black, reach, whitened
from muse_fast.images.slide import Slide, open_slide
from muse_fast.images.synthetic import synthetic_image
from muse_fast.images.tissue import MASK_UM, tissue_mask
from muse_fast.predict import main as predict
from muse_fast.prepare import main as prepare
from muse_fast.sources import open_source
from tests.images.test_slide_reader import NpySlide
from tests.support.planted import write_pyramid
from tests.support.small_slides import damage, write_slide

# ------------------------------------------------------------------------------------------------------- the rule


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


def black_one_by_one(light: np.ndarray, run: int) -> np.ndarray:
    """The rule in its words: long straight runs, and fainter pixels that eight steps reach from them."""
    found = np.zeros(light.shape, bool)
    for lines, marks in ((light, found), (light.T, found.T)):
        for line, mark in zip(lines, marks, strict=True):
            for start in range(len(line) - run + 1):
                if (line[start : start + run] <= 16).all():
                    mark[start : start + run] = True
    for _ in range(8):
        before = found.copy()
        for y, x in np.argwhere((light <= 32) & ~before):
            found[y, x] = before[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].any()
    return found


def test_it_is_long_runs_and_their_fringe() -> None:
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 40), (40, 1), (23, 31), (40, 40), (40, 40)]
    for size in sizes:
        light = rng.choice([0, 16, 17, 32, 33, 200], size=size, p=[0.5, 0.2, 0.05, 0.2, 0.03, 0.02])
        expected = black_one_by_one(light, 5)
        np.testing.assert_array_equal(black(grey(light), 5.0), expected)  # 25 um are 5 px
        assert 40 in size or expected.any() or size == (1, 1)
    assert expected.any() and not expected.all()


def test_twenty_five_um() -> None:
    image = np.full((300, 300, 3), 200, np.uint8)
    image[100:199, 100:199] = 16
    assert not black(image, 0.25).any()  # 99 px are 24.75 um
    image[100:102, 100:200] = 16
    np.testing.assert_array_equal(np.unique(np.argwhere(black(image, 0.25)), axis=0)[[0, -1]], [[100, 100], [109, 198]])
    image[100:102, 100:200] = (17, 16, 16)
    assert not black(image, 0.25).any()
    np.testing.assert_array_equal(black(image, 30.0), (image <= 17).all(axis=2))  # a pixel is a run


def test_an_image_without_black_is_unchanged() -> None:
    image = synthetic_image(0, 200, 0.5)[0]
    same, areas = whitened(image, 0.5)
    assert same is image and not areas.any()


def test_real_tissue_has_none(shared_data: Path) -> None:
    """Pigment, folds and pyknotic nuclei among them; the darkest field of all has pixels of 8."""
    fields = [(path, 0.25) for path in sorted((shared_data / "kumar").glob("*.jpg"))[::3]]
    fields += [(path, 0.25) for path in sorted((shared_data / "mitos12").glob("A00_02*"))]
    fields += [(path, 0.5) for path in sorted((shared_data / "brcam2c" / "images").glob("*.png"))[::2]]
    assert len(fields) > 65
    dark = 0
    for path, mpp in fields:
        image = np.asarray(Image.open(path).convert("RGB"))
        dark += int((image <= background.BLACK).all(axis=2).sum())
        assert not black(image, mpp).any(), path
    assert dark > 600  # so it is not for want of dark pixels


def test_real_slides_are_read_as_openslide_shows_them(shared_data: Path) -> None:
    openslide = pytest.importorskip("openslide")
    for name, level in (("cmu-1-small-region.svs", 0), ("tcga-cr-7395-01a-01-ts1.svs", 1)):
        slide, other = open_slide(shared_data / "wsi" / name, 0.5), openslide.OpenSlide(shared_data / "wsi" / name)
        size = other.level_dimensions[level]
        expected = np.asarray(other.read_region((0, 0), level, size).convert("RGB"))
        found, unscanned = slide.read_scanned(0, 0, *size, level)
        np.testing.assert_array_equal(found, expected)
        assert not unscanned.any()


# ----------------------------------------------------------------------------------------- the pieces of an image


def padded(fill: int) -> np.ndarray:
    """Tissue at 0.5 um/px with its corner at 203, 140 in a frame of ``fill``."""
    page = np.full((640, 800, 3), fill, np.uint8)
    page[140:500, 203:643] = synthetic_image(1, 512, 0.5)[0][:360, :440]
    return page


def as_jpeg(page: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(page).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def test_a_pixel_does_not_depend_on_the_piece(tmp_path: Path) -> None:
    """Pieces smaller and larger than a run, at the border of the black, of a noisy page on two levels."""
    page = as_jpeg(padded(0), 60)
    rng = np.random.default_rng(0)
    page = np.where(rng.random(page.shape[:2])[..., None] < 0.002, np.uint8(90), page)  # holes in the black
    slide = open_slide(write_pyramid(tmp_path / "s.tif", page, 0.5, (2,)))
    assert len(slide.levels) == 2
    for level, factor in ((0, 1), (1, 2)):
        width, height = slide.levels[level][:2]
        whole, unscanned = slide.read_scanned(0, 0, width, height, level)
        stored = slide.read_stored(0, 0, width, height, level)[..., :3]
        np.testing.assert_array_equal(unscanned, black(stored, 0.5 * factor))
        np.testing.assert_array_equal(whole, np.where(unscanned[..., None], 255, stored))
        assert 0.3 < unscanned.mean() < 0.9
        for _ in range(40):
            x, y = int(rng.integers(0, width - 1)), int(rng.integers(0, height - 1))
            across, down = int(rng.integers(1, min(120, width - x) + 1)), int(rng.integers(1, min(120, height - y) + 1))
            piece, gaps = slide.read_scanned(x * factor, y * factor, across, down, level)
            np.testing.assert_array_equal(piece, whole[y : y + down, x : x + across])
            np.testing.assert_array_equal(gaps, unscanned[y : y + down, x : x + across])


def test_the_farthest_pixel_that_decides(tmp_path: Path) -> None:
    page = np.full((120, 220, 3), 90, np.uint8)
    page[60, 100:150], page[60, 150:159] = 16, 32  # a run of 25 um, and a fringe that is one pixel too long
    Image.fromarray(page).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png", 0.5)
    assert [slide.read(x, 60, 1, 1).max() for x in (99, 100, 157, 158)] == [90, 255, 255, 32]
    np.testing.assert_array_equal(slide.read(0, 60, 220, 1)[0, 98:160, 0], [90] * 2 + [255] * 58 + [32, 90])


def test_pixels_beside_damage_can_be_read(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tif", padded(0), compression="zlib")
    damage(path, 1)  # x 256 to 511, y 0 to 255
    slide = open_slide(path)
    found = slide.read(0, 0, 256, 256)  # black up to the damaged tile
    assert reach(0.5) == 58 and (found[:140] == 255).all() and (found[140:, 203:] < 255).any()


# ----------------------------------------------------------------------------------------------- the same nuclei


def write_all(folder: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the same tissue in white, in black and, if the format has it, transparent."""
    white, dark = padded(255), padded(0)
    clear = np.dstack([dark, np.zeros(dark.shape[:2], np.uint8)])
    clear[140:500, 203:643, 3] = 255
    pages = {"white": white, "black": dark, "clear": clear}
    folder.mkdir()
    if suffix == "npy":
        monkeypatch.setattr(slides, "READERS", [*slides.READERS, NpySlide])
    for name, page in pages.items():
        if suffix == "npy":
            np.save(folder / f"{name}.npy", page)
        elif suffix == "png":
            Image.fromarray(page).save(folder / f"{name}.png")
        else:
            extra = {"extrasamples": ["unassalpha"]} if page.shape[2] == 4 else {}
            write_slide(folder / f"{name}.tif", page, **extra)


@pytest.mark.parametrize("suffix", ["tif", "png", "npy"])
def test_predict_finds_the_same_nuclei(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path / "in", suffix, monkeypatch)
    out = tmp_path / "out"
    for tissue in ("true", "false") if suffix == "tif" else ("true",):
        words = ["--weights", "classical", "--out", str(out / tissue), str(tmp_path / "in"), "mpp=0.5", "tile=192"]
        assert predict([*words, f"tissue={tissue}"]) == 0
        white, *others = ((out / tissue / name / "cells.csv").read_text() for name in ("white", "black", "clear"))
        assert white.count("\n") > 100
        assert others == [white, white]
    white, *others = (
        np.asarray(Image.open(out / "true" / name / "overlay.png")) for name in ("white", "black", "clear")
    )
    for picture in others:
        np.testing.assert_array_equal(picture, white)


@pytest.mark.parametrize("quality", [50, 80])
def test_black_in_a_jpeg(tmp_path: Path, quality: int) -> None:
    """The JPEG itself changes the rim of the tissue, by the colour of what is beside it."""
    found = {}
    for name, fill in (("white", 255), ("black", 0)):
        path = tmp_path / f"{name}.jpg"
        Image.fromarray(padded(fill)).save(path, quality=quality)
        slide = open_slide(path, 0.5)
        page = slide.read(0, 0, slide.width, slide.height)
        outside = np.ones(page.shape[:2], bool)
        outside[140:500, 203:643] = False
        assert (page[outside] > 230).all(axis=1).mean() > 0.9995
        found[name] = detect_nuclei(page, 0.5)[0]
        mask = tissue_mask(slide.thumbnail(MASK_UM), MASK_UM)
        assert abs(mask.sum() * MASK_UM**2 / (360 * 440 / 4) - 1) < 0.1
    assert len(found["white"]) > 100
    for one, other in (("white", "black"), ("black", "white")):
        deep = ((found[one] > (207, 144)) & (found[one] < (639, 496))).all(axis=1)  # 2 um within the tissue
        assert deep.mean() > 0.9
        assert KDTree(found[other]).query(found[one][deep])[0].max() <= 1


# ----------------------------------------------------------------------------------------------------------- ROIs


def test_prepare_leaves_out_rois_with_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path / "in", "tif", monkeypatch)
    options = {"roi_um": 50, "min_tissue": 0, "min_nuclei": 1, "detector": "classical"}

    def rois(name: str, **more: object) -> tuple[dict, dict]:
        source = open_source(f"wsi:{tmp_path / 'in' / name}.tif", **options, **more)
        return {roi.origin: roi for roi in source}, source.dropped

    white, _ = rois("white")
    for name in ("black", "clear"):
        everything, dropped = rois(name, max_unscanned=1)
        assert everything.keys() == white.keys() and dropped["unscanned"] == 0
        for origin, roi in everything.items():
            np.testing.assert_array_equal(roi.image, white[origin].image)
            np.testing.assert_array_equal(roi.xy, white[origin].xy)
        # Squares of 100 px: rows 2 to 4 and columns 3 to 5 are all tissue, column 2 is 97 %, row 1 is 60 %.
        few, dropped = rois(name, max_unscanned=0.02)
        assert set(few) == {(x, y) for x in (300, 400, 500) for y in (200, 300, 400)}
        assert len(few) + dropped.total() == 6 * 8 and set(dropped) == {"unscanned"}
        some, _ = rois(name)
        assert set(some) == {(x, y) for x in (300, 400, 500) for y in (200, 300, 400)} | {
            (x, y) for x in (200,) for y in (200, 300, 400)
        }


def test_the_report_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path / "in", "tif", monkeypatch)
    words = ["roi_um=50", "min_tissue=0", "min_nuclei=1", "detector=classical", "workers=0"]
    assert prepare([f"wsi:{tmp_path / 'in'}", str(tmp_path / "set"), *words]) == 0
    with open(tmp_path / "set" / "report.csv", newline="") as file:
        rows = {row["slide"]: row for row in csv.DictReader(file)}
    assert int(rows["white"]["unscanned"]) == 0
    for name in ("black", "clear"):
        assert int(rows[name]["unscanned"]) == 48 - 12 and int(rows[name]["rois"]) == 12


def test_images_as_rois(tmp_path: Path) -> None:
    page = padded(0)[:, :643]
    tissue = page[140:500, 203:643]
    mostly, hardly = page[140:500].copy(), page[140:500, 180:643].copy()  # 32 % and 5 % black
    for name, image in (("whole", tissue), ("mostly", mostly), ("hardly", hardly)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    source = open_source(f"images:{tmp_path}", mpp=0.5, detector="classical")
    items = {item.name: item for item in source}
    assert set(items) == {"whole.png", "hardly.png"} and source.dropped == {"unscanned": 1}
    np.testing.assert_array_equal(items["hardly.png"].image[:, 23:], tissue)
    assert (items["hardly.png"].image[:, :23] == 255).all()


def test_every_reader_has_it() -> None:
    """`read` is the base class's alone."""
    for reader in (*slides.READERS, NpySlide):
        assert reader.read is Slide.read and reader.read_scanned is Slide.read_scanned
