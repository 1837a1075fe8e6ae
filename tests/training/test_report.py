import gc
import json
import os
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from muse_fast.training.report import (
    MetricsLog,
    RunReport,
    StopSignal,
    Stopwatch,
    collected_between_steps,
    read_back,
    read_metrics,
)


def test_a_resumed_log_drops_later_rows_and_a_truncated_line(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0) as log:
        for step in range(1, 6):
            log.write(step, {"loss": 1 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with MetricsLog(tmp_path, 3) as log:
        log.write(4, {"loss": 9.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows == [{"step": s, "loss": 1 / s} for s in (1, 2, 3)] + [{"step": 4, "loss": 9.0}]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows


def test_tensorboard_contains_the_same_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, 0) as log:
        log.write(5, {"loss": 2.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 2.5)]


def test_stopwatch_separates_waiting_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow_data() -> Iterator[None]:
        for _ in range(3):
            now[0] += 0.03
            yield None

    watch = Stopwatch()
    for _ in watch.timed(slow_data()):
        now[0] += 0.09
    assert watch.read() == pytest.approx((3 / 0.36, 0.25))
    assert watch.read()[0] == 0


def test_without_a_terminal_each_row_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"loss": 3.0, "loss_image": 1.0, "loss_nucleus": 2.0, "rois_per_second": 12.34, "data_wait": 0.25}
    with RunReport(tmp_path, 0, 10) as report:
        report.training(5, values)
        report.training(10, values)
    first, second = capsys.readouterr().out.split("\n")[:2]
    assert first == "step 5/10  loss 3.000 (image 1.000, nucleus 2.000) 12.3 ROI/s, data wait 25 %"
    assert second == first.replace("5/10", "10/10, ETA 0:00:00")


def test_sigterm_is_a_request_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_numbers_are_read_back_in_one_copy_and_in_order() -> None:
    values = {
        "loss": torch.tensor(1.5),
        "lr": 0.25,
        "pairs": torch.tensor(7),
        "exact": torch.tensor(1 / 3, dtype=torch.float64),
    }
    copies = []

    class Copies(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            copies.extend([func.__name__] if func.__name__ in ("tolist", "item", "cpu", "__float__") else [])
            return func(*args, **(kwargs or {}))

    with Copies():
        numbers = read_back(values)
    assert list(numbers.items()) == [("loss", 1.5), ("lr", 0.25), ("pairs", 7.0), ("exact", 1 / 3)]
    assert copies == ["tolist"]
    assert read_back({"lr": 0.5}) == {"lr": 0.5}


def test_mfu_is_shown_if_it_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"loss": 3.0, "loss_image": 1.0, "loss_nucleus": 2.0, "rois_per_second": 12.34, "data_wait": 0.25}
    with RunReport(tmp_path, 0, 10) as report:
        report.training(5, values)
        assert "MFU" not in capsys.readouterr().out
        report.training(6, {**values, "mfu": 0.456})
    assert "MFU 46 %" in capsys.readouterr().out


@pytest.mark.parametrize("main", [True, False])
def test_only_the_main_rank_reports(main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muse_fast.training.report.is_main", lambda: main)
    values = {"loss": 3.0, "loss_image": 1.0, "loss_nucleus": 2.0, "rois_per_second": 12.34, "data_wait": 0.25}
    with RunReport(tmp_path, 0, 10) as report:
        assert report.is_new == main
        report.evaluation(0, {"retrieval_at_1": 0.5})
        report.training(1, values)
    rows = [{"step": 0, "retrieval_at_1": 0.5}, {"step": 1, **values}]
    assert read_metrics(tmp_path / "metrics.jsonl") == (rows if main else [])
    assert main or not list(tmp_path.iterdir())
    with RunReport(tmp_path, 1, 10) as report:
        assert not report.is_new


def test_the_garbage_collector_is_enabled_again_after_an_error() -> None:
    class Ring:
        pass

    with pytest.raises(ZeroDivisionError), collected_between_steps() as collect:  # noqa: PT012
        assert not gc.isenabled()
        ring = Ring()
        ring.itself = ring  # type: ignore[attr-defined]
        seen = weakref.ref(ring)
        del ring
        assert seen() is not None
        collect()
        assert seen() is None
        1 / 0  # noqa: B018
    assert gc.isenabled() and gc.get_freeze_count() == 0
