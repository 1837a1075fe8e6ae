"""The prepare command: its files, its messages, and that a mistake leaves nothing behind."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast import prepare
from muse_fast.images.synthetic import synthetic_image
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime.cli import run
from tests.support.dicom import write_series
from tests.support.small_slides import damage, page_with_tissue, write_slide

main = partial(run, prepare.main)


QUICK = ["detector=classical", "workers=1"]  # for tests that do not depend on the detector


def test_synthetic_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "set"
    assert main(["synthetic:10", str(out), "size=128", "mpp=0.5"]) == 0
    rois = RoiSet(out)
    assert rois.verify() == []
    assert [len(rois.select(split)) for split in ("train", "val", "test")] == [7, 2, 1]
    for i in (0, 9):
        image, xy, label = synthetic_image((0, i), 128, 0.5)
        np.testing.assert_array_equal(rois[i].xy, xy)
        np.testing.assert_array_equal(rois[i].label, label)
        assert np.abs(rois[i].decode().astype(int) - image).mean() < 3  # JPEG
    summary = json.loads((out / "summary.json").read_text())
    labels = np.concatenate([rois[i].label for i in range(10)])
    assert summary["rois"] == summary["slides"] == 10
    assert summary["nuclei"] == len(labels) == sum(summary["nuclei_per_class"].values())
    assert list(summary["nuclei_per_class"].values()) == np.bincount(labels).tolist()
    assert summary["rois_per_split"] == {"train": 7, "val": 2, "test": 1}
    assert summary["mpp"] == [0.5, 0.5]
    assert summary["bytes"] == sum(path.stat().st_size for path in out.glob("*.bin"))
    assert summary["dropped"] == {}
    assert rois.info["provenance"]["source"] == "synthetic:10"
    with Image.open(out / "contact.png") as sheet:
        colours = sheet.convert("RGB").getcolors(1 << 24) or []
    assert {(255, 235, 60), (0, 229, 255), (255, 70, 50)} <= {colour for _, colour in colours}
    text = capsys.readouterr().out
    assert "10 ROIs of 10 slides" in text
    assert "skipped  nothing" in text


def test_lower_quality_saves_bytes(tmp_path: Path) -> None:
    for quality in ("95", "75"):
        assert main(["synthetic:1", str(tmp_path / quality), "--quality", quality, "size=256"]) == 0
    size = {path.name: (path / "shard-00000.bin").stat().st_size for path in tmp_path.iterdir()}
    assert size["75"] < 0.6 * size["95"]


def points_folder(folder: Path, csv: str, suffix: str = "png") -> Path:
    folder.mkdir()
    for stem, text in (("a", "x,y\n1,2\n"), ("b", csv)):
        Image.fromarray(synthetic_image(0, 64, 0.5)[0]).save(folder / f"{stem}.{suffix}")
        (folder / f"{stem}.csv").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("x,y\n3,4\nnan,2\n", "b.csv, row 3: x is 'nan'"),
        ("x,y\n64,2\n", "b.csv, row 2: x is '64', expected a number, 0 <= x < 64"),
        ("x\n1\n", "b.csv, row 1: the header is 'x'"),
    ],
)
def test_bad_points_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], csv: str, message: str) -> None:
    """The first image is good and has been written when the second fails."""
    folder = points_folder(tmp_path / "in", csv)
    assert main([f"points:{folder}", str(tmp_path / "out"), "mpp=0.5"]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_truncated_jpeg_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = points_folder(tmp_path / "in", "x,y\n", "jpg")
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:-100])
    assert main([f"points:{folder}", str(tmp_path / "out"), "mpp=0.5"]) == 2
    assert "b.jpg: not a readable image" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_image_without_nuclei_is_kept(tmp_path: Path) -> None:
    folder = points_folder(tmp_path / "in", "x,y\n")
    assert main([f"points:{folder}", str(tmp_path / "out"), "mpp=0.5"]) == 0
    assert RoiSet(tmp_path / "out").num_nuclei.tolist() == [1, 0]


def test_slide_without_mpp(tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slide = shared_data / "wsi" / "tcga-cr-7395-01a-01-ts1.svs"
    assert main([f"wsi:{slide}", str(tmp_path / "out")]) == 2
    assert "tcga-cr-7395-01a-01-ts1.svs: the header does not give um per pixel; give mpp=" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_real_slide(tmp_path: Path, shared_data: Path) -> None:
    slide = shared_data / "wsi" / "cmu-1-small-region.svs"
    assert main([f"wsi:{slide}", str(tmp_path / "out"), "roi_um=256", "workers=1"]) == 0
    rois = RoiSet(tmp_path / "out")
    assert rois.verify() == []
    assert set(rois.width.tolist()) == {513}  # 256 um at 0.499
    assert (rois.num_nuclei >= 20).all()
    openslide = pytest.importorskip("openslide")
    page = openslide.OpenSlide(str(slide)).read_region(rois[0].origin, 0, (513, 513)).convert("RGB")
    assert np.abs(rois[0].decode().astype(int) - np.asarray(page)).mean() < 3
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rois"] + sum(summary["dropped"].values()) == 4 * 5


def test_a_folder_with_one_good_and_one_bad_slide(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the two real slides, one has um per pixel in its header and the other does not."""
    out, folder = tmp_path / "out", shared_data / "wsi"
    bad, why = "tcga-cr-7395-01a-01-ts1", "the header does not give um per pixel; give mpp=NUMBER"
    assert main([f"wsi:{folder}", str(out), *QUICK]) == 0
    said = capsys.readouterr().out
    assert said.count(f"{bad}.svs: {why}") == 2 and "1 of 2 slides cannot be used" in said  # before and after the work
    assert RoiSet(out).slides == ["cmu-1-small-region"]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["skipped"]) == [str(folder / f"{bad}.svs")] and why in summary["skipped"][f"{folder}/{bad}.svs"]
    good_row, bad_row = report(out)
    assert (good_row["slide"], good_row["status"], good_row["mpp"], good_row["mpp_from"]) == (
        "cmu-1-small-region",
        "used",
        "0.499",
        "header",
    )
    assert (good_row["rois"], int(good_row["nuclei"])) == ("1", int(RoiSet(out).num_nuclei.sum()))
    assert 0.5 < float(good_row["tissue_mm2"]) < 0.8
    assert (bad_row["slide"], bad_row["status"], bad_row["rois"]) == (bad, "skipped", "0") and why in bad_row["reason"]
    page = (out / "report.html").read_text()
    assert why in page and 'src="report/cmu-1-small-region.jpg"' in page
    with Image.open(out / "report" / "cmu-1-small-region.jpg") as picture:
        assert max(picture.size) == 1024

    both = tmp_path / "both"
    assert main([f"wsi:{folder}", str(both), "mpp=0.5", *QUICK]) == 0
    assert RoiSet(both).slides == ["cmu-1-small-region", bad]
    assert {row["mpp_from"] for row in report(both)} == {"option mpp"}


def report(out: Path) -> list[dict[str, str]]:
    with open(out / "report.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_tissue_goes_to_qupath_and_back(tmp_path: Path, shared_data: Path) -> None:
    slide = shared_data / "wsi" / "cmu-1-small-region.svs"
    settings = ["roi_um=128", "per_slide=8", *QUICK]
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert main([f"wsi:{slide}", str(first), *settings]) == 0
    assert main([f"wsi:{slide}", str(second), *settings, f"tissue={first / 'tissue'}"]) == 0
    for name in ("index.bin", "nuclei.bin", "shard-00000.bin", "tissue/cmu-1-small-region.geojson"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert report(second)[0]["tissue_from"] == "cmu-1-small-region.geojson"

    left = {"type": "Polygon", "coordinates": [[[600, 0], [1200, 0], [1200, 2967], [600, 2967]]]}  # drawn by hand
    path = tmp_path / "edited" / "cmu-1-small-region.geojson"
    path.parent.mkdir()
    path.write_text(json.dumps({"type": "Feature", "properties": {"objectType": "annotation"}, "geometry": left}))
    assert main([f"wsi:{slide}", str(third), *settings, f"tissue={path.parent}", "min_tissue=0.9"]) == 0
    x = RoiSet(third).origin[:, 0]
    assert (x >= 590).all() and (x + 257 <= 1210).all()


def test_slides_and_groups_are_balanced(tmp_path: Path) -> None:
    """One slide in group A and three in group B, of which one is excluded by its patient."""
    folder, table = tmp_path / "in", tmp_path / "groups.csv"
    names = ["TCGA-AA-0001-01Z", "TCGA-AA-0002-01Z", "TCGA-AA-0003-01Z", "case"]
    for seed, name in enumerate(names):
        write_slide(folder / f"{name}.tif", page_with_tissue(seed, 600, 700, 512))
    table.write_text("slide,group\n" + "".join(f"{name},{'A' if name == 'case' else 'B'}\n" for name in names))
    (tmp_path / "tested.txt").write_text("TCGA-AA-0002-02A-TS1\n")
    options = ["roi_um=32", "min_nuclei=1", f"groups={table}", f"exclude={tmp_path / 'tested.txt'}", *QUICK]
    assert main([f"wsi:{folder}", str(tmp_path / "out"), *options, "max_rois=41"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rois"] == 40 and summary["rois_per_group"] == {"A": 20, "B": 20}
    assert list(summary["excluded"].values()) == [f"patient TCGA-AA-0002 is also in {tmp_path / 'tested.txt'}"]
    rows = {row["slide"]: row for row in report(tmp_path / "out")}
    assert [rows[name]["status"] for name in names] == ["used", "excluded", "used", "used"]
    assert int(rows[names[0]]["rois"]) + int(rows[names[2]]["rois"]) == 20
    assert sum(int(row["not_sampled"]) for row in rows.values()) == summary["dropped"]["not sampled"] > 50
    assert main(["audit", str(tmp_path / "out"), str(tmp_path / "tested.txt")]) == 0


def test_a_slide_with_too_much_damage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_slide(tmp_path / "in" / "bad.tif", page_with_tissue(0, 600, 700, 512), compression="zlib")
    damage(path, 4)
    assert main([f"wsi:{path}", str(tmp_path / "out"), "roi_um=64"]) == 2
    assert f"no slide can be used\n  {path}: unreadable at" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_each_slide_is_in_the_set_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A series of three files in a linked folder, whose row of the table is not of its first file, and a copy."""
    folder, out = tmp_path / "in", tmp_path / "out"
    slide = write_slide(folder / "b.tif", page_with_tissue(0, 400, 400, 300))
    (folder / "copy.tif").write_bytes(slide.read_bytes())
    write_series(tmp_path / "elsewhere", "s", page_with_tissue(1, 400, 400, 300), 0.25)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "mpp.csv").write_text("image,mpp,split\ns-1,0.5,test\nabsent,0.5,test\n")
    settings = ["roi_um=64", "min_nuclei=1", "workers=1", "detector=classical"]
    assert main([f"wsi:{folder}", str(out), *settings]) == 0
    said, summary = capsys.readouterr().out, json.loads((out / "summary.json").read_text())
    rows = {row["slide"]: row for row in report(out)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "b": "used", "copy": "repeated", "s-0": "repeated", "s-1": "used", "s-2": "repeated",
    }  # fmt: skip
    assert (rows["s-1"]["mpp"], rows["s-1"]["mpp_from"], rows["b"]["mpp"]) == ("0.5", "mpp.csv", "0.5")
    assert summary["rois_per_split"].keys() == {"", "test"} and summary["slides"] == 2
    assert rows["copy"]["reason"] == f"the same slide as {slide}" and len(summary["repeated"]) == 3
    line = f"{folder / 'linked' / 'mpp.csv'}: 1 of 2 rows match no slide or image: absent (row 3)"
    assert summary["without_effect"] == [line] and f"no effect: {line}" in said
    assert "3 of 5 files are of slides that are read already:" in said


def test_parts_of_other_settings_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_slide(tmp_path / "in" / "a.tif", page_with_tissue(0, 600, 700, 512))
    settings = [f"wsi:{path}", str(tmp_path / "out"), "roi_um=64", "min_nuclei=1", "workers=1"]
    assert main([*settings, "--task", "0/1"]) == 0
    assert main([*settings, "threshold=0.05"]) == 2
    assert "contains parts made with other settings (threshold=" in capsys.readouterr().err
    assert (tmp_path / "out.parts" / "a" / "part.json").is_file()
    assert main(settings) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["synthetic:2", "OUT", "sise=64"], "did you mean 'size'"),
        (["synthetic:2", "OUT", "size"], "'size': expected key=value"),
        (["nothing:2", "OUT"], "'nothing:2' is not a source"),
        (["wsi:absent.svs", "OUT"], "absent.svs: no such file or folder"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main([str(tmp_path / "out") if arg == "OUT" else arg for arg in argv]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_set_without_rois_is_an_error(tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slide = shared_data / "wsi" / "cmu-1-small-region.svs"
    assert main([f"wsi:{slide}", str(tmp_path / "out"), "roi_um=512", "min_tissue=1"]) == 2
    assert "yielded no ROIs; skipped: too little tissue 4" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_set_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    assert main(["synthetic:1", str(tmp_path / "out"), "size=64"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_full_disk(tmp_path: Path) -> None:
    """A limit on file sizes replaces a full disk: the write fails in the middle of the set."""
    script = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from muse_fast import prepare
from muse_fast.runtime.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.exit(run(prepare.main, ["synthetic:8", sys.argv[1], "size=128"]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "out was not written: [Errno 27] File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []
