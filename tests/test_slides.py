"""Whole slides: um per pixel, tissue, the grid, and nuclei that do not depend on the grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast.data import slides
from muse_fast.data.detect_nuclei import detect_nuclei
from muse_fast.data.slides import MASK_UM, Slide, tissue_mask
from muse_fast.data.sources import open_source
from muse_fast.data.synthetic import synthetic_image
from muse_fast.errors import UserError

pytest.importorskip("openslide")
tifffile = pytest.importorskip("tifffile")


@pytest.fixture(scope="session")
def tissue() -> np.ndarray:
    """1500 x 1100 px at 0.5 um: glass with a piece of synthetic tissue of 1024 px at x 300, y 40."""
    page = np.full((1100, 1500, 3), 245, np.uint8)
    page[40:1064, 300:1324] = synthetic_image(0, 1024, 0.5)[0]
    return page


def write_slide(path: Path, image: np.ndarray, mpp: float | tuple[float, float] | None = 0.5) -> Path:
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    tags = {} if x is None or y is None else {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image, tile=(256, 256), photometric="rgb", **tags)
    return path


@pytest.fixture
def slide(tmp_path: Path, tissue: np.ndarray) -> Path:
    return write_slide(tmp_path / "slide.tif", tissue)


# --------------------------------------------------------------------------------------------------- um per pixel


def test_mpp_comes_from_option_then_table_then_header(slide: Path) -> None:
    def mpp(**options: float) -> float:
        return next(iter(open_source(f"wsi:{slide}", roi_um=128, **options))).mpp

    assert mpp() == 0.5
    (slide.parent / "mpp.csv").write_text("image,mpp,slide,split\nslide.tif,0.55,S1,val\n")
    assert mpp() == 0.55
    first = next(iter(open_source(f"wsi:{slide}", roi_um=128)))
    assert (first.slide, first.split) == ("S1", "val")
    assert mpp(mpp=0.45) == 0.45


@pytest.mark.parametrize(
    ("mpp", "message"),
    [
        (None, r"does not tell um per pixel; give mpp=NUMBER or list the slide in mpp.csv"),
        (352.8, r"openslide.mpp in the header is '352.*', expected um per pixel, 0.05 to 5"),  # 72 dpi
        ((0.5, 0.6), r"pixels are 0.5 x 0.6 um, expected squares"),
    ],
)
def test_a_header_without_a_usable_mpp_is_refused(
    tmp_path: Path, tissue: np.ndarray, mpp: object, message: str
) -> None:
    write_slide(tmp_path / "bad.tif", tissue[:300, :300], mpp)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"bad\.tif: .*{message}"):
        open_source(f"wsi:{tmp_path}")


def test_all_bad_slides_are_told_at_once(slide: Path, tissue: np.ndarray) -> None:
    write_slide(slide.parent / "nothing.tif", tissue[:300, :300], None)
    (slide.parent / "broken.svs").write_bytes(b"no slide")
    with pytest.raises(UserError) as caught:
        open_source(f"wsi:{slide.parent}")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "broken.svs: OpenSlide cannot read it" in lines[0]
    assert "nothing.tif: the header does not tell" in lines[1]


def test_real_slides(shared_data: Path) -> None:
    assert Slide(shared_data / "wsi" / "cmu-1-small-region.svs").mpp == 0.499
    without = shared_data / "wsi" / "tcga-cr-7395-01a-01-ts1.svs"
    with pytest.raises(UserError, match=r"tcga-cr-7395-01a-01-ts1\.svs: the header does not tell um per pixel"):
        open_source(f"wsi:{without}")
    first = next(iter(open_source(f"wsi:{without}", mpp="1.0", roi_um="256")))
    assert first.mpp == 1.0
    assert first.image.shape == (256, 256, 3)


def test_a_roi_too_large_to_hold_is_refused(slide: Path) -> None:
    with pytest.raises(UserError, match=r"slide.tif: roi_um=4096 is 40960 px, expected 16384 at most"):
        open_source(f"wsi:{slide}", mpp=0.1, roi_um=4096)


def test_no_slide(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_source(f"wsi:{tmp_path / 'absent'}")
    with pytest.raises(UserError, match="holds no slide"):
        open_source(f"wsi:{tmp_path}")


# ---------------------------------------------------------------------------------------------------------- tissue


def test_tissue_mask_finds_the_tissue(slide: Path) -> None:
    mask = tissue_mask(Slide(slide).thumbnail(MASK_UM), MASK_UM)
    assert mask.shape == (69, 94)  # ceil(1100 / 16), ceil(1500 / 16)
    true = np.zeros(mask.shape, bool)
    true[3:66, 19:83] = True
    assert (mask != true).mean() < 0.06  # the rim of one mask pixel is 4 %


def test_tissue_mask_at_the_extremes(tissue: np.ndarray) -> None:
    noise = np.random.default_rng(0).integers(-2, 3, (60, 60, 3))
    assert not tissue_mask((243 + noise).astype(np.uint8), 8.0).any()  # all glass
    assert not tissue_mask(np.full((60, 60, 3), 255, np.uint8), 8.0).any()
    assert not tissue_mask((4 + noise).astype(np.uint8), 8.0).any()  # black pen
    full = np.asarray(Image.fromarray(tissue[40:1064, 300:1324]).resize((64, 64), Image.Resampling.BOX))
    assert tissue_mask(full, 8.0).mean() > 0.95  # all tissue
    speck = np.full((60, 60, 3), 250, np.uint8)
    speck[10:13, 10:13] = (200, 90, 150)
    assert not tissue_mask(speck, 8.0).any()


def test_a_thumbnail_in_bands_is_the_thumbnail(
    slide: Path, tissue: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Slide(slide).thumbnail(MASK_UM)
    monkeypatch.setattr(slides, "_BAND_PIXELS", 100_000)
    np.testing.assert_array_equal(Slide(slide).thumbnail(MASK_UM), whole)
    mean = tissue[16:32, 320:336].reshape(-1, 3).mean(0)  # the 16 x 16 px under mask pixel (20, 1)
    np.testing.assert_allclose(whole[1, 20], mean, atol=1)


# ------------------------------------------------------------------------------------------------------------ ROIs


def test_rois_are_pixels_of_the_slide(slide: Path, tissue: np.ndarray) -> None:
    source = open_source(f"wsi:{slide}", roi_um="100")
    items = list(source)
    assert len(items) > 10
    for item in items:
        x, y = item.origin
        assert x % 200 == y % 200 == 0
        np.testing.assert_array_equal(item.image, tissue[y : y + 200, x : x + 200])
        assert ((item.xy >= 0) & (item.xy < 200)).all()
        assert len(item.xy) >= 20
        assert item.score is not None
        assert item.score.shape == (len(item.xy),)
        assert (item.slide, item.name) == ("slide", f"slide_{x}_{y}")
    assert len(items) + source.dropped.total() == 7 * 5


def test_nuclei_do_not_depend_on_the_grid(slide: Path, tissue: np.ndarray) -> None:
    """Those of all ROIs together are those of one detection on the whole, at ROI borders too."""
    source = open_source(f"wsi:{slide}", roi_um="100", min_tissue="0", min_nuclei="0")
    together = np.concatenate([item.xy + item.origin for item in source])
    whole, _ = detect_nuclei(tissue, 0.5)
    whole = whole[(whole < [1400, 1000]).all(axis=1)]
    assert len(whole) > 500
    assert {tuple(p) for p in together.tolist()} == {tuple(p) for p in whole.tolist()}


def test_workers_change_nothing(slide: Path) -> None:
    alone = list(open_source(f"wsi:{slide}", roi_um=200))
    shared = list(open_source(f"wsi:{slide}", roi_um=200, workers=2))
    assert [item.name for item in alone] == [item.name for item in shared]
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.xy, other.xy)


def test_limits_drop_and_count(slide: Path) -> None:
    source = open_source(f"wsi:{slide}", roi_um=100, min_tissue=0.99, min_nuclei=10**6)
    assert list(source) == []
    assert set(source.dropped) == {"too little tissue", "too few nuclei"}
    assert source.dropped.total() == 35


def test_a_slide_smaller_than_a_roi_gives_none(slide: Path) -> None:
    assert list(open_source(f"wsi:{slide}", roi_um=2048)) == []


def test_unreadable_tiles_are_counted_and_bounded(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = Slide.read, []

    def failing(self: Slide, x: int, y: int, *size: int) -> np.ndarray:
        calls.append((x, y))
        if len(calls) in (3, 4):  # the first call is the thumbnail
            raise UserError("broken tile")
        return read(self, x, y, *size)

    everything = {"roi_um": 100, "min_tissue": 0, "min_nuclei": 0}
    monkeypatch.setattr(Slide, "read", failing)
    source = open_source(f"wsi:{slide}", **everything)
    assert len(list(source)) == 33
    assert source.dropped == {"unreadable": 2}
    calls.clear()
    monkeypatch.setattr(slides, "_MAX_UNREADABLE", 1)
    with pytest.raises(UserError, match=r"broken tile; 2 ROIs of it cannot be read"):
        list(open_source(f"wsi:{slide}", **everything))


def test_a_damaged_slide_keeps_its_good_rois(tmp_path: Path, tissue: np.ndarray) -> None:
    """OpenSlide bars a handle after an error; the slide is opened anew and the rest is read."""
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path, tissue, tile=(256, 256), photometric="rgb", compression="zlib", resolution=(2e4, 2e4), resolutionunit=3
    )
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[-2]
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    slide = Slide(path)
    with pytest.raises(UserError, match=r"slide.tif: unreadable at 1100, 1050, level 0 \("):
        slide.read(1100, 1050, 20, 20)
    np.testing.assert_array_equal(slide.read(300, 300, 50, 50), tissue[300:350, 300:350])
    with pytest.raises(UserError, match=r"slide.tif: unreadable at 0, \d+"):  # what the mask is made of
        list(open_source(f"wsi:{path}"))
