"""Progress of a command: a bar with ETA on a terminal, else a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0

_Item = TypeVar("_Item")


class Ticker:
    """Counts what is done.

    Args:
        total: how many there are, None where nobody knows.
        unit: what is counted, in the plural.
    """

    def __init__(self, total: int | None, unit: str) -> None:
        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._total, self._unit, self._done = total, unit, 0
        self._started = self._last = time.monotonic()
        self._bar = Progress(
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
        """So many more are done."""
        self._done += count
        self.show(text)

    def show(self, text: str) -> None:
        """Show the count and ``text``, if it is time to."""
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
    """Pass the items on and count them."""
    with Ticker(total, unit) as ticker:
        for item in items:
            yield item
            ticker.done(getattr(item, "slide", ""))
