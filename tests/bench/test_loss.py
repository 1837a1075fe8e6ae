"""``python -m bench loss``: both forms are timed, and one that differs is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench.loss import timing

TINY = ["loss", "--device", "cpu", "--prototypes", "9", "21", "--rows", "1", "6"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure.REPEATS", 4)


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loss.json"
    assert command.main([*TINY, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [(row["prototypes"], row["rows"]) for row in rows] == [(9, 1), (9, 6), (21, 1), (21, 6)]
    for row in rows:
        assert row["speedup_stored"] == pytest.approx(row["logit-free"]["median_ms"] / row["stored"]["median_ms"])
        assert 0 < row["stored"]["p20_ms"] <= row["stored"]["median_ms"] <= row["stored"]["p80_ms"]
        assert row["relative_error"] < 1e-5
    assert "logit-free / stored" in capsys.readouterr().out


def test_forms_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = timing.loss

    def wrong(*arguments: Any, logit_free: bool) -> Any:
        return right(*arguments, logit_free=logit_free) * (1.01 if logit_free else 1)

    monkeypatch.setattr(timing, "loss", wrong)
    assert command.main(TINY) == 1
    assert "9 prototypes, 6 rows: the forms differ by 1e-02, above 1e-04" in capsys.readouterr().out


def test_other_sizes_and_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for arguments, said in (
        (["--device", "cpu", "--rows", "0"], "expected numbers above 0"),
        (["--device", "cpu", "--prototypes", "3", "-1"], "expected numbers above 0"),
        (["--device", "cuda"], "use --device cpu"),
    ):
        with pytest.raises(SystemExit):
            command.main(["loss", *arguments])
        assert said in capsys.readouterr().err
