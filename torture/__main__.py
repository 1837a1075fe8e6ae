"""``python -m torture [ROW ...] [--quick] [--json FILE]``; exit code 1 if a promise was not kept."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from muse_fast.runtime.atomic import write_json
from torture.harness import Ran, Row, run
from torture.rows import table

_PACKAGES = ("torch", "safetensors", "numpy", "simplejpeg", "pillow", "omegaconf")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torture", description="Inject faults into real runs.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one or more of {' '.join(table.NAMES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="use small counts: minutes instead of half an hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.rows if name not in table.NAMES]:
        parser.error(f"unknown rows: {', '.join(unknown)}; expected some of {', '.join(table.NAMES)}")

    console = Console(highlight=False, soft_wrap=True)
    chosen = [row for row in table.ROWS if not options.rows or row.name in options.rows]
    ran = []
    for row in chosen:
        if row.run is None or (options.quick and not row.quick):
            continue
        console.print(f"{row.name}: {row.promise} ...")
        ran.append(run(row, options.quick))
        console.print(f"   {_figures(ran[-1])} {ran[-1].outcome.notes}")
    console.print(show(chosen, ran))
    if options.json:
        write_json(options.json, report(ran, options.quick))
        console.print(f"figures: {options.json}")
    return 0 if all(each.passed for each in ran) else 1


def show(chosen: Sequence[Row], ran: Sequence[Ran]) -> Table:
    shown = Table(title="Injected and survived faults", title_justify="left")
    shown.add_column("row", no_wrap=True)
    shown.add_column("promise", overflow="fold")
    for column in ("injected", "survived", "seconds"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("target of a full run", overflow="fold")
    shown.add_column("", no_wrap=True)
    found = {each.row.name: each for each in ran}
    for row in chosen:
        if (each := found.get(row.name)) is None:
            shown.add_row(row.name, row.promise, "", "", "", row.target, "not run")
            continue
        counts = str(each.outcome.injected), str(each.outcome.survived), f"{each.seconds:.0f}"
        shown.add_row(row.name, row.promise, *counts, row.target, "pass" if each.passed else "[red]FAIL[/red]")
    return shown


def report(ran: Sequence[Ran], quick: bool) -> dict[str, Any]:
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "quick": quick,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "passed": all(each.passed for each in ran),
        "seconds": round(sum(each.seconds for each in ran)),
        "rows": {
            each.row.name: {
                "promise": each.row.promise,
                "target": each.row.target,
                **asdict(each.outcome),
                "seconds": round(each.seconds, 1),
                "passed": each.passed,
            }
            for each in ran
        },
    }


def _figures(each: Ran) -> str:
    return f"{each.outcome.survived} of {each.outcome.injected} in {each.seconds:.0f} s."


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    sys.exit(main())
