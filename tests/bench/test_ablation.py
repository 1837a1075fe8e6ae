"""``python -m bench ablation``: short runs on procedural ROIs, and the report of their scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.ablation import compare, pool, runs
from muse_fast import load_backbone, prepare
from muse_fast.config import load_config
from muse_fast.errors import UserError
from muse_fast.pretraining.start import first_backbone
from muse_fast.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("thin", "without_pictures")
TOY = """
data: {split: train, workers: 0}
views: {global_size: 64, local_size: 32, num_locals: 1}
model: {arch: vit_tiny}
head: {hidden_dim: 32, bottleneck_dim: 16, prototypes: 16, input_norm: true}
loss: {centering: sinkhorn}
optim: {steps: 2, batch_size: 2, warmup_steps: 1}
train: {precision: fp32, log_every: 1, eval_every: 0, eval_rois: 2}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "toy.yaml").write_text(TOY)
    assert prepare.main(["synthetic:7", str(folder / "rois"), "size=224", "mpp=0.25"]) == 0
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    fixed = ["--device", "cpu", "--rois", str(folder / "rois"), "--config", str(folder / "toy.yaml")]
    return ["ablation", *fixed, "--out", str(folder / "runs"), "--mpp", "0.25", *more]


NAMES = {"knn raw", "knn standardised", "ridge", "balanced ridge"}


@pytest.mark.slow
def test_report(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    chosen = [word for name in ("supervised", "both losses", "image loss") for word in ("--variant", name)]
    argv = arguments(workplace, "--seed", "3", *chosen, "--json", str(out))
    assert main(argv) == 0
    report = json.loads(out.read_text())
    results = {row["variant"]: row for row in report["results"]}
    assert list(results) == ["untrained", "both losses", "image loss", "supervised"] and report["left_out"] == []
    for row in results.values():
        assert row["scores"].keys() == {"0.25"} and row["scores"]["0.25"].keys() == NAMES and row["seed"] == 3
        assert all(0 <= figures["balanced_accuracy"] <= 1 for figures in row["scores"]["0.25"].values())
    assert results["both losses"]["steps"] == 2 and "steps" not in results["untrained"]
    (found,) = (
        d
        for d in report["differences"]
        if (d["better"], d["worse"], d["classifier"], d["figure"])
        == ("both losses", "untrained", "knn raw", "accuracy")
    )
    above = [results[name]["scores"]["0.25"]["knn raw"]["accuracy"] for name in ("both losses", "untrained")]
    assert found["mean"]["points"] == pytest.approx(100 * (above[0] - above[1]))
    assert (report["recipe"]["seed"], report["recipe"]["optim.steps"]) == ("3", "2")
    shown = capsys.readouterr().out
    assert "both losses, seed 3: 2 steps" in shown and "balanced accuracy at 0.25 um/px on the test split" in shown

    # The seed and the settings of the variants reach the runs.
    for name, weight in (("both-losses-3", 1.0), ("image-loss-3", 0.0)):
        folder = checkpoint.folder_of(workplace / "runs" / name, 2)
        config = checkpoint.read_state(folder)["config"]
        assert (config["seed"], config["loss"]["lambda_nucleus"]) == (3, weight)

    # What is finished is not done again; without its scores, a run is only scored again.
    trained = checkpoint.folder_of(workplace / "runs" / "both-losses-3", 2).stat().st_mtime_ns
    (workplace / "runs" / "image-loss-3.json").unlink()
    scored = {path: path.stat().st_mtime_ns for path in (workplace / "runs").glob("*.json")}
    assert main(argv) == 0
    assert checkpoint.folder_of(workplace / "runs" / "both-losses-3", 2).stat().st_mtime_ns == trained
    assert {path: path.stat().st_mtime_ns for path in scored} == scored and len(scored) == 3
    assert json.loads(out.read_text())["results"] == report["results"]
    with pytest.raises(SystemExit):
        main([*argv, "optim.steps=3"])
    assert "other settings: optim.steps=3 (was 2); give the old values to continue it" in capsys.readouterr().err


def test_a_run_starts_from_the_untrained_network(workplace: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the teacher stays there."""
    settings = [f"data.roiset={workplace / 'rois'}", "seed=5", "optim.lr=0", "optim.min_lr=0"]
    runs.trained(tmp_path / "run", str(workplace / "toy.yaml"), [*settings, "train.device=cpu"])
    trained = load_backbone(None, str(tmp_path / "run")).state_dict()
    fresh = first_backbone(load_config(workplace / "toy.yaml", settings)).state_dict()
    for name, value in fresh.items():
        if "running_" not in name and "num_batches" not in name:
            assert torch.equal(trained[name], value), name


def test_a_failed_run_is_reported(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments(workplace, "optim.step=3"))
    assert "did you mean 'optim.steps'" in capsys.readouterr().err


@pytest.mark.heavy
def test_two_runs_at_a_time_give_the_same_numbers(workplace: Path, tmp_path: Path) -> None:
    found = {}
    for jobs in ("1", "2"):
        out = tmp_path / f"{jobs}.json"
        seeds = ["--seed", "3", "--seed", "4", "--out", str(tmp_path / jobs)]
        argv = arguments(workplace, "--variant", "both losses", "--jobs", jobs, "--json", str(out), *seeds)
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            subprocess.run([sys.executable, "-m", "bench", *argv], check=True)
        found[jobs] = [(row["variant"], row["seed"], row["scores"]) for row in json.loads(out.read_text())["results"]]
    assert found["1"] == found["2"] and len(found["1"]) == 4


@pytest.mark.parametrize("variant", runs.PRETRAINED)
@pytest.mark.parametrize("config", ["ablation", "brcam2c_cpu"])
def test_settings(variant: str, config: str) -> None:
    settings = load_config(config, runs.PRETRAINED[variant])
    plain = load_config(config)
    assert (settings == plain) == (variant == "both losses")


def test_chosen_variants_run_in_order_and_always_with_the_untrained_network() -> None:
    assert runs.in_order(None) == list(runs.VARIANTS)
    assert runs.in_order(["supervised", "nucleus loss"]) == ["untrained", "nucleus loss", "supervised"]


def test_runs_that_might_not_finish_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(pool.time, "monotonic", lambda: clock[0])
    lasts = {"a": 1.0, "b": 5.0, "c": 3.0}

    def run(case: str) -> str:
        clock[0] += lasts[case]
        return case.upper()

    done = list(pool.in_turn(pool.processes(1), 1, list("abcabc"), 16.0, run))
    # 0 .. 1, 1 .. 6, 6 .. 9, 9 .. 10, 10 .. 15; the last could take 5 and end at 20.
    assert done == [*zip("abcab", "ABCAB", strict=True), ("c", None)]


def test_as_many_runs_at_a_time_as_asked() -> None:
    """Every case waits for another one; the odd one is last, when the others are done."""
    meet, together = threading.Barrier(2), []

    def run(case: int) -> int:
        if case < 4:
            together.append(meet.wait(10))
        return -case

    with ThreadPoolExecutor(2) as threads:
        done = list(pool.in_turn(threads, 2, range(5), 60.0, run))
    assert sorted(done) == [(case, -case) for case in range(5)] and sorted(together) == [0, 0, 1, 1]


def test_an_error_in_a_run_is_raised() -> None:
    def run(case: int) -> int:
        raise UserError("wrong")

    with pytest.raises(UserError, match="wrong"):
        list(pool.in_turn(pool.processes(1), 1, [0], 1.0, run))


def scored(variant: str, seed: int, *confusions: list[list[int]]) -> runs.Row:
    """A row with the confusion matrices of patients; rows are true classes."""
    total = np.sum(confusions, axis=0)
    scores = {
        "accuracy": np.trace(total) / total.sum(),
        "balanced_accuracy": float((np.diag(total) / total.sum(axis=1)).mean()),
        "confusion_by_patient": [*confusions],
    }
    return {"variant": variant, "seed": seed, "scores": {"0.5": {"knn": scores}}}


def test_spread_and_differences() -> None:
    """Of 4 nuclei of each class per patient; patients with equal matrices leave nothing to the bootstrap."""
    rows = [
        scored("both losses", 0, [[3, 1], [1, 3]], [[3, 1], [1, 3]]),
        scored("both losses", 1, [[4, 0], [1, 3]], [[4, 0], [1, 3]]),
        scored("nucleus loss", 1, [[2, 2], [2, 2]], [[2, 2], [2, 2]]),
        scored("image loss", 0, [[4, 0], [0, 4]], [[0, 4], [4, 0]]),
        scored("image loss", 1, [[2, 2], [2, 2]], [[2, 2], [2, 2]]),
    ]
    spread = compare.spread(rows, "0.5", "accuracy")
    assert spread["both losses"]["knn"] == (pytest.approx(81.25), 75, 87.5)
    found = {(d["better"], d["worse"]): d for d in compare.differences(rows, "0.5", "balanced_accuracy")}
    assert list(found) == [
        ("nucleus loss", "image loss"),
        ("both losses", "image loss"),
        ("both losses", "nucleus loss"),
    ]
    one = found["both losses", "nucleus loss"]
    assert one["mean"] == {"points": 37.5, "ci95": [37.5, 37.5]} and one["seeds"] == [{"seed": 1, **one["mean"]}]

    # Seed 0: 25 points if the two patients are drawn once each, -25 or 75 if one of them twice. Seed 1: always 37.5.
    two = found["both losses", "image loss"]
    assert two["seeds"][0] == {"seed": 0, "points": 25.0, "ci95": [-25.0, 75.0]}
    assert two["mean"] == {"points": 31.25, "ci95": [6.25, 56.25]}


def test_reports_leave_out_the_matrices_of_single_patients() -> None:
    row = scored("both losses", 0, [[3, 1], [1, 3]])
    expected = {"0.5": {"knn": {"accuracy": 0.75, "balanced_accuracy": 0.75}}}
    assert compare.without_counts(row) == {"variant": "both losses", "seed": 0, "scores": expected}
