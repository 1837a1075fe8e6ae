"""``python -m bench finetune``: short runs on procedural images, and the report of their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.finetune import runs
from muse_fast import load_backbone
from muse_fast.images.points import Points
from muse_fast.runtime import checkpoint
from muse_fast.scoring.scores import evaluate

pytestmark = pytest.mark.usefixtures("thin")
TOY = """
data: {sample_size: 64, workers: 0}
detector: {hidden_dim: 16}
loss: {lambda_cons: 0}
optim: {batch_size: 2}
train: {precision: fp32, log_every: 1}
"""


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.yaml").write_text(TOY)
    out = tmp_path / "out.json"
    argv = ["finetune", "--device", "cpu", "--config", str(tmp_path / "toy.yaml"), "--data", "synthetic:7"]
    argv += ["source.size=64", "--pretrained", "random:vit_tiny", "--out", str(tmp_path / "runs")]
    argv += ["--case", "2:0.4", "--seed", "3", "--json", str(out)]
    assert main(argv) == 0
    report = json.loads(out.read_text())
    assert [(row["start"], row["fraction"], row["steps_done"]) for row in report["results"]] == [
        ("random", 0.4, 2),
        ("pretrained", 0.4, 2),
    ]
    assert report["images"] == {"train": 5, "test": 1}
    for case in report["cases"]:
        for found in case["mean_f1"].values():
            difference = found["pretrained"]["mean"] - found["random"]["mean"]
            assert found["difference"]["mean"] == pytest.approx(difference) and list(found["random"]["seeds"]) == ["3"]
    state = checkpoint.read_state(checkpoint.latest(tmp_path / "runs" / "random-2-0.4-3")[0] or tmp_path)
    assert (state["num_images"], state["config"]["seed"]) == (2, 3)
    assert "difference" in capsys.readouterr().out

    assert main(argv) == 0  # finished runs are kept
    again = json.loads(out.read_text())
    assert again["results"] == report["results"] and again["cases"] == report["cases"]
    with pytest.raises(SystemExit):
        main([*argv, "optim.lr=0.5"])
    assert "optim.lr=0.5" in capsys.readouterr().err


def test_a_random_twin_has_the_shape_and_its_own_weights(tmp_path: Path) -> None:
    torch.manual_seed(7)
    path = runs.random_twin("random:vit_tiny", 1, tmp_path)
    twin, other = (
        load_backbone(None, path).state_dict(),
        load_backbone(None, runs.random_twin("random:vit_tiny", 2, tmp_path)).state_dict(),
    )
    torch.manual_seed(1)
    expected = load_backbone("vit_tiny").state_dict()
    assert twin.keys() == expected.keys() and all(torch.equal(twin[name], expected[name]) for name in twin)
    assert not all(torch.equal(twin[name], other[name]) for name in twin)


def counts(rng: np.random.Generator) -> dict[str, Any]:
    """Counts of 6 images and 2 classes by protocol."""
    return {name: rng.integers(1, 9, (6, 3, 3)) for name in runs.RULES}


def test_the_comparison_is_over_seeds_with_both_starts() -> None:
    rng = np.random.default_rng(0)
    of_case = [
        runs.Tested(start, seed, counts(rng)) for start, seed in (("random", 0), ("pretrained", 0), ("random", 1))
    ]
    assert runs.compared(of_case[:1]) == {}
    found = runs.compared([*of_case, of_case[1]._replace(seed=1), runs.Tested("random", 2, counts(rng))])["ocelot"]
    once = np.ones((1, 6), np.int64)
    random, pretrained = (
        np.mean([runs.mean_f1(one.counts["ocelot"], "ocelot", once)[0] for one in some])
        for some in (of_case[::2], [of_case[1]])
    )
    assert found["random"]["mean"] == pytest.approx(random) and found["pretrained"]["mean"] == pytest.approx(pretrained)
    assert found["difference"]["mean"] == pytest.approx(pretrained - random)
    low, high = found["difference"]["ci95"]
    assert low < found["difference"]["mean"] < high
    same = runs.compared([of_case[0], of_case[0]._replace(start="pretrained")])["max-matching"]["difference"]
    assert same["mean"] == 0 and same["ci95"] == [0, 0]  # drawn together


@pytest.mark.parametrize("rule", runs.RULES)
def test_mean_f1_of_counts_and_its_interval_are_those_of_the_scores(rule: str) -> None:
    rng = np.random.default_rng(1)
    found, truths = (
        [Points(rng.uniform(0, 40, (n, 2)), rng.integers(0, 3, n), rng.random(n)) for n in (0, 9, 20, 30, 31)]
        for _ in range(2)
    )
    expected = evaluate(found, truths, 0.5, 3, rule, draws=runs.DRAWS, seed=0)
    counts = {name: runs.count(found, truths, name, 0.5, 3) for name in runs.RULES}
    summary = runs.compared([runs.Tested(start, 0, counts) for start in runs.STARTS])[rule]["random"]
    assert summary["mean"] == pytest.approx(100 * expected.mean_f1, abs=0.01)  # ocelot's figures are rounded
    assert summary["ci95"] == pytest.approx([100 * end for end in expected.mean_f1_ci95 or ()], abs=0.01)
    assert summary["ci95"][1] - summary["ci95"][0] > 1


def test_f1_of_detection() -> None:
    assert runs.detection_f1(np.array([[[0, 0, 9], [3, 1, 2]], [[9, 9, 9], [1, 0, 0]]])) == pytest.approx(100 * 8 / 11)
    assert runs.detection_f1(np.zeros((2, 2, 3), np.int64)) == 0


@pytest.mark.parametrize(
    ("steps", "fraction", "epochs"), [(100, 1.0, 10), (100, 0.1, 100), (300, 1.0, 30), (1, 1.0, 1)]
)
def test_equal_steps_for_any_share_of_the_images(steps: int, fraction: float, epochs: int) -> None:
    settings = runs.with_budget("finetune_brcam2c_cpu", [], runs.Case(steps, fraction), 80)
    assert f"optim.epochs={epochs}" in settings  # of 80 or 8 images, 8 a step
