"""``python -m bench ops [--device cpu|cuda] [--only OP] [--case SUBSTRING] [--json OUT]``"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import ops
from bench.measure import machine_rates
from muse_fast.ops import backends

FIGURES = {
    "speedup_literal": "{}x faster than literal",
    "speedup_eager": "{}x faster than eager",
    "speedup_compile": "{}x faster than torch.compile",
    "memory_eager": "1/{} of the memory of eager",
    "of_copy": "{} of copy bandwidth",
}


def main(argv: list[str] | None = None) -> int:
    """Prints a table per case, writes the JSON; exit code 1 when a version is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time the ops of muse_fast.")
    parser.add_argument("what", choices=["ops"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=sorted(backends.HOMES), metavar="OP", help="time this op alone")
    parser.add_argument("--case", default="", metavar="SUBSTRING", help="time the cases with this in their name")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    cases = ops.selected(options.device, options.only, options.case)
    if not cases:
        parser.error(f"no case of {options.only or 'any op'} on {options.device} has '{options.case}' in its name")

    torch._logging.set_logs(all=logging.ERROR)  # torch.compile warns of every length that it does not know beforehand
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    environment, rates = ops.environment(options.device), machine_rates(options.device)
    console.print(", ".join(f"{key} {value}" for key, value in environment.items()))
    console.print(f"copy {rates.copy / 1e9:.1f} GB/s, matrix product {rates.matmul / 1e12:.3g} TFLOP/s")
    report: dict[str, Any] = {"environment": environment, "rates": rates._asdict(), "results": []}
    for number, case in enumerate(cases, 1):
        started = time.perf_counter()
        console.print(f"\n[{number}/{len(cases)}] {case.op}: {case.name} ...", markup=False)
        rows = ops.run_case(case, options.device, rates)
        show(rows, console)
        console.print(f"{time.perf_counter() - started:.0f} s")
        report["results"] += rows
        if options.json:  # after every case: what is there stays if a later one is cut off
            options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if any("wrong" in row for row in report["results"]) else 0


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The versions of one case; below, what was left out and the targets."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("version", no_wrap=True)
    for column in ("ms", "p20 .. p80", "x literal", "x eager", "x compile", "extra MB", "x eager"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("GB/s", "of copy", "GFLOP/s", "of matmul", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if "median_ms" in row:
            table.add_row(row["version"], *cells(row))
    console.print(table)
    for row in rows:
        for verdict in ("wrong", "skipped"):
            if verdict in row:
                console.print(f"{row['version']} {verdict}: {escape(row[verdict])}")
        for target in row.get("targets", []):
            figure = FIGURES[target["figure"]]
            reached, wanted = (figure.format(number(target[key])) for key in ("reached", "at_least"))
            console.print(f"{row['version']}: {reached}, target {wanted}: {'met' if target['met'] else 'missed'}")


def cells(row: dict[str, Any]) -> list[str]:
    def ratio(name: str) -> str:
        return number(row[name]) if name in row else ""

    return [
        number(row["median_ms"]),
        f"{number(row['p20_ms'])} .. {number(row['p80_ms'])}",
        *(ratio(f"speedup_{kind}") for kind in ops.BASELINES),
        number(row["extra_bytes"] / 1e6),
        ratio("memory_eager"),
        number(row["gb_per_s"]),
        f"{row['of_copy']:.0%}",
        number(row["gflop_per_s"]),
        f"{row['of_matmul']:.0%}",
        f"{row['relative_error']:.0e}",
    ]


def number(value: float) -> str:
    """Three digits; more where they stand before the point, and none of what is beyond reckoning."""
    return ">99999" if value > 99999 else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
