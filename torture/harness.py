"""Rows, and the input and output of their harnesses."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a harness.

    Attributes:
        injected: number of faults.
        survived: number of faults after which the promise held.
        notes: further figures, and the first faults that were not survived.
    """

    injected: int
    survived: int
    notes: str = ""


class Scale:
    """How much a harness does, a temporary folder for it, and its random numbers."""

    def __init__(self, quick: bool, folder: Path) -> None:
        self.quick, self.folder, self.rng = quick, folder, random.Random(0)

    def of(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def limit(self, seconds: float) -> float:
        """A time limit, promised for an idle machine. The quick form shares the machine and only stops hangs."""
        return 20 * seconds if self.quick else seconds


@dataclass(frozen=True, slots=True)
class Row:
    """One promise.

    Attributes:
        target: what a full run must achieve, in words.
        share: of the faults that must be survived.
        run: the harness; None if ``python -m torture`` does not test the promise (``target`` then says why).
        quick: whether it has a quick form.
    """

    name: str
    promise: str
    target: str
    run: Callable[[Scale], Outcome] | None
    share: float = 1.0
    quick: bool = True


@dataclass(frozen=True, slots=True)
class Ran:
    """A row and its outcome."""

    row: Row
    outcome: Outcome
    seconds: float

    @property
    def passed(self) -> bool:
        injected, survived = self.outcome.injected, self.outcome.survived
        return injected > 0 and self.row.share * injected <= survived <= injected


def run(row: Row, quick: bool) -> Ran:
    """Run a row that has a harness. A harness that raises has survived nothing."""
    assert row.run is not None
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"torture-{row.name}-") as folder:
        try:
            outcome = row.run(Scale(quick, Path(folder)))
        except Exception as error:
            outcome = Outcome(1, 0, f"{type(error).__name__}: {error}")
    return Ran(row, outcome, time.monotonic() - began)


class Tally:
    """Counts faults as they are injected, and remembers those that were not survived."""

    def __init__(self) -> None:
        self.injected = self.survived = 0
        self._failures: list[str] = []

    def add(self, survived: bool, what: str) -> None:
        self.injected += 1
        self.survived += survived
        if not survived:
            self._failures.append(what[:600])

    def outcome(self, notes: str = "") -> Outcome:
        failures = [f"FAILED {failure}" for failure in self._failures[:5]]
        return Outcome(self.injected, self.survived, "; ".join([*failures, *([notes] if notes else [])]))
