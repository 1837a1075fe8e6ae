"""The readers of public datasets, on tiny datasets in their exact layouts: they return the planted nuclei."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from muse_fast import prepare as prepare_command
from muse_fast.classification.tiles import cut_tiles, tiles_by_split
from muse_fast.errors import UserError
from muse_fast.evaluate import main as evaluate
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime.cli import run
from muse_fast.sources import Dataset, open_source
from tests.support.tiny_datasets import DATASETS, Tiny, build, by_name, opened

prepare = partial(run, prepare_command.main)


@pytest.fixture(params=DATASETS)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Tiny:
    return DATASETS[request.param](tmp_path / request.param)


# ---------------------------------------------------------------------------------------------------------- all of them


def test_the_planted_nuclei_are_read(tiny: Tiny) -> None:
    source = opened(tiny)
    found = by_name(source)
    assert len(source) == len(found) == len(tiny.boxes)
    assert {name: item.split for name, item in found.items()} == tiny.splits
    for name, item in found.items():
        np.testing.assert_allclose(item.xy, tiny.xy(name), rtol=0, atol=1e-5)
        assert item.xy.dtype == np.float32
        assert item.mpp == pytest.approx(tiny.mpp)
        assert item.slide == tiny.slides.get(name, name)
        if tiny.kind == "muse":
            assert item.label is None
        else:
            assert item.label is not None
            assert item.label.dtype == np.int16
            np.testing.assert_array_equal(item.label, tiny.label(name))
        lossy = 3 if tiny.kind in ("ocelot", "muse") else 0
        assert np.abs(item.image.astype(int) - tiny.images[name]).mean() <= lossy
    assert not source.dropped


def test_slides_are_listed_without_reading_images(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(tiny)
    expected = [(item.slide, item.split) for item in source]
    monkeypatch.setattr(Dataset, "read", lambda *_: pytest.fail("an image was read"))
    assert list(source.slides()) == expected


def test_prepare(tiny: Tiny, tmp_path: Path) -> None:
    options = [f"{key}={value}" for key, value in tiny.options.items()]
    assert prepare([tiny.spec, str(tmp_path / "rois"), *options]) == 0
    rois = RoiSet(tmp_path / "rois")
    assert rois.verify() == []
    names = [entry.name for entry in opened(tiny).entries]
    assert len(rois) == len(names)
    for roi, name in zip((rois[i] for i in range(len(rois))), names, strict=True):
        np.testing.assert_allclose(roi.xy, tiny.xy(name), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(roi.label, -1 if tiny.kind == "muse" else tiny.label(name))
        assert roi.split == tiny.splits[name]


@pytest.mark.parametrize("which", [0, 1], ids=["image", "labels"])
@pytest.mark.parametrize("how", ["half", "noise"])
def test_a_damaged_file_is_named(tiny: Tiny, which: int, how: str) -> None:
    name = max(tiny.boxes, key=lambda name: len(tiny.boxes[name]))
    path = tiny.files[name][which]
    data = path.read_bytes()
    text = path.suffix in (".csv", ".txt")
    path.write_bytes(data[: len(data) // 2] if how == "half" and not text else b"\xff\xfe\x00 no such thing, \n 7 \x01")
    with pytest.raises(UserError, match=re.escape(path.name)):
        list(opened(tiny))


@pytest.mark.parametrize("which", [0, 1], ids=["image", "labels"])
def test_a_missing_file_is_named(tiny: Tiny, which: int) -> None:
    """Only ``points:`` cannot notice a missing image."""
    name = max(tiny.boxes, key=lambda name: len(tiny.boxes[name]))
    path = tiny.files[name][which]
    path.unlink()
    if tiny.kind == "points" and which == 0:
        assert len(opened(tiny)) == 2
        return
    with pytest.raises(UserError, match=re.escape(path.stem)):
        list(opened(tiny))


def test_folders_that_are_missing_or_empty(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder; expected "):
        open_source(f"{tiny.kind}:{tiny.folder / 'nowhere'}", **tiny.options)
    (tiny.folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        open_source(f"{tiny.kind}:{tiny.folder / 'empty'}", **tiny.options)


def test_evaluation_on_labelled_sources(tmp_path: Path) -> None:
    for name in ("ocelot", "pannuke_flat"):
        tiny = build(name, tmp_path)
        tiles = tiles_by_split(opened(tiny), partial(cut_tiles, size=32, mpp=0.5))
        for split, found in tiles.items():
            planted = sum(len(tiny.boxes[image]) for image, one in tiny.splits.items() if one == split)
            assert sum(len(tile.xy) for tile in found) == planted
    command = ["knn", "--weights", "random:vit_tiny", "--data", tiny.spec, "--size", "96", "k=[1]", "standardise=raw"]
    assert evaluate([*command, "--json", str(tmp_path / "knn.json")]) == 0
    report = json.loads((tmp_path / "knn.json").read_text())
    assert report["data"]["classes"] == ["neoplastic", "inflammatory", "connective", "dead", "epithelial"]
    assert sum(report["data"]["nuclei"]["test"]) == 5


# --------------------------------------------------------------------------------------------------------------- ocelot


def test_ocelot_positions_and_splits(tmp_path: Path) -> None:
    tiny = build("ocelot", tmp_path)
    assert [item.origin for item in opened(tiny)] == [(1000, 70), (2000, 70), (3000, 70), (4000, 70)]
    for part in ("images", "annotations"):
        (tiny.folder / part / "test").rename(tiny.folder / part / "later")
    assert [item.split for item in opened(tiny)] == ["train", "train", "val"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pair: pair.pop("slide_name"), r"metadata.json: 001.slide_name is None, expected as in OCELOT 1.0.1"),
        (lambda pair: pair["cell"].pop("resized_mpp_y"), r"001.cell.resized_mpp_y is None"),
        (lambda pair: pair["cell"].update(resized_mpp_x=20), r"resized_mpp_x of 001 is '20', expected um per pixel"),
        (lambda pair: pair["cell"].update(resized_mpp_x=0.3), r"pixels of 001 are 0.3 x 0.202 um, expected squares"),
        (lambda pair: pair["cell"].update(x_start="far"), r"001.cell.x_start is 'far'"),
        (lambda pair: pair["cell"].update(x_start=math.nan), r"001.cell.x_start is nan"),
        (lambda pair: pair["cell"].update(x_start=10**400), r"001.cell.x_start is 10000"),
        (lambda pair: pair.update(subset="valid"), r"subset of 001 is 'valid', expected train, val, test"),
        (lambda pair: pair.update(subset="val"), r"train/cell/001.jpg is not in .*metadata.json as train"),
    ],
)
def test_ocelot_metadata(tmp_path: Path, change: Callable[[dict], Any], message: str) -> None:
    tiny = build("ocelot", tmp_path)
    path = tiny.folder / "metadata.json"
    content = json.loads(path.read_text())
    change(content["sample_pairs"]["001"])
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        opened(tiny)


def test_ocelot_image_missing_in_the_metadata(tmp_path: Path) -> None:
    tiny = build("ocelot", tmp_path)
    path = tiny.folder / "metadata.json"
    content = json.loads(path.read_text())
    del content["sample_pairs"]["003"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"val/cell/003.jpg is not in .*metadata.json as val"):
        opened(tiny)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,1\n3,4,3\n", "row 2: label is '3', expected a whole number, 1 to 2"),
        ("1,2,0\n", "row 1: label is '0'"),
        ("64,2,1\n", "row 1: x is '64', expected a number, 0 <= x < 64"),
        ("1,48,1\n", "row 1: y is '48'"),
        ("1,2\n", "row 1: 2 values, expected x,y,label"),
        ("\n1,nan,1\n", "row 2: y is 'nan'"),
    ],
)
def test_ocelot_bad_rows(tmp_path: Path, text: str, message: str) -> None:
    tiny = build("ocelot", tmp_path)
    tiny.files["001"][1].write_text(text)
    with pytest.raises(UserError, match=rf"001\.csv, {message}"):
        list(opened(tiny))


@pytest.mark.parametrize("text", ["\ufeff5,6,2\r\n", "x,y,label\n5,6,2\n", "5,6,2", " 5 , 6 , 2 \n\n"])
def test_ocelot_harmless_variants(tmp_path: Path, text: str) -> None:
    tiny = build("ocelot", tmp_path)
    tiny.files["001"][1].write_bytes(text.encode())
    item = by_name(opened(tiny))["001"]
    assert item.xy.tolist() == [[5, 6]]
    assert item.label is not None and item.label.tolist() == [1]


# -------------------------------------------------------------------------------------------------------------- cellvit


def test_cellvit_folds(tmp_path: Path) -> None:
    tiny = build("cellvit", tmp_path)
    assert [item.split for item in opened(tiny, fold=0)] == ["val", "train", "test"]
    with pytest.raises(UserError, match=r"fold_7/train.csv is missing; .* contains fold_0, fold_1; choose with fold=K"):
        opened(tiny, fold=7)
    listing = tiny.folder / "splits" / "fold_1" / "val.csv"
    for text, message in (
        ("img_1\nimg_3\n", r"val.csv, row 2: train/images has no 'img_3'"),
        ("img_0\n", r"val.csv, row 1: img_0 is also listed in the split train"),
    ):
        listing.write_text(text)
        with pytest.raises(UserError, match=message):
            opened(tiny)
    listing.write_text("")
    assert [item.split for item in opened(tiny)] == ["train", "", "test"]


def test_cellvit_labels_and_scale(tmp_path: Path) -> None:
    tiny = build("cellvit", tmp_path)
    with pytest.raises(UserError, match=r"the layout does not state um per pixel; give mpp=NUMBER"):
        open_source(tiny.spec)
    assert opened(tiny).label_names == ("Tumour", "Lymphocyte", "Other")
    path = tiny.folder / "label_map.yaml"
    path.write_text("0: a\n1: b\n2: c\n")
    assert opened(tiny).label_names == ("a", "b", "c")
    for text in ("0: a\n2: b\n", "1: a\n", "- a\n", "", "{"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"label_map.yaml: "):
            opened(tiny)
    path.write_text("0: a\n1: b\n")
    with pytest.raises(UserError, match=r"img_0.csv, row 3: label is '2', expected a whole number, 0 to 1"):
        list(opened(tiny))


# ----------------------------------------------------------------------------------------------------------------- muse


def test_the_evaluation_cache_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "BRCAM2C" / "mpp_0.5-size_224-valid_224.npy"
    cache.parent.mkdir()
    np.save(cache, {"patches": {}, "anns": {}})
    for target in (cache, cache.parent):
        with pytest.raises(UserError, match=r"valid_224.npy is the evaluation cache .* a pickle, .*brcam2c:"):
            open_source(f"muse:{target}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": np.zeros((64, 64), np.uint8)}, r"DX0_0.h5: patch is uint8 \[64, 64\], expected uint8 \[H, W, 3\]"),
        ({"patch": np.zeros((64, 64, 3))}, r"patch is float64"),
        ({"patch": np.frombuffer(b"\xff\xd8 no", np.uint8)}, r"DX0_0.h5: not a readable image"),
        ({"cell": np.zeros((6, 3))}, r"DX0_0.h5: cell is float64 \[6, 3\], expected finite numbers \[n, 2\]"),
        ({"cell": np.full((6, 2), np.nan)}, r"DX0_0.h5: cell is float64"),
        ({"cell": np.zeros((5, 2))}, r"DX0_0.h5: 5 cells, but .*metadata.csv says 6"),
        ({"cell": np.full((6, 2), 64.0)}, r"DX0_0.h5: 6 of 6 nuclei lie outside the image of 64 x 64 px"),
        ({"cell": None}, r"DX0_0.h5: not a readable sample"),
    ],
)
def test_muse_bad_samples(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tiny = build("muse", tmp_path)
    with h5py.File(tiny.files["TCGA-AA-0001-01Z-00-DX0_0"][0], "a") as file:
        for name, value in change.items():
            del file[name]
            if value is not None:
                file[name] = value
    with pytest.raises(UserError, match=message):
        list(opened(tiny))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("DX0,0,6", "DX0,0,six", r"metadata.csv, row 2: .*DX0_0 has n_cell 'six', expected a count"),
        ("DX1_1,", "DX0_0,", r"metadata.csv, row 3: .*DX0_0 is listed twice"),
        ("DX1_1,", "DX1_9,", r"DX1_9.h5 is missing, one of 1 listed in .*metadata.csv"),
        ("wsi_name", "wsi", r"metadata.csv, row 1: the header is 'sample_name,wsi,patch_id,n_cell', expected"),
        ("DX2_2,TCGA-AA-0001-01Z-00-DX2,", "DX2_2,,", r"metadata.csv, row 4: a value is missing, expected sample_name"),
    ],
)
def test_muse_metadata(tmp_path: Path, old: str, new: str, message: str) -> None:
    tiny = build("muse", tmp_path)
    path = tiny.folder / "metadata.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        opened(tiny)


def test_muse_sample_missing_in_the_metadata(tmp_path: Path) -> None:
    tiny = build("muse", tmp_path)
    path = tiny.folder / "metadata.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    with pytest.raises(UserError, match=r"DX2_2.h5 is not listed in .*metadata.csv"):
        opened(tiny)


# -------------------------------------------------------------------------------------------------------------- brcam2c


def test_brcam2c_images_have_half_a_micron(shared_data: Path) -> None:
    """The last field of a name is four times the slide's um/px, and w, h are its pixels; the PNGs have 0.5."""
    sides = set()
    for path in (shared_data / "brcam2c" / "images").glob("*.png"):
        *_, width, height, quadruple = path.stem.split("_")
        with Image.open(path) as image:
            for pixels, level0 in zip(image.size, (width, height), strict=True):
                assert abs(pixels * 0.5 - int(level0) * float(quadruple) / 4) < 1.5
            sides.add(image.width)
    assert {328, 465, 491} <= sides
