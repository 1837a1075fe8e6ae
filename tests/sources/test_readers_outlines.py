"""Readers of outlines and instance maps, on tiny datasets: classes, splits and refused files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from muse_fast.errors import UserError
from muse_fast.sources import open_source
from tests.support.tiny_datasets import build, by_name, feature, opened, write_geojson

# ----------------------------------------------------------------------------------------------------------------- puma


def test_puma_coarse_classes(tmp_path: Path) -> None:
    """Planted alternately: tumour, lymphocyte, plasma cell. In the paper's code, plasma cells belong to the others."""
    tiny = build("puma", tmp_path)
    for coarse, expected in (("muse", [0, 1, 2]), ("til", [0, 1, 1])):
        source = opened(tiny, coarse=coarse)
        assert source.label_names == ("tumor", "tils", "other")
        item = next(iter(source))
        assert item.label is not None and item.label.tolist() == expected * 2
    assert next(iter(open_source(tiny.spec, mpp=0.23))).label.tolist() == [0, 1, 2] * 2  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"puma: coarse=tils: expected muse, til or none; did you mean 'til'"):
        opened(tiny, coarse="tils")


def test_puma_centre_by_vertices(tmp_path: Path) -> None:
    tiny = build("puma", tmp_path)
    name = "training_set_metastatic_roi_002"
    (box,) = tiny.boxes[name]
    item = by_name(opened(tiny, centre="vertices"))[name]
    # Five vertices on the upper side, the first one twice, and two on the lower side.
    mean_x = (5 * box.centre[0] + box.x0 + box.x1 + box.x0) / 8
    np.testing.assert_allclose(item.xy, [[mean_x, (6 * box.y0 + 2 * box.y1) / 8]], atol=1e-5)


def test_puma_um_per_pixel(tmp_path: Path) -> None:
    tiny = build("puma", tmp_path)
    with pytest.raises(UserError, match=r"roi_001.tif: the TIFF does not state um per pixel, .* give mpp=NUMBER"):
        open_source(tiny.spec)
    for number, (name, (path, _)) in enumerate(tiny.files.items()):
        unit, um = (("cm", 10_000), ("inch", 25_400))[number % 2]
        resolution = um / 0.22
        Image.fromarray(tiny.images[name]).save(
            path, resolution_unit=unit, x_resolution=resolution, y_resolution=resolution
        )
    assert [item.mpp for item in open_source(tiny.spec)] == pytest.approx([0.22] * 3, rel=1e-3)
    assert {item.mpp for item in open_source(tiny.spec, mpp=0.25)} == {0.25}
    Image.fromarray(tiny.images[name]).save(path, dpi=(72, 72))  # written by programs that do not know the scale
    with pytest.raises(UserError, match=r"roi_003.tif: the TIFF does not state"):
        open_source(tiny.spec)


def test_puma_splits(tmp_path: Path) -> None:
    tiny = build("puma", tmp_path)
    train = tiny.folder / "split" / "train.json"
    text = train.read_text()
    train.write_text(text.replace("roi_001", "roi_009"))
    with pytest.raises(UserError, match=r"train.json: there is no training_set_metastatic_roi_009.tif"):
        opened(tiny)
    train.write_text(text.replace("roi_001", "roi_002"))
    with pytest.raises(UserError, match=r"val.json: training_set_metastatic_roi_002 is also listed in the split train"):
        opened(tiny)
    train.write_text('{"classes": []}')
    with pytest.raises(UserError, match=r'train.json: expected JSON with "anno"'):
        opened(tiny)
    train.write_text('{"anno": [3]}')
    with pytest.raises(UserError, match=r'train.json: 3 in "anno", expected names of ROIs'):
        opened(tiny)
    for path in (tiny.folder / "split").iterdir():
        path.unlink()
    assert {item.split for item in opened(tiny)} == {""}


def test_puma_bad_features(tmp_path: Path) -> None:
    tiny = build("puma", tmp_path)
    name = "training_set_metastatic_roi_001"
    boxes, path = tiny.boxes[name], tiny.files[name][1]
    good = feature(boxes[0], "nuclei_tumor")
    for bad, message in (
        (feature(boxes[1], "nuclei_tumour"), r"feature 2: class 'nuclei_tumour', .* did you mean 'nuclei_tumor'"),
        (good | {"geometry": {"type": "Point", "coordinates": [1, 2]}}, r"feature 2: a point, expected a Polygon"),
        (good | {"geometry": {"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}}, r"feature 2: a polygon of 2"),
    ):
        write_geojson(path, [good, bad])
        with pytest.raises(UserError, match=message):
            list(opened(tiny))


def test_outlines_across_the_border_and_wrong_coordinates(tmp_path: Path) -> None:
    """One centre outside the image is dropped and counted; many mean wrong coordinates, such as those of a slide."""
    tiny = build("puma", tmp_path)
    name = "training_set_metastatic_roi_001"
    boxes, path = tiny.boxes[name], tiny.files[name][1]
    beyond = boxes[0]._replace(x0=60, x1=67)
    write_geojson(path, [feature(beyond, "nuclei_tumor"), *(feature(box, "nuclei_tumor") for box in boxes[1:])])
    source = opened(tiny)
    assert len(by_name(source)[name].xy) == 5
    assert source.dropped == {"nucleus outside its image": 1}
    far = [box._replace(x0=box.x0 + 9000, x1=box.x1 + 9000) for box in boxes]
    write_geojson(path, [feature(box, "nuclei_tumor") for box in far])
    with pytest.raises(UserError, match=r"roi_001_nuclei.geojson: 6 of 6 nuclei lie outside the image of 63 x 49 px"):
        list(opened(tiny))


# --------------------------------------------------------------------------------------------------------------- consep


def test_consep_merged_classes(tmp_path: Path) -> None:
    tiny = build("consep", tmp_path)
    source = open_source(tiny.spec)
    assert source.label_names == ("other", "inflammatory", "epithelial", "spindle")
    item = {item.name: item for item in source}["train_2"]
    assert item.label is not None and item.label.tolist() == [0, 1, 2, 2, 3, 3, 3, 0, 1]
    assert {item.split for item in source} == {"train", "test"}
    with pytest.raises(UserError, match=r"consep: val=2, expected fewer than the 2 images of Train"):
        opened(tiny, val=2)
    with pytest.raises(UserError, match=r"consep: merge=true: expected yes or no"):
        opened(tiny, merge="true")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps: maps.pop("type_map"), r"train_2.mat: type_map missing, expected inst_map, type_map"),
        (
            lambda maps: maps["type_map"].__setitem__((0, 0), 8),
            r"type_map contains .* to 8, expected whole numbers from 0 to 7",
        ),
        (
            lambda maps: maps["inst_map"].__setitem__((0, 0), 0.5),
            r"train_2.mat: inst_map contains .*, expected whole numbers",
        ),
        (lambda maps: maps["inst_map"].__setitem__((0, 0), np.nan), r"train_2.mat: inst_map contains"),
        (lambda maps: maps["inst_map"].__setitem__((0, 0), -1), r"inst_map contains float64 from -1 to 9"),
        (
            lambda maps: maps.update(inst_map=maps["inst_map"].T),
            r"inst_map has the shape \[67, 51\], expected \[51",
        ),
        (lambda maps: maps.update(inst_map=np.array("text")), r"train_2.mat: inst_map has the shape"),
    ],
)
def test_consep_bad_maps(tmp_path: Path, change: Callable[[dict], Any], message: str) -> None:
    tiny = build("consep", tmp_path)
    path = tiny.files["train_2"][1]
    content = {key: value for key, value in loadmat(path).items() if key.endswith("map")}
    change(content)
    savemat(path, content)
    with pytest.raises(UserError, match=message):
        list(opened(tiny))


def test_a_matlab_7_3_file_is_named_as_such(tmp_path: Path) -> None:
    tiny = build("consep", tmp_path)
    path = tiny.files["train_2"][1]
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n")
    with pytest.raises(UserError, match=r"train_2.mat: MATLAB 7.3, expected version 7 or older"):
        list(opened(tiny))


def test_a_nucleus_without_type_is_unknown(tmp_path: Path) -> None:
    tiny = build("consep", tmp_path)
    path = tiny.files["train_1"][1]
    content = {key: value for key, value in loadmat(path).items() if key.endswith("map")}
    savemat(path, content | {"type_map": np.zeros_like(content["type_map"])})
    item = by_name(opened(tiny))["train_1"]
    assert item.label is not None and item.label.tolist() == [-1]


# -------------------------------------------------------------------------------------------------------------- pannuke


def test_pannuke_folds_and_splits(tmp_path: Path) -> None:
    tiny = build("pannuke_zip", tmp_path)
    assert {item.name: item.split for item in opened(tiny, splits="test,train,val")} == {
        "fold1_00000": "test", "fold1_00001": "test", "fold2_00000": "train", "fold3_00000": "val",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"splits=train has 1 names, expected one for each of fold1, fold2, fold3"):
        opened(tiny, splits="train")
    (tiny.folder / "Fold 3").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"3 names, expected one for each of fold1, fold2, such as splits=train,val"):
        opened(tiny)
    assert len(opened(tiny, splits="train,test")) == 3


def test_pannuke_arrays_are_mapped_and_never_unpickled(tmp_path: Path) -> None:
    tiny = build("pannuke_flat", tmp_path)
    source = opened(tiny)
    assert isinstance(source._mapped(tiny.files["fold0_00000"][0]), np.memmap)  # type: ignore[attr-defined]
    path = tiny.folder / "fold1" / "masks.npy"
    masks = np.load(path)
    np.save(path, masks.astype(object))
    with pytest.raises(UserError, match=r"fold1/masks.npy: not a readable array of numbers \(.*[Oo]bject"):
        opened(tiny)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "images.npy",
            lambda array: array / 255,
            r"images.npy, image 0 contains .*, expected whole .* 0 to 255",
        ),
        (
            "images.npy",
            lambda array: array[..., :1],
            r"images.npy has the shape \[1, 48, 48, 1\], expected \[N",
        ),
        (
            "masks.npy",
            lambda array: array[..., :5],
            r"masks.npy has the shape \[1, 48, 48, 5\], expected \[1",
        ),
        ("masks.npy", lambda array: array - 1, r"masks.npy, image 0, channel 0 contains float64 from -1"),
        ("masks.npy", lambda array: np.concatenate([array, array]), r"masks.npy has the shape \[2, 48"),
    ],
)
def test_pannuke_bad_arrays(tmp_path: Path, file: str, change: Callable[[np.ndarray], Any], message: str) -> None:
    tiny = build("pannuke_flat", tmp_path)
    path = tiny.folder / "fold1" / file
    np.save(path, change(np.load(path)))
    with pytest.raises(UserError, match=message):
        list(opened(tiny))


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"inst_map": _Trap(), "type_map": _Trap()}, r"a pickle of pathlib"),
        (_Trap(), r"a pickle of pathlib|_Trap"),
        ({"inst_map": np.zeros((48, 48), int)}, r"'type_map' is missing"),
        ([1, 2], r"an array of int64 \[2\]"),
        ({"inst_map": np.array([_Trap()]), "type_map": 3}, r"a pickle of"),
        ({"inst_map": 3, "type_map": 3}, r"a pickle of int"),
    ],
    ids=["calls", "a call", "one map", "numbers", "array of calls", "no maps"],
)
def test_nothing_in_a_pickled_label_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = build("pannuke_cellvit", tmp_path)
    path = tiny.files["fold0_0_0"][1]
    np.save(path, content)
    with pytest.raises(UserError, match=rf"0_0.npy: .*({message}).*; expected a mapping of inst_map, type_map"):
        list(opened(tiny))
    assert not Path("sprung").exists()


# --------------------------------------------------------------------------------------------------------------- lizard


def test_lizard_without_ids_counts_in_order(tmp_path: Path) -> None:
    tiny = build("lizard", tmp_path)
    path = tiny.files["consep_1"][1]
    content = loadmat(path)
    savemat(path, {"inst_map": content["inst_map"], "class": content["class"][::-1]})
    np.testing.assert_array_equal(by_name(opened(tiny))["consep_1"].label, tiny.label("consep_1"))
    savemat(path, {"inst_map": content["inst_map"], "class": content["class"][1:]})
    with pytest.raises(UserError, match=r"consep_1.mat: 7 classes for 8 nuclei"):
        list(opened(tiny))
    savemat(path, {key: content[key] if key == "inst_map" else content[key][1:] for key in ("inst_map", "class", "id")})
    with pytest.raises(UserError, match=r"consep_1.mat: nucleus 40 of inst_map is not in id, so it has no class"):
        list(opened(tiny))
    content["class"][0] = 0
    savemat(path, {key: content[key] for key in ("inst_map", "class", "id")})
    with pytest.raises(UserError, match=r"consep_1.mat: class 0 of nucleus 40, expected 1 to 6"):
        list(opened(tiny))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("consep_2,consep,2", "consep_2,consep,4", r"info.csv, row 3: Split is '4', expected 1, 2, 3"),
        ("consep_2,consep,2", "consep_1,consep,2", r"info.csv, row 3: consep_1 is listed twice"),
        ("consep_2,consep,2", "", r"consep_2 has no row of .*info.csv"),
        ("consep_2,", "glas_1,", r"consep_2 has no row"),
        ("Filename", "Name", r"info.csv, row 1: the header is .*, expected Filename,Source,Split"),
    ],
)
def test_lizard_info(tmp_path: Path, old: str, new: str, message: str) -> None:
    tiny = build("lizard", tmp_path)
    path = tiny.folder / "Lizard_Labels" / "info.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        opened(tiny)


def test_lizard_splits_and_duplicates(tmp_path: Path) -> None:
    tiny = build("lizard", tmp_path)
    assert [item.split for item in opened(tiny, splits="a,b,c")] == ["a", "b", "c"]
    (tiny.folder / "copy").mkdir()
    path = tiny.files["consep_1"][0]
    (tiny.folder / "copy" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"consep_1.png: .* has the same name; keep one"):
        opened(tiny)


# --------------------------------------------------------------------------------------------------------------- qupath


def test_qupath_classes_from_the_option_or_the_files(tmp_path: Path) -> None:
    tiny = build("qupath", tmp_path)
    assert opened(tiny).label_names == ("Lymphocyte", "Stroma", "Tumor: Positive")
    source = opened(tiny, labels="Tumor: Positive,Stroma,Lymphocyte")
    item = next(iter(source))
    assert item.label is not None and item.label.tolist() == [2, 1, 0] * 2
    with pytest.raises(UserError, match=r"tile0.geojson, feature 2: class 'Stroma', expected Lymphocyte, Tumor"):
        list(opened(tiny, labels="Lymphocyte,Tumor: Positive"))


def test_qupath_objects_that_are_not_nuclei(tmp_path: Path) -> None:
    tiny = build("qupath", tmp_path)
    boxes, path = tiny.boxes["tile0.png"], tiny.files["tile0.png"][1]
    nuclei = [feature(box, "A", "detection") for box in boxes]
    more = [feature(boxes[0], "Tissue"), feature(boxes[0], "", "tile"), feature(boxes[0], "", "tmaCore")]
    line = {"type": "LineString", "coordinates": [[0, 0], [9, 9]]}
    write_geojson(path, [*nuclei, *more, nuclei[0] | {"geometry": line}])
    source = opened(tiny)
    assert len(next(iter(source)).xy) == 6
    assert source.dropped == {
        "annotation beside detections": 1, "tile": 1, "TMA core": 1,
}  # fmt: skip
    large = boxes[0]._replace(x0=0, y0=0, x1=69, y1=55)
    write_geojson(path, [feature(box, "A") for box in boxes] + [feature(large, "Region")])
    (tiny.folder / "mpp.csv").unlink()
    source = opened(tiny, mpp=1.0)  # 69 x 55 um
    assert len(next(iter(source)).xy) == 6
    assert source.dropped == {"outline too large for a nucleus": 1}


def test_qupath_files(tmp_path: Path) -> None:
    tiny = build("qupath", tmp_path)
    path = tiny.files["tile0.png"][1]
    write_geojson(path.with_suffix(".geojson.gz"), [])
    with pytest.raises(UserError, match=r"tile0.png: both tile0.geojson and tile0.geojson.gz exist; keep one"):
        opened(tiny)
    path.with_suffix(".geojson.gz").unlink()
    (tiny.folder / "mpp.csv").unlink()
    with pytest.raises(UserError, match=r"tile0.png: um per pixel unknown; give mpp=NUMBER or list"):
        opened(tiny)
    with pytest.raises(UserError, match=r"qupath: multi=every: expected auto, one or each"):
        opened(tiny, mpp=0.25, multi="every")
    path.unlink()
    with pytest.raises(UserError, match=r"tile0.geojson is missing; an image without nuclei needs an empty Feature"):
        opened(tiny, mpp=0.25)
