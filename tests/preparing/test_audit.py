"""Slides and patients that two sets share."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from muse_fast import prepare
from muse_fast.errors import UserError
from muse_fast.preparing.audit import open_without, read_names
from muse_fast.roiset.roiset import RoiSetWriter
from muse_fast.runtime.cli import run
from muse_fast.sources.names import patient, slide_name
from muse_fast.sources.wsi import Slides

main = partial(run, prepare.main)


@pytest.mark.parametrize(
    ("name", "slide", "of"),
    [
        ("TCGA-A7-A0DB-01Z-00-DX1", "TCGA-A7-A0DB-01Z-00-DX1", "TCGA-A7-A0DB"),
        ("TCGA-A7-A0DB-01Z-00-DX1.4F3A-99.svs", "TCGA-A7-A0DB-01Z-00-DX1", "TCGA-A7-A0DB"),
        ("tcga-cr-7395-01a-01-ts1", "TCGA-CR-7395-01A-01-TS1", "TCGA-CR-7395"),
        (" some/where/TCGA-A7-A0DB.svs ", "TCGA-A7-A0DB", "TCGA-A7-A0DB"),
        ("TCGA-A7-A0DBX", "TCGA-A7-A0DBX", None),
        ("case.1.ndpi", "case.1", None),
        ("Case.1", "Case.1", None),
    ],
)
def test_names(name: str, slide: str, of: str | None) -> None:
    assert (slide_name(name), patient(name)) == (slide, of)


def audit(capsys: pytest.CaptureFixture[str], *sides: str) -> tuple[int, str]:
    code = main(["audit", *sides])
    out, err = capsys.readouterr()
    return code, out + err


def test_the_official_split_of_brcam2c(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"brcam2c:{shared_data / 'brcam2c'}"
    code, said = audit(capsys, f"{source}@train", f"{source}@val")
    assert code == 1
    assert "shared slides   none\n" in said
    assert "shared patients TCGA-A7-A0DB, TCGA-A7-A13G\n" in said
    for one, other in (("train", "test"), ("val", "test")):
        code, said = audit(capsys, f"{source}@{one}", f"{source}@{other}")
        assert code == 0 and "shared patients none" in said
    assert audit(capsys, f"{source}@test", f"{source}@train", source)[0] == 1  # one of the others is enough
    code, said = audit(capsys, f"{source}@tests", source)
    assert code == 2 and "no split 'tests', it has test, train, val" in said


@pytest.fixture
def rois(tmp_path: Path) -> str:
    with RoiSetWriter(tmp_path / "rois", provenance={}) as writer:
        for slide, split in (("TCGA-AA-0001-01Z", "train"), ("case.1", "val"), ("case.1", "val")):
            writer.add(np.zeros((8, 8, 3), np.uint8), mpp=0.5, xy=[], slide=slide, split=split)
    return str(tmp_path / "rois")


def test_roi_sets_and_lists(tmp_path: Path, rois: str, capsys: pytest.CaptureFixture[str]) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("TCGA-AA-0001-02Z.abc.svs\nother\n")
    code, said = audit(capsys, rois, str(listing))
    assert code == 1 and "shared slides   none" in said and "shared patients TCGA-AA-0001" in said
    assert audit(capsys, f"{rois}@val", str(listing))[0] == 0
    listing.write_text("\ufeffgroup,slide\nx,case.1\n\n,other\n")
    code, said = audit(capsys, f"{rois}@val", str(listing))
    assert code == 1 and "shared slides   case.1" in said
    assert audit(capsys, f"{rois}@train", str(listing))[0] == 0
    code, said = audit(capsys, f"{rois}@test", str(listing))
    assert code == 2 and "no split 'test'" in said


def test_slides_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    (tmp_path / "a@b" / "case.svs").write_text("not a slide")
    assert read_names(f"wsi:{tmp_path / 'a@b'}").slides == {"case"}  # an @ in an existing path does not select a split


def test_exclude_accepts_the_same_sets_as_audit(tmp_path: Path, rois: str) -> None:
    (tmp_path / "in").mkdir()
    for name in ("TCGA-AA-0001-02Z", "case.1", "other", "case.2"):
        (tmp_path / "in" / f"{name}.svs").write_text("is not opened")
    (tmp_path / "names.csv").write_text("slide\nother\n")
    spec, given = f"wsi:{tmp_path / 'in'}", {"exclude": f"{rois},{tmp_path / 'names.csv'}", "mpp": "0.4"}
    source = open_without(spec, given)
    assert isinstance(source, Slides)
    assert [(file.name, file.mpp) for file in source.files] == [("case.2", 0.4)]
    assert sorted(source.excluded.values()) == [
        f"patient TCGA-AA-0001 is also in {rois}",
        f"slide case.1 is also in {rois}",
        f"slide other is also in {tmp_path / 'names.csv'}",
    ]
    assert [file.name for file in open_without(spec, {"exclude": f"{rois}@val"}).files] == [  # type: ignore[attr-defined]
        "TCGA-AA-0001-02Z", "case.2", "other",
    ]  # fmt: skip
    with pytest.raises(UserError, match="absent: expected the folder of a ROI set"):
        open_without(spec, {"exclude": "absent"})
    with pytest.raises(UserError, match=r"synthetic:3: exclude=absent is only for slides \(wsi:PATH\)"):
        open_without("synthetic:3", {"exclude": "absent"})


def test_sets_without_slides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: expected the folder of a ROI set, a source"):
        read_names("nowhere")
    (tmp_path / "empty.csv").write_text("slide\n")
    with pytest.raises(UserError, match="contains no slides"):
        read_names(str(tmp_path / "empty.csv"))
