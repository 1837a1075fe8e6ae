"""The evaluate command, on a few real images with small tiles."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from muse_fast import embed_slide
from muse_fast.classification.features import CropFeatures, extract_features
from muse_fast.classification.metrics import METRICS
from muse_fast.classification.tasks import KnnConfig, TuneConfig
from muse_fast.classification.tiles import cut_crops
from muse_fast.errors import UserError
from muse_fast.evaluate import main
from muse_fast.models.backbone import build_backbone
from muse_fast.runtime import checkpoint
from muse_fast.runtime.options import load_settings
from muse_fast.sources import open_source


@pytest.fixture(scope="module")
def few(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BRCA-M2C with one image per split."""
    folder = tmp_path_factory.mktemp("brcam2c")
    whole = shared_data / "brcam2c"
    for part in ("images", "labels"):
        (folder / part).symlink_to(whole / part)
    for split in ("train", "val", "test"):
        name = (whole / f"brca_ds_{split}.txt").read_text().split()[0]
        (folder / f"brca_ds_{split}.txt").write_text(name + "\n")
    return folder


def evaluate(task: str, data: Path, out: Path, *more: str, weights: tuple[str, ...] = ("random:vit_tiny",)) -> dict:
    code = main([task, "--weights", *weights, "--data", f"brcam2c:{data}", "--size", "96", "--json", str(out), *more])
    assert code == 0
    return json.loads(out.read_text())


@pytest.mark.usefixtures("thin")
def test_knn_reports_both_choices_of_k(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate("knn", few, tmp_path / "a" / "knn.json", "k=[1,5,100000]", "standardise=raw")
    nuclei = {image.split: len(image.xy) for image in open_source(f"brcam2c:{few}")}
    assert {split: sum(counts) for split, counts in report["data"]["nuclei"].items()} == nuclei
    on_val, on_test = report["results"]
    assert on_val["selection"].endswith("chosen on val")
    assert on_test["selection"].endswith("best on test")
    assert on_test["k_skipped"] == [100000]
    assert set(on_test["by_k"]) == {"1", "5"}
    assert on_test["test"]["accuracy"] == max(k["test"] for k in on_test["by_k"].values())
    assert on_val["val"]["accuracy"] == max(k["val"] for k in on_val["by_k"].values())
    assert sum(map(sum, on_test["test"]["confusion"])) == nuclei["test"]
    printed = capsys.readouterr().out
    for name, metric in METRICS.items():
        assert not metric.heading or metric.show(on_test["test"][name]) in printed, name
    assert f"majority class: {100 * report['majority']['test_majority_share']:.2f} %" in printed


@pytest.mark.usefixtures("thin")
def test_same_seed_same_numbers(few: Path, tmp_path: Path) -> None:
    first, again, other = (
        evaluate("linear", few, tmp_path / f"{name}.json", f"seed={seed}", "epochs=5")
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    confusion = [[row["test"]["confusion"] for row in report["results"]] for report in (first, again, other)]
    assert confusion[0] == confusion[1] != confusion[2]


@pytest.mark.usefixtures("thin")
def test_untrained_twin_of_a_run_is_its_first_state(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose teacher never changed scores like its own baseline, and unlike a run with another seed."""
    runs = []
    for seed, claimed in ((5, 5), (6, 7)):
        torch.manual_seed(seed)
        tensors = {f"backbone.{name}": value for name, value in build_backbone("vit_tiny").state_dict().items()}
        config = {"seed": claimed, "model": {"arch": "vit_tiny"}, "views": {"global_size": 224}}
        runs.append(tmp_path / f"run{seed}")
        checkpoint.save(runs[-1], 1, {"teacher": tensors}, {"step": 1, "config": config}, keep_every=0)
    report = evaluate(
        "knn", few, tmp_path / "knn.json", "--baseline-random", "standardise=raw", "k=[3]", weights=(*map(str, runs),)
    )
    rows = {row["weights"]: row["test"]["confusion"] for row in report["results"]}
    names = [f"{run}{twin}" for run in runs for twin in ("", " untrained", " untrained, calibrated")]
    assert list(rows) == names
    assert rows[str(runs[0])] == rows[f"{runs[0]} untrained"]
    assert rows[str(runs[1])] != rows[f"{runs[1]} untrained"]
    assert rows[names[1]] != rows[names[2]]

    # Both runs against their calibrated twins, then the second against the first; not where k was chosen on test.
    found = report["differences"]
    assert [(one["weights"], one["minus"]) for one in found] == [
        (names[0], names[2]), (names[3], names[5]), (names[3], names[0])
    ]  # fmt: skip
    assert {one["classifier"] for one in found} == {"k chosen on val"}
    of = {row["weights"]: row["test"] for row in report["results"] if row["classifier"] == "k chosen on val"}
    for one in found:
        for figure in ("accuracy", "balanced_accuracy"):
            mean = of[one["weights"]][figure] - of[one["minus"]][figure]
            assert one[figure] == pytest.approx([mean] * 3, abs=1e-12)  # one patient: every draw is the same
    printed = capsys.readouterr().out
    assert f"{100 * mean:+.1f} [{100 * mean:+.1f}, {100 * mean:+.1f}]" in printed


@pytest.mark.usefixtures("thin")
def test_folds_choose_in_place_of_val(few: Path, tmp_path: Path) -> None:
    """Train and val have one image each, so two folds are those images."""
    with pytest.raises(UserError, match="folds=3: train and val have nuclei of 2 patients"):
        evaluate("ridge", few, tmp_path / "x.json", "folds=3")
    for task, more in (("knn", "k=[1,5]"), ("linear", "epochs=2"), ("ridge", "penalty=[0.1,1]")):
        report = evaluate(task, few, tmp_path / f"{task}.json", "folds=2", more)
        nuclei, folds = report["data"]["nuclei"], report["data"]["folds"]
        assert {fold["nuclei"] for fold in folds} == {sum(nuclei["train"]), sum(nuclei["val"])}
        assert [len(fold["patients"]) for fold in folds] == [1, 1]
        for row in report["results"]:
            assert row["folds"]["count"] == sum(nuclei["train"]) + sum(nuclei["val"])
            assert row["test"]["count"] == sum(nuclei["test"])
            assert "val" not in row and "best on test" not in row["selection"]
        kinds = [(row["features"], row["classifier"]) for row in report["results"]]
        names = {"knn": ["k chosen on 2 folds"], "linear": ["linear"], "ridge": ["ridge", "balanced ridge"]}[task]
        features = ["standardised"] if task == "ridge" else ["raw", "standardised"]
        assert kinds == [(kind, name) for kind in features for name in names]


@pytest.mark.usefixtures("thin")
def test_finetuning_reports_the_probe_and_the_tuned_network(few: Path, tmp_path: Path) -> None:
    report = evaluate("finetune", few, tmp_path / "ft.json", "epochs=2", "lr=1e-3", "batch_size=8", "augment=true")
    probe, tuned = report["results"]
    assert (probe["features"], tuned["features"]) == ("raw", "tuned")
    assert len(tuned["history"]) == 2
    assert tuned["lr"] == 1e-3
    assert tuned["val"]["accuracy"] == pytest.approx(max(e["val_accuracy"] for e in tuned["history"]), abs=1e-9)
    # There are hundreds of nuclei, so two epochs of training must lower the training loss.
    assert tuned["history"][1]["train_loss"] < tuned["history"][0]["train_loss"]


@pytest.mark.usefixtures("thin")
def test_backbones_of_timm_next_to_ours(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(11)
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "r.safetensors")
    given = (f"timm:resnet10t@{tmp_path}/r.safetensors", "timm:vit_tiny_patch16_224:depth=2", "random:vit_tiny")
    report = evaluate("knn", few, tmp_path / "knn.json", "--baseline-random", "standardise=raw", "k=[3]", weights=given)
    rows = {row["weights"]: row for row in report["results"]}
    untrained, calibrated = f"{given[0]} untrained", f"{given[0]} untrained, calibrated"
    plain = f"{given[1]} untrained"  # without BatchNorm
    assert list(rows) == [given[0], untrained, calibrated, plain, given[2], f"{given[2]}, calibrated"]
    assert [row["arch"] for row in rows.values()] == [
        *["timm:resnet10t"] * 3, "timm:vit_tiny_patch16_224", *["vit_tiny"] * 2
    ]  # fmt: skip
    assert rows[untrained]["test"]["confusion"] != rows[calibrated]["test"]["confusion"]
    assert rows[given[0]]["test"]["confusion"] != rows[f"{given[0]} untrained"]["test"]["confusion"]
    assert rows[given[0]]["timm"]["file"] == f"{tmp_path}/r.safetensors"
    assert rows[f"{given[0]} untrained"]["timm"]["file"] is None
    assert all("timm" not in row or row["timm"]["align_corners"] for row in rows.values())
    assert "timm" not in rows[given[2]]
    printed = " ".join(capsys.readouterr().out.split())
    assert "r.safetensors, without fc.bias, fc.weight; 960 features at strides 4, 8, 16, 32 of 96 px" in printed
    assert (
        "timm:vit_tiny_patch16_224:depth=2 untrained: random weights (no @FILE); 192 features at stride 16" in printed
    )


def test_fine_tuning_of_timm_with_exact_positions(few: Path, tmp_path: Path) -> None:
    more = ("--protocol", "exact", "epochs=1", "batch_size=8")
    report = evaluate("finetune", few, tmp_path / "f.json", *more, weights=("timm:resnet10t:channels=[8,16,24,32]",))
    probe, tuned = report["results"]
    assert probe["timm"] == tuned["timm"]
    assert not tuned["timm"]["align_corners"]
    assert tuned["lr"] == 4e-5  # as published for ResNets
    assert len(tuned["history"]) == 1


@pytest.mark.usefixtures("thin")
def test_crops(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each nucleus is described once, by networks of ours and of timm."""
    given = ("random:vit_tiny", "timm:vit_tiny_patch16_224:depth=1:embed_dim=48:num_heads=3")
    for task, more in (("knn", "k=[3]"), ("linear", "epochs=2"), ("ridge", "penalty=[0.1]")):
        words = ("--protocol", "crop", "--crop-um", "16", "--size", "32", more)
        report = evaluate(task, few, tmp_path / f"{task}.json", *words, weights=given)
        data = report["data"]
        assert (data["mpp"], data["size"], data["valid"], report["protocol"]) == (0.5, 32, None, "crop")
        assert data["tiles"] == {split: sum(counts) for split, counts in data["nuclei"].items()}
        assert all(row["test"]["count"] == data["tiles"]["test"] for row in report["results"])
        assert {row["weights"] for row in report["results"]} == {given[0], f"{given[1]} untrained"}
    assert "32 px crops at 0.5 um/px" in capsys.readouterr().out


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("size", [64, 128])  # at 0.5 um/px, as stored, and at 0.25
def test_the_features_of_crops_are_the_vectors_of_embed(few: Path, tmp_path: Path, size: int) -> None:
    pytest.importorskip("anndata")
    source = next(iter(open_source(f"brcam2c:{few}")))
    source = replace(source, xy=source.xy[:40], label=source.label[:40])
    Image.fromarray(source.image).save(tmp_path / "a.png")
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny").eval()
    crops = cut_crops(source, size=size, mpp=32 / size)
    features = extract_features(CropFeatures(backbone), {"test": crops})["test"].features.numpy()
    how = {"mpp": source.mpp, "protocol": "crop", "crop_um": 32, "size": size, "dtype": "float32"}
    cells = embed_slide(tmp_path / "a.png", backbone, source.xy.astype(np.float64), **how)
    np.testing.assert_allclose(features, cells.X, rtol=1e-3, atol=1e-3 * np.abs(features).max())


def test_settings_may_follow_the_weights(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "knn.json"
    arguments = ["knn", "--data", f"brcam2c:{few}", "--size", "96", "--json", str(out)]
    assert main([*arguments, "--weights", "random:vit_tiny", "k=[2]", "standardise=train"]) == 0
    assert [row["features"] for row in json.loads(out.read_text())["results"]] == ["standardised"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("knn", "neighbours=3"), r"no setting 'neighbours'.*k"),
        (("linear", "epoch=3"), r"no setting 'epoch'; did you mean 'epochs'\?"),
        (("linear", "epochs=many"), r"epochs=many"),
        (("linear", "epochs=0"), r"epochs=0: expected 1 or more"),
        (("linear", "folds=1"), r"folds=1: expected 2 or more, or 0 to choose on val"),
        (("ridge", "penalty=[1,0]"), r"penalty=\[1.0, 0.0\]: expected numbers of 1e-08 or more"),
        (("ridge", "penalty=[]"), r"penalty=\[\]: expected numbers of 1e-08 or more"),
        (("ridge", "penalty=[1,many]"), r"penalty=\[1,many\]: expected numbers"),
        (("ridge", "penalty=1"), r"penalty=1: expected numbers"),
        (("ridge", "folds=1"), r"folds=1: expected 2 or more"),
        (("knn", "folds=1"), r"folds=1: expected 2 or more"),
        (("knn", "k=[0,3]"), r"k=\[0, 3\]: expected numbers above 0"),
        (("knn", "standardise=never"), r"standardise=never: expected raw, train or both"),
        (("knn", "device=gpu"), r"device=gpu: expected auto, cpu, cuda"),
        (("knn", "--mpp", "-1"), r"--mpp -1.0: expected um per pixel above 0"),
        (("knn", "--crop-um", "30"), r"--crop-um=30.0: expected none without --protocol crop"),
        (("knn", "--protocol", "crop", "--mpp", "0.25"), r"--mpp=0.25: expected none with --protocol crop"),
        (("knn", "--protocol", "crop", "--crop-um", "0"), r"--crop-um 0.0: expected um above 0"),
        (("finetune", "--protocol", "crop"), r"--protocol crop is for features that are not trained, so not for fine"),
        (("knn", "--weights", "nowhere"), r"nowhere"),
        (("knn", "--weights", "random:vit_tiny", "timm:resnet10t@x.pth"), r"no such file x\.pth; expected the weights"),
        (("knn", "source.mpp=0.5"), r"brcam2c: no setting 'mpp'"),
    ],
)
def test_mistakes_are_named(few: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    task, *more = arguments
    out = tmp_path / "x.json"
    base = [task, "--weights", "random:vit_tiny", "--data", f"brcam2c:{few}", "--size", "96", "--json", str(out)]
    with pytest.raises(UserError, match=message):
        main([*base, *more])
    assert not out.exists()


def test_a_report_is_not_overwritten(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    out.write_text("{}")
    with pytest.raises(UserError, match=r"x.json exists already"):
        evaluate("knn", few, out)
    assert out.read_text() == "{}"


def test_missing_split_and_missing_classes_are_refused(few: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(few, half, symlinks=True)
    (half / "brca_ds_val.txt").write_text("")
    with pytest.raises(UserError, match="no labelled nuclei in split val"):
        evaluate("knn", half, tmp_path / "x.json")
    points = tmp_path / "points"
    points.mkdir()
    shutil.copy(next((few / "images").iterdir()), points / "image.png")
    (points / "image.csv").write_text("x,y\n10,20\n")
    with pytest.raises(UserError, match="no classes"):
        main(["knn", "--weights", "random:vit_tiny", "--data", f"points:{points}", "source.mpp=0.5"])


@pytest.mark.filterwarnings("ignore:'muse_fast.evaluate' found in sys.modules")
def test_the_command_exits_with_2_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "knn", "--weights", "random:vit_tiny", "--data", "nothing"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("muse_fast.evaluate", run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: 'nothing' is not a source")
    assert "Traceback" not in said


def test_options_are_typed() -> None:
    assert load_settings(KnnConfig, None, ["k=[5]", "seed=3", "baseline=true"]) == KnnConfig(
        k=[5], seed=3, baseline=True
    )
    assert load_settings(TuneConfig, None, []).lr is None
    assert load_settings(TuneConfig, None, ["lr=1e-3"]).lr == 1e-3
