import json
import os
import signal
import time
from pathlib import Path

from muse_fast.train.progress import MetricsLog, StopSignal, Stopwatch, TrainingProgress, read_metrics


def test_a_resumed_log_drops_later_rows_and_a_cut_line(tmp_path: Path) -> None:
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


def test_tensorboard_holds_the_same_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, 0) as log:
        log.write(5, {"loss": 2.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 2.5)]


def test_stopwatch_tells_waiting_from_working() -> None:
    def slow_data() -> object:
        for _ in range(3):
            time.sleep(0.03)
            yield None

    watch = Stopwatch()
    for _ in watch.timed(slow_data()):  # type: ignore[arg-type]
        time.sleep(0.03)
    reading = watch.read(rois_per_step=8)
    assert 0.3 < reading["data_wait"] < 0.7
    assert 24 / 1.0 < reading["rois_per_second"] <= 24 / 0.18
    assert watch.read(8)["rois_per_second"] == 0


def test_plain_lines_without_a_terminal(capsys) -> None:  # type: ignore[no-untyped-def]
    values = {"loss": 3.0, "loss_image": 1.0, "loss_nucleus": 2.0, "rois_per_second": 12.34, "data_wait": 0.25}
    with TrainingProgress(0, 10) as progress:
        progress.show(5, values)
    out = capsys.readouterr().out
    assert "step 5/10" in out and "12.3 ROI/s" in out and "data wait 25 %" in out and "ETA" in out


def test_sigterm_is_a_request_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
