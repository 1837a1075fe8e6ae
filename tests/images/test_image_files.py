"""Pixels of image files: depth of values, grey and indexed colours, transparency, orientation and size."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images.image_files import image_size, read_image, read_stored
from muse_fast.images.slide import ImageSlide, OpenSlideSlide, open_slide
from muse_fast.images.synthetic import synthetic_image
from muse_fast.predict import main as predict
from tests.support.small_slides import tifffile


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return synthetic_image(0, 300, 0.5)[0][:200]


def write_png(path: Path, values: np.ndarray) -> Path:
    """Write ``[h, w, 3 or 4]`` uint16, which Pillow cannot."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(png(width, height, 16, {3: 2, 4: 6}[channels], zlib.compress(rows, 1)))
    return path


def png(width: int, height: int, bits: int, colours: int, pixels: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# ---------------------------------------------------------------------------------------------------- 16-bit values


@pytest.mark.parametrize("kind", ["png", "strips", "tiles", "zlib", "big-endian"])
def test_sixteen_bit_values(tmp_path: Path, rgb: np.ndarray, kind: str) -> None:
    """Against rounding in float64, for all values of 16 bits."""
    values = rgb.astype(np.uint16) * 257
    values[:100] = np.random.default_rng(0).integers(0, 65536, (100, 300, 3))
    path = tmp_path / "a.tif"
    if kind == "png":
        path = write_png(tmp_path / "a.png", values)
    else:
        tile = {"tile": (64, 64)} if kind == "tiles" else {}
        tifffile.imwrite(
            path, values, photometric="rgb", compression="zlib" if kind == "zlib" else None,
            byteorder=">" if kind == "big-endian" else "<", **tile,
        )  # fmt: skip
    expected = np.round(values / np.float64(65535) * 255)
    np.testing.assert_array_equal(read_image(path), expected)
    slide = open_slide(path, 0.5)
    assert isinstance(slide, ImageSlide)
    np.testing.assert_array_equal(slide.read(0, 0, 300, 200)[100:], rgb[100:])


def test_sixteen_bit_values_with_transparency(tmp_path: Path, rgb: np.ndarray) -> None:
    values = np.dstack([rgb.astype(np.uint16) * 257, np.full(rgb.shape[:2], 65535, np.uint16)])
    values[:, 150:, 3] = 0
    found = read_image(write_png(tmp_path / "a.png", values))
    np.testing.assert_array_equal(found[:, :150], rgb[:, :150])
    assert (found[:, 150:] == 255).all()


@pytest.mark.parametrize("tile", [None, (64, 64)])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_values_of_a_camera_need_their_range(
    tmp_path: Path, rgb: np.ndarray, bits: int, tile: tuple[int, int] | None
) -> None:
    values = np.round(rgb / 255 * (2**bits - 1)).astype(np.uint16)
    paths = [tmp_path / "plain.tif", tmp_path / "plain.png", tmp_path / "wrong.tif", tmp_path / "stated.tif"]
    write_png(paths[1], values)
    for path, stated in ((paths[0], None), (paths[2], 2**9 - 1), (paths[3], 2**bits - 1)):
        tags = [] if stated is None else [(341, "H", 3, (stated,) * 3, True)]
        tifffile.imwrite(path, values, photometric="rgb", tile=tile, extratags=tags)
    for path in paths[:3]:
        with pytest.raises(
            UserError, match=rf"{path.name}: 16 bits per value, but the brightest is \d+, .*: vips linear"
        ):
            open_slide(path, 0.5)
    np.testing.assert_array_equal(open_slide(paths[3], 0.5).read(0, 0, 300, 200), rgb)
    if bits == 12:
        with pytest.raises(UserError, match=r"1 of 1 inputs could not be used\n.*16 bits per value"):
            predict(["--weights", "classical", "--out", str(tmp_path / "o"), str(paths[0]), "mpp=0.5"])


def test_a_largest_value_that_occurs_is_not_a_range(tmp_path: Path, rgb: np.ndarray) -> None:
    """Programs write it into the same tag."""
    values = rgb.astype(np.uint16) * 257
    tag = [(341, "H", 3, (int(values.max()),) * 3, True)]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extratags=tag)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), rgb)


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_other_depths_are_refused(tmp_path: Path, rgb: np.ndarray, tile: tuple[int, int] | None) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, rgb.astype(np.float32) / 255, photometric="rgb", tile=tile)
    with pytest.raises(UserError, match=r"a.tif: .*a TIFF with 32 bits per value, expected 8- or 16-bit RGB"):
        open_slide(path, 0.5)
    tifffile.imwrite(
        path, rgb.astype(np.uint16).transpose(2, 0, 1) * 257, photometric="rgb", planarconfig="separate", tile=tile
    )
    with pytest.raises(UserError, match=r"a.tif: more than 8 bits per value in a layout that is not supported"):
        open_slide(path, 0.5)


def test_a_slide_of_sixteen_bits_that_only_openslide_could_read(tmp_path: Path, rgb: np.ndarray) -> None:
    path = tmp_path / "a.svs"
    tifffile.imwrite(path, rgb.astype(np.uint16) * 16, photometric="rgb", tile=(64, 64))
    with pytest.raises(
        UserError, match=r"a.svs: a TIFF with 16 bits per value, expected one picture in 8-bit RGB; convert .*vips"
    ):
        open_slide(path, 0.5)


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_every_tiff_of_eight_bits_is_read(tmp_path: Path, rgb: np.ndarray, bigtiff: bool, byteorder: str) -> None:
    import openslide

    path = tmp_path / "a.tif"
    tifffile.imwrite(path, rgb, photometric="rgb", tile=(64, 64), bigtiff=bigtiff, byteorder=byteorder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slide = open_slide(path, 0.5)
    assert isinstance(slide, OpenSlideSlide) == (openslide.OpenSlide.detect_format(path) is not None)
    np.testing.assert_array_equal(slide.read(0, 0, 300, 200), rgb)


# ------------------------------------------------------------------------------------------------ several pictures


def write_tiff(path: Path, *pages: np.ndarray, kinds: tuple[int, ...] = (), **how: object) -> Path:
    with tifffile.TiffWriter(path, bigtiff=bool(how.pop("big", False)), byteorder=how.pop("order", "<")) as file:
        for page, kind in zip(pages, kinds or (0,) * len(pages), strict=True):
            colours = "rgb" if page.ndim == 3 else "minisblack"
            file.write(page, photometric=colours, subfiletype=kind, metadata=None, **how)
    return path


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_a_stack_or_several_scenes_are_refused(tmp_path: Path, rgb: np.ndarray, tile: object) -> None:
    """Only the first page would be read, and the nuclei of the others would be missing without a word."""
    for pages in ([rgb] * 3, [rgb[:9, :9], rgb, rgb[:150]]):
        path = write_tiff(tmp_path / "a.tif", *pages, tile=tile)
        with pytest.raises(UserError, match=r"a.tif: 3 pictures in one file, expected one; .*vips copy 'IN\[page=0\]'"):
            open_slide(path, 0.5)
    for big, order in ((False, "<"), (True, "<"), (True, ">")):
        path = write_tiff(tmp_path / "a.svs", rgb, rgb, tile=(64, 64), big=big, order=order)
        with pytest.raises(UserError, match=r"a.svs: a TIFF with 2 pictures, expected one picture"):
            open_slide(path, 0.5)


@pytest.mark.parametrize("tile", [None, (64, 64)])
@pytest.mark.parametrize(("big", "order"), [(False, "<"), (False, ">"), (True, "<"), (True, ">")])
def test_copies_masks_and_labels_are_not_pictures(
    tmp_path: Path, rgb: np.ndarray, tile: object, big: bool, order: str
) -> None:
    half, label = rgb[::2, ::2].copy(), rgb[:60, :60].copy()
    pages, kinds = (rgb, rgb, half, rgb[..., 0] > 128, label), (0, 1, 1, 4, 0)
    path = write_tiff(tmp_path / "a.tif", *pages, kinds=kinds, tile=tile, big=big, order=order)
    if tile is None and big and order == ">":  # Pillow does not know it
        with pytest.raises(UserError, match=r"a.tif: not a readable image \(cannot identify"):
            open_slide(path, 0.5)
        return
    slide = open_slide(path, 0.5)
    np.testing.assert_array_equal(slide.read(0, 0, 300, 200), rgb)


@pytest.mark.parametrize("kind", ["png", "gif", "webp"])
def test_an_animation_is_refused(tmp_path: Path, rgb: np.ndarray, kind: str) -> None:
    frames = [Image.fromarray(rgb), Image.fromarray(rgb[::-1])]
    frames[0].save(tmp_path / "a.png", format=kind, save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"a.png: 2 pictures in one file"):
        read_image(tmp_path / "a.png")


# ---------------------------------------------------------------------------------------- grey and indexed colours


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "strips.tif", "tiles.tif", "sixteen.tif", "sixteen.png"])
def test_grey_is_refused(tmp_path: Path, rgb: np.ndarray, name: str) -> None:
    grey, path = rgb[..., 1].copy(), tmp_path / name
    if name.endswith("tif"):
        values = grey.astype(np.uint16) * 257 if name == "sixteen.tif" else grey
        tifffile.imwrite(path, values, photometric="minisblack", tile=None if name == "strips.tif" else (64, 64))
    else:
        Image.fromarray(grey.astype(np.uint16) * 257 if name == "sixteen.png" else grey).save(path)
    with pytest.raises(UserError, match=rf"{name}: its pixels are grey, .*recognised by colour"):
        open_slide(path, 0.5)


def test_indexed_colours(tmp_path: Path, rgb: np.ndarray) -> None:
    indexed = Image.fromarray(rgb).quantize(256)
    expected = np.asarray(indexed.convert("RGB"))
    colours = np.array(indexed.getpalette(), np.uint16).reshape(-1, 3).T
    assert np.abs(expected.astype(int) - rgb).mean() < 8
    indexed.save(tmp_path / "a.png")
    for name, tile, values in (
        ("strips", None, colours * 257),
        ("tiles", (64, 64), colours * 257),
        ("8", None, colours),
    ):
        tifffile.imwrite(
            tmp_path / f"{name}.tif", np.asarray(indexed), photometric="palette", colormap=values, tile=tile
        )
    for name in ("a.png", "strips.tif", "tiles.tif", "8.tif"):
        np.testing.assert_array_equal(open_slide(tmp_path / name, 0.5).read(0, 0, 300, 200), expected, name)
    assert isinstance(open_slide(tmp_path / "tiles.tif", 0.5), OpenSlideSlide)


def test_transparent_pixels_are_white(tmp_path: Path, rgb: np.ndarray) -> None:
    """Against the definition: colour x opacity + white x (1 - opacity)."""
    rgba = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    rgba[:, 100:200, 3], rgba[:, 200:, 3] = 64, 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    part = rgba[..., 3:].astype(np.float64) / 255
    np.testing.assert_allclose(read_image(tmp_path / "a.png"), rgb * part + 255 * (1 - part), atol=0.51)
    np.testing.assert_array_equal(read_stored(tmp_path / "a.png"), rgba)
    rgba[..., 3] = 0  # not transparency: nothing would be visible
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_stored(tmp_path / "a.png"), rgb)
    indexed = Image.fromarray(rgb).quantize(256)
    indexed.save(tmp_path / "b.png", transparency=int(np.asarray(indexed)[0, 0]))
    clear = np.asarray(indexed) == np.asarray(indexed)[0, 0]
    expected = np.where(clear[..., None], 255, np.asarray(indexed.convert("RGB")))
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), expected)


# ----------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_as_stored(tmp_path: Path, rgb: np.ndarray, orientation: int) -> None:
    """As OpenSlide, QuPath and tifffile show them, whatever the file says of its orientation."""
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(rgb)
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    tag = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "strips.tif", rgb, photometric="rgb", extratags=tag)
    tifffile.imwrite(tmp_path / "tiles.tif", rgb, photometric="rgb", extratags=tag, tile=(64, 64))
    tifffile.imwrite(tmp_path / "deep.tif", rgb.astype(np.uint16) * 257, photometric="rgb", extratags=tag)
    for name in ("a.png", "a.jpg", "strips.tif", "tiles.tif", "deep.tif"):
        assert image_size(tmp_path / name) == (300, 200)
        slide = open_slide(tmp_path / name, 0.5)
        assert (slide.width, slide.height) == (300, 200)
        found = slide.read(0, 0, 300, 200)
        np.testing.assert_allclose(found.astype(int), rgb, atol=4 if name == "a.jpg" else 0, err_msg=name)


# ------------------------------------------------------------------------------------------------------------ size


def test_pillows_limit_does_not_count(tmp_path: Path, rgb: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """16,384 px a side are promised, and Pillow warns above a third of that area and fails above two thirds."""
    for name in ("a.png", "a.tif", "a.jpg"):
        Image.fromarray(rgb).save(tmp_path / name)
        for limit in (rgb.size // 3 - 1, 1000):  # 60,000 px: a warning, an error
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                slide = open_slide(tmp_path / name, 0.5)
                assert slide.read(0, 0, 300, 200).shape == (200, 300, 3)
                assert slide.thumbnail(8.0).shape == (13, 19, 3)
            assert limit == Image.MAX_IMAGE_PIXELS  # of the user's own code


@pytest.mark.parametrize(("width", "height"), [(16_385, 10), (10, 16_385), (20_000, 20_000), (60_000, 60_000)])
def test_a_larger_image_is_refused_with_the_remedy(tmp_path: Path, width: int, height: int) -> None:
    """Before any pixel is decoded, and without Pillow's warning about it."""
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height, 8, 2, zlib.compress(b"")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            UserError, match=rf"a.png: {width} x {height} px, expected at most 16384 a side; .*vips tiffsave"
        ):
            open_slide(path, 0.5)
