"""The output of a run (progress bar, metrics.jsonl, TensorBoard events), and signals that ask it to stop."""

from __future__ import annotations

import gc
import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from muse_fast.runtime import atomic
from muse_fast.runtime.distributed import is_main
from muse_fast.runtime.progress_bar import ProgressBar

_T = TypeVar("_T")

Metrics = dict[str, Tensor | float]
"""Measurements of a step. Tensors are 0-dim and on the device, so that the host waits only when it reads them."""


class Stopwatch:
    """Time between two readings, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._started, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterable[_T]) -> Iterator[_T]:
        """Yield ``batches``, measuring the wait for each."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            self._steps += 1
            yield batch

    def read(self) -> tuple[float, float]:
        """Return steps per second and the share of time spent waiting since the last reading, and restart."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        reading = self._steps / elapsed, self._waited / elapsed
        self._restart()
        return reading


def read_back(values: Metrics) -> dict[str, float]:
    """Convert 0-dim tensors to numbers in one copy from the device, for which the host waits."""
    tensors = {name: value.double() for name, value in values.items() if isinstance(value, Tensor)}
    numbers = dict(zip(tensors, torch.stack(list(tensors.values())).tolist() if tensors else [], strict=True))
    return {name: numbers.get(name, value) for name, value in values.items()}


class MetricsLog:
    """Rows of metrics.jsonl, mirrored to TensorBoard. A resumed run first drops the rows after its step."""

    def __init__(self, run: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self.path = run / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= start_step]
        self.is_new = not kept
        with atomic.replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self.path, "a")  # noqa: SIM115 - closed by __exit__
        self._hook = threading.excepthook
        threading.excepthook = self._of_thread
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row, which survives a kill once this returns."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
        try:
            self._board.close()
        finally:
            threading.excepthook = self._hook

    def _of_thread(self, raised: threading.ExceptHookArgs) -> None:
        """Pass over an error of TensorBoard's thread, as on a full disk: its writer's next call raises it again."""
        if type(raised.thread).__name__ != "_AsyncWriterThread":
            self._hook(raised)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, without a last line that a kill truncated."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _summary_line(values: Mapping[str, float]) -> str:
    """Summarise a row of pretraining."""
    losses = {key.removeprefix("loss_"): value for key, value in values.items() if key.startswith("loss_")}
    return (
        f"loss {values['loss']:.3f} ({', '.join(f'{name} {value:.3f}' for name, value in losses.items())}) "
        f"{values['rois_per_second']:.1f} ROI/s, data wait {100 * values['data_wait']:.0f} %"
        + (f", MFU {100 * values['mfu']:.0f} %" if "mfu" in values else "")
    )


class RunReport:
    """The log and the progress bar of a run on the main rank; on other ranks every call does nothing.

    Args:
        start_step: the step that a resumed run continues from, 0 in a new one.
        describe: returns the text after the bar for a row.

    Attributes:
        is_new: whether the run has not logged anything yet.
    """

    def __init__(
        self, run: Path, start_step: int, steps: int, describe: Callable[[Mapping[str, float]], str] = _summary_line
    ) -> None:
        self._steps, self._describe = steps, describe
        self._outputs = (MetricsLog(run, start_step), ProgressBar(seconds_between_lines=0)) if is_main() else None
        self.is_new = self._outputs is not None and self._outputs[0].is_new

    def training(self, step: int, values: Mapping[str, float]) -> None:
        """Log and show the row of a training step."""
        if self._outputs:
            log, bar = self._outputs
            log.write(step, values)
            bar.show(step, self._steps, "step", self._describe(values))

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Log the row of an evaluation."""
        if self._outputs:
            self._outputs[0].write(step, values)

    def __enter__(self) -> RunReport:
        for part in self._outputs or ():
            part.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        for part in reversed(self._outputs or ()):
            part.__exit__(*raised)


@contextmanager
def collected_between_steps() -> Iterator[Callable[[], int]]:
    """Disable Python's garbage collector during steps; yields the function that collects between them."""
    gc.collect()
    gc.freeze()  # do not scan modules and other old objects again, which takes 0.2 s each time
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a request to stop after the current step."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
