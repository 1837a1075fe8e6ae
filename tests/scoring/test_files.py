"""``evaluate points``: folders of CSV files scored against each other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.evaluate import main
from muse_fast.images.points import Points
from muse_fast.runtime.cli import run
from muse_fast.scoring.protocols import PROTOCOLS
from muse_fast.scoring.scores import evaluate

TRUTH = {"a.csv": "x,y,label\n10,10,0\n20,20,1\n", "b.csv": "x,y,label\n5,5,1\n", "c.csv": "x,y,label\n"}
FOUND = {
    "a.csv": "x,y,label,score\n11,10,0,0.9\n20,22,0,0.8\n",
    "b.csv": "x,y,label,score\n5,5.5,1,0.7\n40,40,0,0.1\n",
    "c.csv": "x,y,label,score\n",
}


def folders(tmp_path: Path, found: dict[str, str] = FOUND, truth: dict[str, str] = TRUTH) -> list[str]:
    for name, files in (("found", found), ("truth", truth)):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
    return ["points", "--predictions", str(tmp_path / "found"), "--truth", str(tmp_path / "truth"), "--mpp", "0.5"]


def test_all_protocols_and_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    command = [*folders(tmp_path), "--classes", "lymphocyte,tumour", "--draws", "30", "--json", str(out)]
    assert main(command) == 0
    report = json.loads(out.read_text())
    assert report["classes"] == ["lymphocyte", "tumour"]
    assert list(report["protocols"]) == list(PROTOCOLS)
    predictions = [
        Points(np.array([[11.0, 10], [20, 22]]), np.array([0, 0]), np.array([0.9, 0.8])),
        Points(np.array([[5.0, 5.5], [40, 40]]), np.array([1, 0]), np.array([0.7, 0.1])),
        Points(np.zeros((0, 2)), np.zeros(0, np.int64)),
    ]
    truths = [
        Points(np.array([[10.0, 10], [20, 20]]), np.array([0, 1])),
        Points(np.array([[5.0, 5]]), np.array([1])),
        Points(np.zeros((0, 2)), np.zeros(0, np.int64)),
    ]
    for name in PROTOCOLS:
        expected = evaluate(predictions, truths, 0.5, 2, name, draws=30)
        assert report["protocols"][name] == json.loads(json.dumps(dataclasses.asdict(expected))), name
    assert report["protocols"]["ocelot"]["detection"]["tp"] == 3
    assert [one["tp"] for one in report["protocols"]["ocelot"]["classes"]] == [1, 1]
    shown = capsys.readouterr().out
    assert "4 points in 3 images, against 3" in shown
    assert all(name in shown for name in (*PROTOCOLS, "lymphocyte", "tumour"))
    assert "\x1b" not in shown


def test_one_protocol_with_a_radius(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    assert main([*folders(tmp_path), "--protocol", "puma", "--radius", "0.6", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert list(report["protocols"]) == ["puma"]
    assert report["protocols"]["puma"]["radius_um"] == 0.6
    assert report["protocols"]["puma"]["detection"]["tp"] == 2  # (20, 22) is 1 um away
    assert report["classes"] == ["0", "1"]
    assert "precision" in capsys.readouterr().out


@pytest.mark.parametrize("ignored", [False, True])
def test_points_without_classes(tmp_path: Path, ignored: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Without labels, or with --ignore-labels, only detection is scored."""
    bare = {name: "\n".join(",".join(row.split(",")[:2]) for row in text.split()) for name, text in TRUTH.items()}
    out = tmp_path / "scores.json"
    command = folders(tmp_path, FOUND if ignored else bare, bare if not ignored else TRUTH)
    assert main([*command, *(["--ignore-labels"] if ignored else []), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["classes"] == []
    assert report["protocols"]["ocelot"]["detection"]["tp"] == 3
    shown = capsys.readouterr().out
    assert ("no scores" in shown) == (not ignored)
    assert "mean" not in shown


def test_files_without_points_need_no_label_column(tmp_path: Path) -> None:
    """A detector that found no nuclei scores 0 instead of raising an error."""
    out = tmp_path / "scores.json"
    assert main([*folders(tmp_path, dict.fromkeys(TRUTH, "x,y\n")), "--json", str(out)]) == 0
    scores = json.loads(out.read_text())["protocols"]["promptnucseg"]
    assert [(one["tp"], one["fp"], one["fn"]) for one in scores["classes"]] == [(0, 0, 1), (0, 0, 2)]


@pytest.mark.parametrize(
    ("found", "truth", "more", "message"),
    [
        ({"a.csv": FOUND["a.csv"]}, TRUTH, [], "found lacks b.csv, c.csv, which .*truth has"),
        (FOUND, {"a.csv": TRUTH["a.csv"]}, [], "truth lacks b.csv, c.csv, which .*found has"),
        ({}, {}, [], "truth has no .csv"),
        ({**FOUND, "b.csv": "x,y\n5,5\n"}, TRUTH, [], "found/b.csv: points without a label"),
        ({**FOUND, "b.csv": "x,y,label\n5,5,-1\n"}, TRUTH, [], "found/b.csv: points without a label"),
        (dict.fromkeys(TRUTH, "x,y\n1,1\n"), TRUTH, [], "found/a.csv: points without a label, .*--ignore-labels"),
        ({**FOUND, "a.csv": "x,y,label,score\n1,1,0,nan\n"}, TRUTH, [], "a.csv, row 2: score is 'nan'"),
        ({**FOUND, "a.csv": "x,y,label,score\n1,-1,0,1\n"}, TRUTH, [], "a.csv, row 2: y is '-1', expected a number, 0"),
        ({**FOUND, "a.csv": "x,y,class\n"}, TRUTH, [], r"a.csv, row 1: the header is 'x,y,class'"),
        (FOUND, TRUTH, ["--classes", "tumour"], r"b\.csv, row 2: label is '1', expected a whole number, -1 to 0"),
        (FOUND, TRUTH, ["--protocol", "pumo"], "no protocol 'pumo'.*did you mean 'puma'"),
        (FOUND, TRUTH, ["--radius", "0"], "radius_um=0.0: expected um above 0"),
        (FOUND, TRUTH, ["--draws", "-1"], "--draws=-1: expected 0 or more"),
        (FOUND, TRUTH, ["--mpp", "40"], "--mpp is '40', expected um per pixel"),
    ],
)
def test_mistakes_are_reported(
    tmp_path: Path, found: dict[str, str], truth: dict[str, str], more: list[str], message: str
) -> None:
    out = tmp_path / "scores.json"
    with pytest.raises(UserError, match=message):
        main([*folders(tmp_path, found, truth), *more, "--json", str(out)])
    assert not out.exists()


def test_folders_and_reports_are_checked_first(tmp_path: Path) -> None:
    command = folders(tmp_path)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        main([*command, "--truth", str(tmp_path / "nowhere")])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json exists already"):
        main([*command, "--json", str(tmp_path / "x.json")])
    assert (tmp_path / "x.json").read_text() == "{}"


def test_the_command_ends_with_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, folders(tmp_path, {}, TRUTH)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "lacks a.csv, b.csv, c.csv" in said
    assert said.count("\n") == 1


# -------------------------------------------------------------------------------------------------- files of predict

CELLS = "x,y,label,class,score\n"


def as_predicted(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "cells.csv").write_text(content)
        (folder / name / "summary.json").write_text("{}")
    (folder / "summary.json").write_text("{}")


def test_folders_of_predict_are_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = folders(tmp_path)
    assert main([*command, "--json", str(tmp_path / "plain.json")]) == 0
    named = {
        "a": f'{CELLS}11,10,0,"lymphocyte, small",0.9\n20,22,0,"lymphocyte, small",0.8\n',
        "b": f'{CELLS}5,5.5,1,tumour,0.7\n40,40,0,"lymphocyte, small",0.1\n',
        "c": CELLS,
    }
    as_predicted(tmp_path / "predicted", named)
    command[2] = str(tmp_path / "predicted")
    capsys.readouterr()
    assert main([*command, "--json", str(tmp_path / "cells.json")]) == 0
    plain, cells = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "cells"))
    assert cells["protocols"] == plain["protocols"]
    assert cells["classes"] == ["lymphocyte, small", "tumour"]
    assert "tumour" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cells", "more", "message"),
    [
        ("1,1,0,nucleus,1\n", ["--classes", "tumour,other"], "label 0 'nucleus', --classes 'tumour'.*--ignore-labels"),
        ("1,1,0,nucleus,1\n2,2,0,tumour,1\n", [], "row 3: label 0 is called 'tumour' here, 'nucleus' before"),
    ],
)
def test_conflicting_class_names(tmp_path: Path, cells: str, more: list[str], message: str) -> None:
    command = folders(tmp_path)
    as_predicted(tmp_path / "predicted", {"a": CELLS + cells, "b": CELLS, "c": CELLS})
    command[2] = str(tmp_path / "predicted")
    with pytest.raises(UserError, match=message):
        main([*command, *more])
    out = tmp_path / "scores.json"
    assert main([*command, *more, "--ignore-labels", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["classes"] == []


def test_two_files_that_name_a_label_differently(tmp_path: Path) -> None:
    command = folders(tmp_path)
    as_predicted(tmp_path / "predicted", {"a": f"{CELLS}1,1,1,x,1\n", "b": f"{CELLS}1,1,1,y,1\n", "c": CELLS})
    command[2] = str(tmp_path / "predicted")
    with pytest.raises(UserError, match=r"b/cells\.csv calls label 1 'y', \S+a/cells\.csv 'x': these labels are not"):
        main(command)
    shutil.rmtree(tmp_path / "predicted" / "c")
    with pytest.raises(UserError, match=r"predicted lacks c\.csv, which"):
        main(command)
