"""Output shared by the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.machine import Rates


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 150, highlight=False)


def print_machine(to: Console, environment: dict[str, Any], rates: Rates) -> None:
    to.print(", ".join(f"{key} {value}" for key, value in environment.items()))
    to.print(f"copy {rates.copy / 1e9:.1f} GB/s, matrix product {rates.matmul / 1e12:.3g} TFLOP/s")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Build a table with left-aligned names and right-aligned numbers."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        out.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        out.add_row(*row)
    return out


def print_verdicts(to: Console, rows: Sequence[dict[str, Any]], figures: dict[str, str]) -> None:
    """Print why a version was not timed, and which targets were met or missed."""
    for row in rows:
        for verdict in ("wrong", "skipped"):
            if verdict in row:
                to.print(f"{row['version']} {verdict}: {escape(row[verdict])}")
        for target in row.get("targets", []):
            figure = figures[target["figure"]]
            reached, wanted = (figure.format(number(target[key])) for key in ("reached", "at_least"))
            to.print(f"{row['version']}: {reached}, target {wanted}: {'met' if target['met'] else 'missed'}")


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write it whole or not at all, as it is written again after every row."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)


def number(value: float) -> str:
    """Format with three significant digits, or all digits before the point, up to 99999."""
    return ">99999" if value > 99999 else f"{value:.0f}" if value >= 100 else f"{value:.3g}"
