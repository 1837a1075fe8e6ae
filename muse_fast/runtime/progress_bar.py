"""Progress of a command: a bar with ETA on a terminal, else a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with the number done, the total, and the unit that is counted."""

_Item = TypeVar("_Item")


class Ticker:
    """Counts and shows what is done.

    Args:
        total: number of items, or None if unknown.
        unit: name of the items, in the plural.
    """

    def __init__(self, total: int | None, unit: str) -> None:
        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._total, self._unit, self._done = total, unit, 0
        self._started = self._last = time.monotonic()
        self._bar = rich.progress.Progress(
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=self._plain,
        )
        self._task = self._bar.add_task(unit, total=total)

    def done(self, text: str, count: int = 1) -> None:
        """Count ``count`` more items as done."""
        self._done += count
        self.show(text)

    def show(self, text: str) -> None:
        """Show the count and ``text``; without a terminal, at most every ten seconds."""
        if not self._plain:
            self._bar.update(self._task, completed=self._done, description=text)
            return
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last, rate = now, self._done / (now - self._started)
            of_total = f"/{self._total}" if self._total else ""
            eta = f", ETA {(self._total - self._done) / rate:.0f} s" if self._total and rate else ""
            print(f"{self._done}{of_total} {self._unit}, {rate:.2g} a second{eta}  {text}", flush=True)

    def __enter__(self) -> Ticker:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.stop()


def ticked(items: Iterable[_Item], total: int | None, unit: str) -> Iterator[_Item]:
    """Yield the items and count them."""
    with Ticker(total, unit) as ticker:
        for item in items:
            yield item
            ticker.done(getattr(item, "slide", ""))


@contextmanager
def progress_bar(console: Console, name: str) -> Iterator[Progress]:
    """Show a bar for each unit; without a terminal, a line every ten seconds."""
    if not console.is_terminal:
        printed = time.monotonic()

        def line(done: int, total: int, unit: str) -> None:
            nonlocal printed
            if time.monotonic() - printed > _SECONDS_BETWEEN_LINES:
                printed = time.monotonic()
                console.print(f"{name}: {done}/{total} {unit}", highlight=False)

        yield line
        return

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with rich.progress.Progress(
        *columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console
    ) as bar:
        tasks: dict[str, Any] = {}

        def update(done: int, total: int, unit: str) -> None:
            if unit not in tasks:
                tasks[unit] = bar.add_task(f"{name} {unit}", total=total)
            bar.update(tasks[unit], completed=done)

        yield update
