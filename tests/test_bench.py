"""The benchmark times what is right, refuses what is wrong, and writes what it found."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench import ops as bench_ops
from bench.cases import Case, literal_loss, literal_match, loss_inputs, match_inputs
from muse_fast.ops import reference

LOSS = Case(op="dino_loss", name="tiny", inputs=loss_inputs(5, 3, 20, 7), literal=literal_loss)
MATCH = Case(op="match_nuclei", name="tiny", inputs=match_inputs(2, 3, 8, 0.5), literal=literal_match)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "CASES", [MATCH, LOSS])
    monkeypatch.setattr(bench_ops, "REPEATS", 4)


def test_json_holds_numbers_and_environment(tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    assert command.main(["ops", "--device", "cpu", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["environment"]["torch"] == torch.__version__
    versions = {(row["op"], row["version"]) for row in report["results"]}
    assert versions >= {(op, name) for op in ("match_nuclei", "dino_loss") for name in ("literal", "reference")}
    for row in report["results"]:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["repeats"] == 4
        assert row["relative_error"] <= 1e-5


def wrong_value(*arguments: Any) -> Tensor:
    return reference.dino_loss(*arguments) * 1.01


def wrong_gradient(student: Tensor, *rest: Any) -> Tensor:
    """The right value with a gradient 1 % too large."""
    scaled = student * 1.01
    return reference.dino_loss(scaled + (student - scaled).detach(), *rest)


@pytest.mark.parametrize("wrong", [wrong_value, wrong_gradient])
def test_a_wrong_version_gets_no_time(
    wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_ops, "CASES", [LOSS])
    monkeypatch.setattr(
        bench_ops, "available_versions", lambda case, device: {"literal": case.literal, "reference": wrong}
    )
    assert command.main(["ops", "--device", "cpu"]) == 1
    assert "wrong result" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["ops", "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("stages", [["test", "everything"], ["sanitise"]])
def test_gpu_script_refuses_an_unknown_stage_before_it_starts(stages: list[str], tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "bench" / "gpu.sh"
    environment = os.environ | {"OUT": str(tmp_path / "out")}
    finished = subprocess.run([script, *stages], env=environment, capture_output=True, text=True)
    assert finished.returncode == 2
    assert f"unknown stage '{stages[-1]}'" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_commit_is_named_where_there_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "abc")
    assert bench_ops.environment("cpu")["commit"] == "abc"
