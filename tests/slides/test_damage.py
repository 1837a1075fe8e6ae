"""Damage is never taken for glass: slides damaged in several ways, and pages on which nothing is found."""

from __future__ import annotations

import csv
import html
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast.images.synthetic import synthetic_image
from muse_fast.predict import main as predict_main
from muse_fast.prepare import main as prepare_main
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime.cli import run
from tests.support.planted import write_pyramid
from tests.support.small_slides import damage, page_with_tissue, tifffile, write_slide

WIDTH, HEIGHT, FACTORS = 1024, 768, (4, 16)
CUT = ["roi_um=64", "min_nuclei=1", "detector=classical", "workers=0"]


def predict(out: Path, *words: object) -> int:
    return run(predict_main, ["--weights", "classical", "--out", str(out), *map(str, words)])


def prepare(out: Path, slides: Path, *words: str) -> int:
    return run(prepare_main, [f"wsi:{slides}", str(out), *CUT, *words])


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def nuclei(folder: Path) -> np.ndarray:
    rows = (line.split(",") for line in (folder / "cells.csv").read_text().splitlines()[1:])
    return np.array([(float(row[0]), float(row[1])) for row in rows]).reshape(-1, 2)


def report(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "report.csv", newline="") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def page() -> np.ndarray:
    """Glass with a square of tissue of 700 px at x 300, y 40; at 0.5 um/px."""
    return page_with_tissue(1, HEIGHT, WIDTH, 700)


@pytest.fixture(scope="module", params=[".tif", pytest.param(".svs", marks=pytest.mark.heavy)])
def sound(request: pytest.FixtureRequest, page: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide with levels of 1/1, 1/4 and 1/16 in its folder, with what `predict` and `prepare` find beside it."""
    folder = tmp_path_factory.mktemp("sound")
    path = write_pyramid(folder / "in" / f"a{request.param}", page, 0.5, FACTORS, "zlib")
    assert predict(folder / "predicted", path) == prepare(folder / "prepared", path) == 0
    assert summary(folder / "predicted")["unreadable_mm2"] == summary(folder / "prepared")["unreadable_mm2"] == 0
    assert len(nuclei(folder / "predicted" / "a")) > 200 and len(RoiSet(folder / "prepared")) > 20
    return path


def damaged(sound: Path, folder: Path, *levels: int, tiles: tuple[int, ...] = ()) -> Path:
    path = folder / "in" / sound.name
    path.parent.mkdir()
    path.write_bytes(sound.read_bytes())
    for level in levels:
        damage(path, *tiles, level=level)
    return path


def test_a_damaged_overview_is_made_from_finer_levels(sound: Path, tmp_path: Path) -> None:
    levels = (2,) if sound.suffix == ".tif" else (1, 2)  # the coarsest level, or all but level 0
    path, beside = damaged(sound, tmp_path, *levels), sound.parent.parent
    assert predict(tmp_path / "predicted", path) == prepare(tmp_path / "prepared", path) == 0
    np.testing.assert_array_equal(nuclei(tmp_path / "predicted" / "a"), nuclei(beside / "predicted" / "a"))
    for name in ("index.bin", "nuclei.bin", "shard-00000.bin"):
        assert (tmp_path / "prepared" / name).read_bytes() == (beside / "prepared" / name).read_bytes()
    assert summary(tmp_path / "predicted")["unreadable_mm2"] == summary(tmp_path / "prepared")["unreadable_mm2"] == 0


def test_a_slide_that_cannot_be_read_is_refused(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(sound, tmp_path, 0, 1, 2)
    assert predict(tmp_path / "predicted", path) == 2
    assert f"{path}: unreadable at 0, 0, level 0" in capsys.readouterr().err
    assert not (tmp_path / "predicted" / "a").exists()
    assert predict(tmp_path / "everywhere", path, "tissue=false", "max_unreadable=0.99") == 2
    assert prepare(tmp_path / "prepared", path) == 2
    assert f"no slide can be used\n  {path}: unreadable at 0, 0, level 0" in capsys.readouterr().err
    write_slide(path.parent / "b.tif", page_with_tissue(1, HEIGHT, WIDTH, 700))  # the others are done
    assert predict(tmp_path / "both", path.parent) == 2
    assert list(summary(tmp_path / "both")["refused"]) == [str(path)] and len(nuclei(tmp_path / "both" / "b")) > 200
    assert prepare(tmp_path / "others", path.parent) == 0
    assert {name: row["status"] for name, row in report(tmp_path / "others").items()} == {"a": "skipped", "b": "used"}


def test_a_format_that_opens_but_does_not_decode_is_refused(
    page: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in" / "floats.tif"
    path.parent.mkdir()
    tifffile.imwrite(
        path, (page / 255).astype(np.float32), tile=(256, 256), photometric="rgb", resolution=(2e4, 2e4),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    assert predict(tmp_path / "predicted", path) == prepare(tmp_path / "prepared", path) == 2
    assert capsys.readouterr().err.count(f"{path}: ") == 2


def test_half_of_level_0(sound: Path, page: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The overview shows all of the tissue: the damage is met in the tiles and in the ROIs."""
    left = (0, 1, 4, 5, 8, 9)  # of 4 columns and 3 rows: x below 512
    path, beside = damaged(sound, tmp_path, 0, tiles=left), sound.parent.parent
    assert predict(tmp_path / "predicted", path) == 2 and prepare(tmp_path / "prepared", path) == 2
    said = capsys.readouterr().err
    assert said.count("to search cannot be read, more than max_unreadable=0.05; copy the slide again") == 2

    share = "max_unreadable=0.5"  # of the tissue, x 300 to 1000, 30 % is lost
    assert predict(tmp_path / "half", path, share) == prepare(tmp_path / "half_set", path, share) == 0
    expected, found = nuclei(beside / "predicted" / "a"), nuclei(tmp_path / "half" / "a")
    away = 512 + 40  # pixels: beyond the reach of the detector
    np.testing.assert_array_equal(found[found[:, 0] > away], expected[expected[:, 0] > away])
    assert not (found[:, 0] < 512).any() and len(found) > 100
    lost_mm2 = 0.5e-3**2 * (512 - 300) * 700
    said = summary(tmp_path / "half" / "a")
    assert said["unreadable_mm2"] == pytest.approx(lost_mm2, rel=0.1)  # the mask follows the tissue to a pixel of 8 um
    whole = summary(beside / "predicted" / "a")
    assert said["area_mm2"] + said["unreadable_mm2"] == pytest.approx(whole["area_mm2"])
    assert said["nuclei_per_mm2"] == pytest.approx(whole["nuclei_per_mm2"], rel=0.1)

    row = report(tmp_path / "half_set")["a"]
    assert float(row["unreadable_mm2"]) == summary(tmp_path / "half_set")["unreadable_mm2"]
    assert float(row["unreadable_mm2"]) == pytest.approx(lost_mm2, rel=0.1) and int(row["unreadable"]) >= 12
    assert "mm2 of the tissue cannot be read, see report.csv" in capsys.readouterr().out
    assert prepare(tmp_path / "large", path, share, "roi_um=300", "min_tissue=0.3") == 2
    assert "none of the 1 squares with tissue can be read" in capsys.readouterr().err
    kept, all_ = RoiSet(tmp_path / "half_set"), RoiSet(beside / "prepared")
    right = [i for i in range(len(all_)) if all_.origin[i][0] > away]
    assert len(right) == (kept.origin[:, 0] > away).sum() > 5
    jpegs = {tuple(kept.origin[i]): kept[i].jpeg for i in range(len(kept))}
    assert all(jpegs[tuple(all_.origin[i])] == all_[i].jpeg for i in right)


def test_a_level_that_the_detector_reads_is_replaced(page: np.ndarray, tmp_path: Path) -> None:
    """At 0.125 um/px the detector reads the level of 1/4, which has the pixels of the page."""
    fine = np.asarray(Image.fromarray(page[:400, 200:600]).resize((1600, 1600), Image.Resampling.NEAREST))
    for name, levels in (("whole", ()), ("damaged", (1,))):
        path = write_pyramid(tmp_path / name / "a.tif", fine, 0.125, FACTORS, "zlib")
        for level in levels:
            damage(path, level=level)
        assert predict(tmp_path / name / "out", path) == 0
    found, expected = (nuclei(tmp_path / name / "out" / "a") for name in ("damaged", "whole"))
    assert len(expected) > 20
    np.testing.assert_array_equal(found, expected)


def test_tissue_is_lost_and_only_glass_is_left(page: np.ndarray, tmp_path: Path) -> None:
    path = write_slide(tmp_path / "in" / "a.tif", page, compression="zlib")
    damage(path, 1, 2, 3, 5, 6, 7, 9, 10, 11)  # all but x below 256
    for most in (0.05, 0.99):
        assert predict(tmp_path / f"{most}", path, f"max_unreadable={most}") == 2
        assert prepare(tmp_path / f"set_{most}", path, f"max_unreadable={most}") == 2


def test_damage_beside_the_given_tissue_does_not_matter(page: np.ndarray, tmp_path: Path) -> None:
    path = write_slide(tmp_path / "in" / "a.tif", page, compression="zlib")
    damage(path, 0, 4, 8)  # the left quarter, which is glass
    (tmp_path / "tissue").mkdir()
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[40:740, 320:1000] = 255
    Image.fromarray(mask).save(tmp_path / "tissue" / "a.png")
    assert prepare(tmp_path / "prepared", path) == 2
    assert prepare(tmp_path / "given", path, f"tissue={tmp_path / 'tissue'}") == 0
    assert summary(tmp_path / "given")["unreadable_mm2"] == 0


# ------------------------------------------------------------------------------------------------- nothing is found


def test_patches_are_all_tissue(tmp_path: Path) -> None:
    """Of datasets such as PanNuke, 64 um wide: too small for the filter of specks."""
    for side in (1, 96, 256, 400, 1000):
        Image.fromarray(synthetic_image(side, side, 0.25)[0]).save(tmp_path / f"{side}.png")
    assert predict(tmp_path / "default", tmp_path, "mpp=0.25") == 0
    assert predict(tmp_path / "everywhere", *tmp_path.glob("*.png"), "mpp=0.25", "tissue=false") == 0
    for side in (1, 96, 256, 400, 1000):
        expected = nuclei(tmp_path / "everywhere" / f"{side}")
        np.testing.assert_array_equal(nuclei(tmp_path / "default" / f"{side}"), expected)
        assert len(expected) > 0 or side == 1
        assert summary(tmp_path / "default" / f"{side}")["area_mm2"] == pytest.approx((side * 0.25e-3) ** 2, abs=1e-6)


def test_predict_says_where_it_found_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    glass, pink = np.full((700, 800, 3), 245, np.uint8), np.full((700, 800, 3), (230, 160, 200), np.uint8)
    for name, image in (("glass", glass), ("pink", pink), ("good", page_with_tissue(0, 700, 800, 600))):
        write_slide(tmp_path / "in" / f"{name}.tif", image)
    assert predict(tmp_path / "out", tmp_path / "in") == 0
    reasons = {
        "glass.tif": "no tissue found; if there is some, tissue=false searches everywhere",
        "pink.tif": "no nuclei found on 0.14 mm2: is 0.5 um/px right, and is it H&E?",
    }
    found = {name: summary(tmp_path / "out" / name)["nothing_found"] for name in ("glass", "pink", "good")}
    assert found == {"glass": reasons["glass.tif"], "pink": reasons["pink.tif"], "good": ""}
    assert summary(tmp_path / "out")["nothing_found"] == reasons
    said = capsys.readouterr().out
    assert "2 of 3 inputs have no nuclei:\n" in said
    for name, reason in reasons.items():
        assert said.count(f"{name}: {reason}") == 2  # when it is done, and at the end


def test_prepare_says_where_it_found_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    glass, pink = np.full((610, 620, 3), 245, np.uint8), np.full((610, 620, 3), (230, 160, 200), np.uint8)
    tissue, little = page_with_tissue(0, 610, 620, 512), glass.copy()
    little[100:350, 100:350] = pink[0, 0]
    pages = {"glass": glass, "pink": pink, "little": little, "small": tissue[:300, :180]}
    for name, image in pages.items():
        write_slide(tmp_path / "in" / f"{name}.tif", image)
    assert prepare(tmp_path / "none", tmp_path / "in", "roi_um=100", "min_tissue=0.99") == 2
    assert f"{tmp_path / 'in' / 'small.tif'}: smaller than a ROI: 90 x 150 um, roi_um=100" in capsys.readouterr().err
    write_slide(tmp_path / "in" / "good.tif", tissue)
    assert prepare(tmp_path / "out", tmp_path / "in", "roi_um=100", "min_tissue=0.99") == 0
    rows = report(tmp_path / "out")
    reasons = {name: row["reason"] for name, row in rows.items() if row["status"] == "empty"}
    assert reasons == {
        "glass": "no tissue found; tissue=FOLDER takes yours, min_tissue=0 searches everywhere",
        "pink": "no nuclei found in 9 squares with tissue: is 0.5 um/px right, and is it H&E?",
        "little": "no square has enough tissue for min_tissue=0.99",
        "small": "smaller than a ROI: 90 x 150 um, roi_um=100",
    }
    assert rows["good"]["status"] == "used" and rows["good"]["reason"] == ""
    assert summary(tmp_path / "out")["nothing_found"] == {
        str(tmp_path / "in" / f"{name}.tif"): reason for name, reason in reasons.items()
    }
    said = capsys.readouterr().out
    assert "4 of 5 slides without ROIs:\n" in said and all(reason in said for reason in reasons.values())
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(html.escape(reason) in page for reason in reasons.values())
    assert prepare(tmp_path / "many", tmp_path / "in" / "good.tif", "roi_um=100", "min_nuclei=100000") == 2
    assert "squares with tissue has min_nuclei=100000 nuclei" in capsys.readouterr().err
