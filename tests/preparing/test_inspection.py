"""``prepare inspect``: recognition of layouts, counts, warnings and overlays."""

from __future__ import annotations

import json
import shlex
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast import prepare
from muse_fast.images.drawing import PALETTE
from muse_fast.preparing.inspection import recognise
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime.cli import run
from muse_fast.sources import open_source
from muse_fast.sources.names import patient
from tests.support.tiny_datasets import DATASETS, Tiny

main = partial(run, prepare.main)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def inspected(tiny: Tiny, *more: str) -> tuple[int, dict]:
    code = main(["inspect", str(tiny.folder), *(f"{key}={value}" for key, value in tiny.options.items()), *more])
    return code, json.loads(Path(f"inspect-{tiny.folder.name}/report.json").read_text())


@pytest.mark.parametrize("name", DATASETS)
def test_every_layout(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = DATASETS[name](tmp_path / name)
    code, report = inspected(tiny)
    printed = capsys.readouterr().out
    assert code == 0
    assert report["kind"] == tiny.kind
    assert f"{name} is laid out as {tiny.kind}: " in printed
    assert report["images"] == report["images_read"] == len(tiny.boxes)
    assert report["images_without_nuclei"] == sum(not boxes for boxes in tiny.boxes.values())
    source = open_source(tiny.spec, **tiny.options)
    assert report["classes"] == list(source.label_names)
    for split, images in Counter(tiny.splits.values()).items():
        boxes = [box for image, mine in tiny.boxes.items() if tiny.splits[image] == split for box in mine]
        found = report["splits"][split]
        assert (found["images"], found["nuclei"]) == (images, len(boxes))
        if tiny.kind != "muse":
            counts = Counter(source.label_names[box.label] for box in boxes)
            assert {key: count for key, count in found["nuclei_per_class"].items() if count} == counts
    assert report["mpp"] == pytest.approx([tiny.mpp] * 2)
    sizes = Counter((image.shape[1], image.shape[0]) for image in tiny.images.values())
    assert {(width, height): count for width, height, count in report["sizes"]} == sizes
    assert report["patients_in_several_splits"] == {}
    overlays = sorted(Path(f"inspect-{name}").glob("overlay-*.png"))
    assert len(overlays) == min(4, len(tiny.boxes))

    command = shlex.split(report["next"])
    assert command[:3] == ["python", "-m", "muse_fast.prepare"]
    assert f"next: {report['next']}" in printed
    assert main(command[3:]) == 0
    rois = RoiSet(command[4])
    assert rois.num_nuclei.sum() == sum(map(len, tiny.boxes.values()))


def test_overlays_have_a_dot_on_every_nucleus(tmp_path: Path) -> None:
    tiny = DATASETS["pannuke_zip"](tmp_path / "pannuke")
    assert main(["inspect", str(tiny.folder), "--out", "deep/pictures"]) == 0
    seen: Counter[int] = Counter()
    for path in Path("deep/pictures").glob("overlay-*.png"):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))[32:][:, 10:]  # below the key, right of the margin
        for boxes in tiny.boxes.values():
            at = [(int(box.centre[1] * 1024 / 48), int(box.centre[0] * 1024 / 48)) for box in boxes]
            colours = [PALETTE[box.label] for box in boxes]
            if boxes and all(tuple(pixels[place]) == colour for place, colour in zip(at, colours, strict=True)):
                seen[len(boxes)] += 1
    assert seen == {7: 1, 1: 1, 5: 1}


def test_patients_in_two_splits_of_the_real_brcam2c(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reduced to the images of a few slides: the two patients of the official leak and some others."""
    for part in ("images", "labels"):
        (tmp_path / "brca").mkdir(exist_ok=True)
        (tmp_path / "brca" / part).symlink_to(shared_data / "brcam2c" / part)
    whole = {}
    for split in ("train", "val", "test"):
        names = (shared_data / "brcam2c" / f"brca_ds_{split}.txt").read_text().split()
        whole |= dict.fromkeys(names, split)
        kept = [name for name in names if patient(name) in ("TCGA-A7-A0DB", "TCGA-A7-A13G")] + names[:1]
        (tmp_path / "brca" / f"brca_ds_{split}.txt").write_text("\n".join(dict.fromkeys(kept)))
    assert main(["inspect", str(tmp_path / "brca")]) == 0
    report = json.loads((tmp_path / "inspect-brca" / "report.json").read_text())
    leaks = {"TCGA-A7-A0DB": ["train", "val"], "TCGA-A7-A13G": ["train", "val"]}
    assert report["patients_in_several_splits"] == leaks
    printed = capsys.readouterr().out
    assert "several splits: TCGA-A7-A0DB (train and val), TCGA-A7-A13G (train and val)" in printed
    of_patient: dict[str | None, set[str]] = {}
    for name, split in whole.items():
        of_patient.setdefault(patient(name.split("_")[0]), set()).add(split)
    assert {one: sorted(splits) for one, splits in of_patient.items() if len(splits) > 1} == leaks


def test_an_unreadable_image_does_not_stop_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = DATASETS["ocelot"](tmp_path / "ocelot")
    tiny.files["001"][0].write_bytes(b"not an image")
    code, report = inspected(tiny)
    assert code == 2
    assert (report["images"], report["images_read"], report["images_unreadable"]) == (4, 3, 1)
    assert report["splits"]["train"]["nuclei"] == 0
    assert "  error    " in (printed := capsys.readouterr().out)
    assert "001.jpg: not a readable image" in printed


def test_only_some_images_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = DATASETS["pannuke_flat"](tmp_path / "pannuke")
    _, report = inspected(tiny, "--images", "2")
    assert (report["images"], report["images_read"]) == (4, 2)
    assert "nuclei counted in 2 of 4 images" in capsys.readouterr().out
    assert len(list(Path("inspect-pannuke").glob("overlay-*.png"))) == 2


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        ("ocelot", "metadata.json", "the nearest is ocelot, but metadata.json is missing"),
        ("brcam2c", "brca_ds_val.txt", "the nearest is brcam2c, but brca_ds_val.txt is missing"),
        ("cellvit", "label_map.yaml", "the nearest is cellvit, but label_map.yaml is missing"),
        ("muse", "metadata.csv", "the nearest is muse, but metadata.csv is missing"),
        (
            "puma",
            "01_training_dataset_geojson_nuclei",
            "training_dataset_geojson_nuclei/*_nuclei.geojson is missing",
        ),
        ("lizard", "Lizard_Labels/info.csv", "the nearest is lizard, but **/info.csv is missing"),
    ],
)
def test_the_nearest_layout_and_missing_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, gone: str, message: str
) -> None:
    folder = DATASETS[name](tmp_path / name).folder
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["inspect", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_folders_that_are_not_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = DATASETS["consep"](tmp_path / "zip" / "CoNSeP")
    (tmp_path / "empty").mkdir()
    for argv, message in (
        ([str(tmp_path / "zip")], "zip/CoNSeP is laid out as consep: inspect that one"),
        ([str(tmp_path / "empty")], "empty has no known layout (brcam2c, ocelot"),
        ([str(tmp_path / "absent")], "absent is not a folder"),
        ([str(tiny.folder), "merg=no"], "consep: no setting 'merg'; did you mean 'merge'?"),
        ([str(tiny.folder), "merge"], "'merge': expected key=value"),
        ([str(tiny.folder), "--images", "0"], "--images=0: expected 1 or more"),
    ):
        assert main(["inspect", *argv]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("inspect-*")] == []


def test_a_missing_scale_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = DATASETS["puma"](tmp_path / "puma")
    assert main(["inspect", str(tiny.folder)]) == 2
    printed = capsys.readouterr()
    assert "is laid out as puma: " in printed.out
    assert "the TIFF does not state um per pixel" in printed.err


def test_the_evaluation_cache_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "mpp_0.25-size_512-valid_224.npy", np.zeros(1))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is the evaluation cache of the authors' code: a pickle" in capsys.readouterr().err


def test_the_kind_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder may fit several layouts."""
    tiny = DATASETS["points"](tmp_path / "points")
    assert main(["inspect", tiny.spec, "mpp=0.25"]) == 0
    assert "laid out as points" in capsys.readouterr().out


def test_a_folder_of_slides(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").symlink_to(shared_data / "wsi" / "cmu-1-small-region.svs")
    assert recognise(tmp_path / "slides") == "wsi"
    assert main(["inspect", str(tmp_path / "slides")]) == 0
    printed = capsys.readouterr().out
    assert "laid out as wsi: whole slides" in printed
    assert "prepare wsi:" in printed
