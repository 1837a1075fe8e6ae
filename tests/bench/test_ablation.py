"""``python -m bench ablation``: short runs on procedural ROIs, and the report of their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.ablation import runs
from muse_fast import load_backbone, prepare
from muse_fast.config import load_config
from muse_fast.runtime import checkpoint

pytestmark = pytest.mark.usefixtures("thin")
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


def without_times(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    varying = ("seconds_of_last_start", "rois_per_second", "data_wait")
    return [{key: value for key, value in row.items() if key not in varying} for row in results]


@pytest.mark.slow
def test_report(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    argv = arguments(
        workplace, "--seed", "3", "--variant", "both losses", "--variant", "image loss", "--json", str(out)
    )
    assert main(argv) == 0
    report = json.loads(out.read_text())
    results = {row["variant"]: row for row in report["results"]}
    assert list(results) == ["untrained", "both losses", "image loss"] and report["left_out"] == []
    names = {f"{task} {kind}" for task in ("knn", "linear") for kind in ("raw", "standardised")}
    for row in results.values():
        assert row["scores"].keys() == {"0.25"} and row["scores"]["0.25"].keys() == names and row["seed"] == 3
        assert all(0 <= figures["balanced"] <= 1 for figures in row["scores"]["0.25"].values())
    assert results["both losses"]["steps"] == 2 and "steps" not in results["untrained"]
    (found,) = (d for d in report["differences"] if d["classifier"] == "knn raw" and d["figure"] == "accuracy")
    above = [results[name]["scores"]["0.25"]["knn raw"]["accuracy"] for name in ("both losses", "untrained")]
    assert found["worse"] == "untrained" and found["points"] == [pytest.approx(100 * (above[0] - above[1]))]
    shown = capsys.readouterr().out
    assert "both losses, seed 3: 2 steps" in shown and "balanced accuracy at 0.25 um/px on the test split" in shown

    # The seed and the settings of the variants reach the runs.
    for name, weight in (("both-losses-3", 1.0), ("image-loss-3", 0.0)):
        folder = checkpoint.folder_of(workplace / "runs" / name, 2)
        config = checkpoint.read_state(folder)["config"]
        assert (config["seed"], config["loss"]["lambda_nucleus"]) == (3, weight)

    # A finished run is not trained again.
    before = checkpoint.folder_of(workplace / "runs" / "both-losses-3", 2).stat().st_mtime_ns
    assert main(argv) == 0
    assert checkpoint.folder_of(workplace / "runs" / "both-losses-3", 2).stat().st_mtime_ns == before
    assert without_times(json.loads(out.read_text())["results"]) == without_times(report["results"])
    with pytest.raises(SystemExit):
        main([*argv, "optim.steps=3"])
    assert "other settings: optim.steps=3 (was 2); give the old values to continue it" in capsys.readouterr().err


def test_a_run_starts_from_the_untrained_network(workplace: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the teacher stays there."""
    settings = [f"data.roiset={workplace / 'rois'}", "seed=5", "optim.lr=0", "optim.min_lr=0"]
    runs.trained(tmp_path / "run", str(workplace / "toy.yaml"), [*settings, "train.device=cpu"])
    trained = load_backbone(None, str(tmp_path / "run")).state_dict()
    fresh = runs.untrained(load_config(workplace / "toy.yaml", settings)).state_dict()
    for name, value in fresh.items():
        if "running_" not in name and "num_batches" not in name:
            assert torch.equal(trained[name], value), name


def test_a_failed_run_is_reported(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments(workplace, "optim.step=3"))
    assert "did you mean 'optim.steps'" in capsys.readouterr().err


@pytest.mark.parametrize("variant", runs.VARIANTS)
@pytest.mark.parametrize("config", ["ablation", "brcam2c_cpu"])
def test_settings(variant: str, config: str) -> None:
    settings = load_config(config, runs.VARIANTS[variant])
    plain = load_config(config)
    assert (settings == plain) == (variant == "both losses")


def test_runs_that_might_not_finish_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    lasts = {"untrained": 1.0, "both losses": 5.0, "image loss": 3.0}

    def run(variant: str, seed: int) -> dict[str, Any]:
        clock[0] += lasts[variant]
        return {"variant": variant, "seed": seed}

    done = list(runs.in_turn(["both losses", "image loss"], [0, 1], 16.0, run))
    # 0 .. 1, 1 .. 6, 6 .. 9, 9 .. 10, 10 .. 15; the last could take 5 and end at 20.
    assert [row is not None for _, _, row in done] == [True, True, True, True, True, False]
    assert [(variant, seed) for variant, seed, _ in done[-2:]] == [("both losses", 1), ("image loss", 1)]


def test_spread_and_differences() -> None:
    def row(variant: str, seed: int, accuracy: float) -> dict[str, Any]:
        return {"variant": variant, "seed": seed, "scores": {"0.5": {"knn": {"accuracy": accuracy}}}}

    rows = [
        row("both losses", 0, 0.5),
        row("both losses", 1, 0.7),
        row("nucleus loss", 1, 0.6),
        row("image loss", 0, 0),
    ]
    spread = runs.spread(rows, "0.5", "accuracy")
    assert spread["both losses"]["knn"] == (pytest.approx(60), 50, 70) and spread["image loss"]["knn"] == (0, 0, 0)
    found = {(d["better"], d["worse"]): d["points"] for d in runs.differences(rows, "0.5", "accuracy")}
    assert found == {("both losses", "nucleus loss"): [pytest.approx(10)]}
