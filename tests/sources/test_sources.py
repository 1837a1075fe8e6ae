"""Sources: the images they yield, and errors that name the file and row of a mistake."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast.classification.tiles import cut_tiles
from muse_fast.errors import UserError
from muse_fast.sources import SourceImage, open_source

NAME = "TCGA-AA-0000-01Z-00-DX1_301_401_1000_1000_0.93"


def write_image(path: Path, width: int = 30, height: int = 20) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(image).save(path)
    return image


@pytest.fixture
def brcam2c(tmp_path: Path) -> Path:
    """One BRCA-M2C image of 30 x 20 px with three nuclei."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    write_image(tmp_path / "images" / f"{NAME}.png")
    (tmp_path / "labels" / f"{NAME}_gt_class_coords.txt").write_text("19 29 1\n0 0 3\n7 25 2\n")
    for split, listing in (("train", ""), ("val", f"{NAME}.png\n"), ("test", "")):
        (tmp_path / f"brca_ds_{split}.txt").write_text(listing)
    return tmp_path


@pytest.fixture
def points(tmp_path: Path) -> Path:
    write_image(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("x,y,label\n1.5,2.5,0\n29.9,19.9,1\n")
    return tmp_path


# ---------------------------------------------------------------------------------------------------------- brcam2c


def test_brcam2c_by_hand(brcam2c: Path) -> None:
    source = open_source(f"brcam2c:{brcam2c}")
    (item,) = source
    assert len(source) == 1  # type: ignore[arg-type]
    assert source.label_names == ("lymphocyte", "tumour", "stromal")
    assert (item.slide, item.split, item.mpp, item.origin) == ("TCGA-AA-0000-01Z-00-DX1", "val", 0.5, (301, 401))
    np.testing.assert_array_equal(item.xy, [[29, 19], [0, 0], [25, 7]])
    np.testing.assert_array_equal(item.label, [0, 2, 1])
    np.testing.assert_array_equal(item.image, np.asarray(Image.open(brcam2c / "images" / f"{NAME}.png")))


@pytest.mark.parametrize(
    ("text", "row"),
    [("1 2 1\n20 0 1\n", 2), ("0 30 1\n", 1), ("0 0 0\n", 1), ("0 0 4\n", 1), ("1 nan 2\n", 1), ("\n1 2\n", 2)],
)
def test_brcam2c_bad_label_names_file_and_row(brcam2c: Path, text: str, row: int) -> None:
    (brcam2c / "labels" / f"{NAME}_gt_class_coords.txt").write_text(text)
    with pytest.raises(UserError, match=rf"{NAME}_gt_class_coords.txt, row {row}: "):
        list(open_source(f"brcam2c:{brcam2c}"))


def test_brcam2c_folder_mistakes(brcam2c: Path) -> None:
    (brcam2c / "brca_ds_test.txt").write_text(f"{NAME}.png\n")
    with pytest.raises(UserError, match=r"brca_ds_test.txt, row 1: .* is also listed in the split val"):
        open_source(f"brcam2c:{brcam2c}")
    (brcam2c / "brca_ds_test.txt").unlink()
    with pytest.raises(UserError, match=r"brca_ds_test.txt is missing"):
        open_source(f"brcam2c:{brcam2c}")
    (brcam2c / "brca_ds_test.txt").write_text("")
    (brcam2c / "images" / f"{NAME}.png").unlink()
    with pytest.raises(UserError, match=f"{NAME}.png: not a readable image"):
        list(open_source(f"brcam2c:{brcam2c}"))


def test_real_brcam2c(shared_data: Path) -> None:
    folder = shared_data / "brcam2c"
    source = open_source(f"brcam2c:{folder}")
    assert len(source) == 120  # type: ignore[arg-type]
    for item in itertools.islice(source, 0, 120, 13):
        rows = np.loadtxt(folder / "labels" / f"{Path(item.name).stem}_gt_class_coords.txt", dtype=int)
        np.testing.assert_array_equal(item.xy, rows[:, [1, 0]])
        np.testing.assert_array_equal(item.label, rows[:, 2] - 1)
        assert item.name in (folder / f"brca_ds_{item.split}.txt").read_text()
        # The points lie on nuclei, which are darker in red than the rest; with x and y swapped they would not.
        column, row = item.xy.astype(int).T
        red = item.image[..., 0].astype(float)
        assert red[row, column].mean() < red.mean() - 10


# ----------------------------------------------------------------------------------------------------------- points


def test_points_by_hand(points: Path) -> None:
    (item,) = open_source(f"points:{points}", mpp="0.25", labels="cell,other")
    np.testing.assert_array_equal(item.xy, np.float32([[1.5, 2.5], [29.9, 19.9]]))
    assert item.label is not None
    assert item.label.tolist() == [0, 1]
    assert item.score is None
    assert (item.slide, item.split, item.mpp) == ("a", "", 0.25)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffx,y\n3,4\n",
        "x,y\r\n\r\n3,4\r\n\r\n",
        "y,x\n4,3\n",
        " x , y \n 3 , 4 \n",
        "x,y\n3,4",
        '"x","y"\n"3","4"\n',
    ],
    ids=["byte-order mark", "blank lines", "columns swapped", "spaces", "no last newline", "quotes"],
)
def test_harmless_variants_of_a_csv(points: Path, text: str) -> None:
    (points / "a.csv").write_bytes(text.encode())
    (item,) = open_source(f"points:{points}", mpp=0.25)
    np.testing.assert_array_equal(item.xy, [[3, 4]])


def test_class_names_in_a_csv(points: Path) -> None:
    """The names in the column ``class`` decide, whatever their numbers; without ``labels`` they are the classes."""
    write_image(points / "b.png")
    (points / "a.csv").write_text('x,y,label,class,score\n1.5,2.5,0,tumour,1\n29.9,19.9,2,"odd, name",1\n3,4,-1,,1\n')
    (points / "b.csv").write_text("x,y,label,class,score,x_qupath,y_qupath\n1,2,1,tumour,1,1,2\n")
    source = open_source(f"points:{points}", mpp=0.25)
    assert source.label_names == ("odd, name", "tumour")
    assert [item.label.tolist() for item in source if item.label is not None] == [[1, 0, -1], [1]]
    (points / "b.csv").write_text("x,y,label,class\n1,2,1,tumour\n3,4,-1,unknown\n")  # -1 has no class
    assert open_source(f"points:{points}", mpp=0.25).label_names == ("odd, name", "tumour")
    assert [item.label.tolist() for item in source if item.label is not None] == [[1, 0, -1], [1, -1]]
    (points / "b.csv").write_text("x,y,label,class\n1,2,1,tumour\n")
    source = open_source(f"points:{points}", mpp=0.25, labels=r"tumour,other,odd\, name")
    assert source.label_names == ("tumour", "other", "odd, name")
    assert [item.label.tolist() for item in source if item.label is not None] == [[0, 2, -1], [0]]
    with pytest.raises(UserError, match=r"a.csv: class 'odd, name', expected tumour, other"):
        list(open_source(f"points:{points}", mpp=0.25, labels="tumour,other"))
    (points / "a.csv").write_text("x,y,label\n1.5,2.5,0\n")
    with pytest.raises(UserError, match=r"a.csv numbers its classes, .*b.csv names them; give labels= with the names"):
        open_source(f"points:{points}", mpp=0.25)
    (points / "a.csv").write_text("x,y,label,class\n1,2,0,tumour\n1,2,0,other\n")
    with pytest.raises(UserError, match=r"a.csv, row 3: label 0 is called 'other' here, 'tumour' before"):
        open_source(f"points:{points}", mpp=0.25)
    (points / "a.csv").write_text("x,y,label,class\n1,2,0,\n1,2,1,tumour\n")
    with pytest.raises(UserError, match=r"a.csv: label 0 has no name in the column class; name it, or remove"):
        list(open_source(f"points:{points}", mpp=0.25))


def test_tiles_of_an_image_without_nuclei_and_labels(points: Path) -> None:
    """Its table may be the header alone, which has no column for labels."""
    (points / "a.csv").write_text("x,y\n")
    (item,) = open_source(f"points:{points}", mpp=0.25)
    assert item.label is None and cut_tiles(item, size=32, mpp=0.25) == []
    (points / "a.csv").write_text("x,y\n1,2\n")
    (item,) = open_source(f"points:{points}", mpp=0.25)
    with pytest.raises(UserError, match=r"a.png: the image has nuclei but no classes"):
        cut_tiles(item, size=32, mpp=0.25)


def test_an_image_without_nuclei(points: Path) -> None:
    (points / "a.csv").write_text("x,y,label\n")
    (item,) = open_source(f"points:{points}", mpp=0.25)
    assert item.xy.shape == (0, 2)
    assert item.label is not None
    assert item.label.shape == (0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\nnan,2\n", r"row 3: x is 'nan', expected a number, 0 <= x < 30"),
        ("x,y\n\n1,inf\n", r"row 3: y is 'inf'"),
        ("x,y\n1,two\n", r"row 2: y is 'two'"),
        ("x,y\n1,\n", r"row 2: y is ''"),
        ("x,y\n30,2\n", r"row 2: x is '30'"),
        ("x,y\n2,25\n", r"row 2: y is '25', expected a number, 0 <= y < 20"),
        ("x,y\n-1,2\n", r"row 2: x is '-1'"),
        ("x,y\n1\n", r"row 2: 1 values, expected x,y"),
        ("x,y\n1,2,3\n", r"row 2: 3 values"),
        ("x\n1\n", r"row 1: the header is 'x', expected x,y\[,label\]\[,score\]"),
        ("x,y,type\n1,2,3\n", r"row 1: the header is 'x,y,type'"),
        ("x,x,y\n1,2,3\n", r"row 1: the header"),
        ("1,2\n3,4\n", r"row 1: the header is '1,2'"),
        ("", r"row 1: the header is ''"),
        ("\xff\xfe", r"row 1: not text in UTF-8; save"),
        ("x,y,label\n1,2,0.5\n", r"row 2: label is '0.5', expected a whole number"),
        ("x,y,label\n1,2,2\n", r"row 2: label is '2', expected a whole number, -1 to 1"),
        ("x,y,score\n1,2,nan\n", r"row 2: score is 'nan'"),
    ],
)
def test_bad_csv_names_file_and_row(points: Path, text: str, message: str) -> None:
    (points / "a.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"a\.csv, {message}"):
        list(open_source(f"points:{points}", mpp=0.25, labels="a,b"))


def test_mpp_of_points(points: Path) -> None:
    with pytest.raises(UserError, match=r"a.png: um per pixel unknown; give mpp=NUMBER or list"):
        open_source(f"points:{points}")
    (points / "mpp.csv").write_text("image,mpp,slide,split\na.png,0.4,S1,val\n")
    (item,) = open_source(f"points:{points}")
    assert (item.mpp, item.slide, item.split) == (0.4, "S1", "val")
    (item,) = open_source(f"points:{points}", mpp=0.3)  # the table of images takes precedence over the option
    assert item.mpp == 0.4
    for text, message in (
        ("image,mpp\na.png,40\n", "row 2: mpp is '40', expected um per pixel, 0.05 to 5"),
        ("image,mpp\na.png,\n", "row 2: a value is missing, expected image,mpp"),
        ("image,mpp\na.png,0.5\na.png,0.5\n", "row 3: a.png is listed twice"),
        ("image,mpp\nb.png,0.5\n", "row 2: there is no file 'b.png'"),
        ("name,mpp\n", "row 1: the header"),
    ):
        (points / "mpp.csv").write_text(text)
        with pytest.raises(UserError, match=rf"mpp\.csv, {message}"):
            open_source(f"points:{points}")


def test_points_folder_mistakes(points: Path, tmp_path: Path) -> None:
    shutil.copy(points / "a.png", points / "b.png")
    with pytest.raises(UserError, match=r"b.png: b.csv is missing"):
        open_source(f"points:{points}", mpp=0.5)
    (points / "b.png").rename(points / "a.tif")
    with pytest.raises(UserError, match="same stem"):
        open_source(f"points:{points}", mpp=0.5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no images"):
        open_source(f"points:{tmp_path / 'empty'}", mpp=0.5)
    with pytest.raises(UserError, match="is not a folder"):
        open_source(f"points:{tmp_path / 'absent'}", mpp=0.5)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_truncated_image_is_named(points: Path, suffix: str) -> None:
    (points / "a.png").unlink()
    path = points / f"a.{suffix}"
    write_image(path)
    assert len(list(open_source(f"points:{points}", mpp=0.5))) == 1
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=rf"a\.{suffix}: not a readable image"):
        list(open_source(f"points:{points}", mpp=0.5))


def test_damaged_jpeg_is_refused(points: Path) -> None:
    """Eight bytes of a scan are overwritten: Pillow would return an image that is partly grey."""
    (points / "a.png").unlink()
    write_image(points / "a.jpg", 200, 200)
    data = bytearray((points / "a.jpg").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8] = b"\xff\x01" * 4
    (points / "a.jpg").write_bytes(data)
    with pytest.raises(UserError, match=r"a.jpg: not a readable image"):
        list(open_source(f"points:{points}", mpp=0.5))


@pytest.mark.parametrize(
    ("mode", "found", "remedy"),
    [("L", "grey", ".*in colour"), ("I;16", "grey", ".*in colour"), ("CMYK", "CMYK", "convert it to RGB")],
)
def test_images_that_are_not_rgb_are_refused(points: Path, mode: str, found: str, remedy: str) -> None:
    (points / "a.png").unlink()
    Image.new(mode, (30, 20)).save(points / "a.tif")
    with pytest.raises(UserError, match=rf"a.tif: its pixels are {found}, expected 8- or 16-bit RGB; {remedy}"):
        list(open_source(f"points:{points}", mpp=0.5))


# -------------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_splits_and_repeats() -> None:
    source = open_source("synthetic:20", size="64", mpp="0.5", seed="3")
    items = list(source)
    assert [item.split for item in items] == ["train"] * 14 + ["val"] * 3 + ["test"] * 3
    assert len({item.slide for item in items}) == 20
    assert len({item.image.tobytes() for item in items}) == 20
    assert items[0].image.shape == (64, 64, 3)
    again: SourceImage = next(iter(source))
    np.testing.assert_array_equal(again.image, items[0].image)
    other = next(iter(open_source("synthetic:20", size=64, mpp=0.5, seed=4)))
    assert (other.image != items[0].image).any()


# ---------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("brcam2:x", {}, r"did you mean 'brcam2c'"),
        ("synthetic", {}, r"expected KIND:PATH"),
        ("synthetic:", {}, r"expected KIND:PATH"),
        ("synthetic:0", {}, r"1 or more"),
        ("synthetic:many", {}, r"1 or more"),
        ("synthetic:2", {"sise": "64"}, r"synthetic: no setting 'sise'; did you mean 'size'\?"),
        ("synthetic:2", {"size": "64.5"}, r"synthetic: size=64.5: expected a whole number"),
        ("synthetic:2", {"mpp": "40"}, r"synthetic: mpp=40.0: expected 0.05 to 5"),
        ("synthetic:2", {"size": 8193}, r"synthetic: size=8193: expected 32 to 8192"),
        ("synthetic:2", {"mpp": "nan"}, r"mpp=nan"),
        ("brcam2c:x", {"mpp": "0.5"}, r"brcam2c: no setting 'mpp'. Known: slides"),
    ],
)
def test_mistakes_in_source_and_options(spec: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(spec, **options)


def test_slides_match_the_images(shared_data: Path) -> None:
    source = open_source(f"brcam2c:{shared_data / 'brcam2c'}")
    slides = list(source.slides())
    assert len(slides) == 120 and slides == [(item.slide, item.split) for item in source]


def test_a_folder_without_a_kind_gets_a_hint_at_inspect(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"`python -m muse_fast.prepare inspect {tmp_path}` suggests one"):
        open_source(str(tmp_path))
