"""``python -m bench finetune-step``: both versions compute the same, and the report of their times."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from bench.__main__ import main
from bench.finetune_step import timing
from bench.finetune_step.literal import LiteralFinetuner
from muse_fast.detection.finetuner import Finetuner
from tests.support.thin import thin_networks

TINY = ["--device", "cpu", "--size", "64", "--nuclei", "300", "--seconds", "0"]


@pytest.fixture(autouse=True)
def thin() -> Iterator[None]:
    with thin_networks():
        yield


def case(*more: str, precision: str = "fp32", nuclei: int = 9) -> timing.Case:
    config = timing.settings(64, 3, precision, more)
    return timing.Case(config=config, weights="random:vit_tiny", nuclei=nuclei, device="cpu")


def checked(of: timing.Case) -> list[dict[str, Any]]:
    rows = timing.new_rows(of, timing.KINDS)
    timing.run(of, rows, 0, lambda: None)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_versions_train_alike(precision: str) -> None:
    """With all three losses, which all depend on the steps before."""
    literal, fast = checked(case("optim.lr=1e-3", "loss.lambda_cons=1", precision=precision))
    assert "wrong" not in literal and "wrong" not in fast, fast
    assert len(fast["losses"]) == 3 * timing.GATE_STEPS and min(fast["losses"]) > 0
    assert fast["losses"][0] != fast["losses"][3]
    assert fast["peak_bytes"] > fast["held_bytes"] > 0


def test_the_literal_matching_is_the_best_one() -> None:
    """Against costs of all pairs in float64, written out."""
    of = case()
    literal = timing.build("literal", of, of.detector().state_dict())
    assert isinstance(literal, LiteralFinetuner)
    random = torch.Generator().manual_seed(0)
    points, xy = (40 * torch.rand(n, 2, generator=random) for n in (30, 9))
    logits, label = torch.randn(30, 4, generator=random), torch.arange(9) % 3
    proposal, nucleus = literal.match(points, logits, xy, label)
    probability = logits.double().softmax(1)
    cost = [
        [0.05 * (points[i] - xy[j]).double().norm().item() - probability[i, label[j]].item() for j in range(9)]
        for i in range(30)
    ]
    expected = linear_sum_assignment(cost)
    assert (proposal.tolist(), nucleus.tolist()) == tuple(rows.tolist() for rows in expected)
    assert literal.matching_s > 0


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["finetune-step", *TINY, "--size", "64", "96", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [(row["px"], row["version"]) for row in report["results"]] == [
        (side, kind) for side in (64, 96) for kind in ("literal", "fast")
    ]
    for literal, fast in (report["results"][:2], report["results"][2:]):
        assert fast["speedup_literal"] == pytest.approx(literal["median_ms"] / fast["median_ms"])
        assert fast["cpu_speedup_literal"] == pytest.approx(literal["cpu_ms"] / fast["cpu_ms"])
        for row in (literal, fast):
            assert row["repeats"] == timing.MIN_REPEATS and 0 < row["matching_share"] < 1 and row["profile"]
    assert "where the time of a step goes" in capsys.readouterr().out


def test_a_wrong_engine_ends_with_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    weights = Finetuner.weights
    monkeypatch.setattr(Finetuner, "weights", lambda tuner, step: weights(tuner, step) | {"reg": 1.0})
    assert main(["finetune-step", *TINY, "optim.lr=1e-3"]) == 1
    assert "fast wrong: losses of 3 steps differ by" in capsys.readouterr().out


def test_settings_that_do_not_fit_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["finetune-step", *TINY, "detector.stryde=4"])
    assert exit_.value.code == 2 and "did you mean 'detector.stride'?" in capsys.readouterr().err
