"""Progress of a command: a bar with ETA on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeAlias, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

ShowProgress: TypeAlias = Callable[[int, int, str], None]
"""Called with the number done, the total, and the unit that is counted."""

_Item = TypeVar("_Item")


class ProgressBar(Progress):
    """A bar for each unit that is counted; without a terminal, lines such as ``slides 12/40, ETA 0:03:10``.

    Args:
        title: precedes the unit.
        seconds_between_lines: the least; 0 prints a line for each `show`.
    """

    def __init__(self, title: str = "", *, seconds_between_lines: float = 10.0) -> None:
        console = Console()
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=3600,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}
        self._title, self._seconds_between_lines, self._last = title, seconds_between_lines, self.get_time()

    def show(self, done: int, total: int | None, unit: str, text: str = "") -> None:
        """Show ``done`` of ``total`` units (None if unknown), followed by ``text``."""
        if unit not in self._bars:
            self._bars[unit] = self.add_task(f"{self._title} {unit}".strip(), total=total, text=text)
        task = self.tasks[self._bars[unit]]
        if done < task.completed:  # counted from the start again
            self.reset(task.id, total=total)
        self.update(task.id, completed=done, total=total, text=text)
        if self.disable and self.get_time() - self._last >= self._seconds_between_lines:
            self._last = self.get_time()
            of_total = "" if total is None else f"/{total}"
            eta = "" if task.time_remaining is None else f", ETA {timedelta(seconds=task.time_remaining)}"
            print(f"{task.description} {done}{of_total}{eta}  {text}".rstrip(), flush=True)


def track(items: Iterable[_Item], total: int | None, unit: str) -> Iterator[_Item]:
    """Pass the items on and show how many there were."""
    with ProgressBar() as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.show(done, total, unit, getattr(item, "slide", ""))
