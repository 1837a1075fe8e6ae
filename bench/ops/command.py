"""Time every op: forward, and backward if it has a gradient."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch

from bench.machine import environment, machine_rates
from bench.ops import timing
from bench.report import console, number, print_machine, print_verdicts, table, write_json
from muse_fast.ops import backends

FIGURES = {
    "speedup_literal": "{}x faster than literal",
    "speedup_eager": "{}x faster than eager",
    "speedup_compile": "{}x faster than torch.compile",
    "memory_eager": "1/{} of the memory of eager",
    "of_copy": "{} of copy bandwidth",
}
COLUMNS = (
    "version", "ms", "p20 .. p80", "x literal", "x eager", "x compile", "extra MB", "x eager",
    "GB/s", "of copy", "GFLOP/s", "of matmul", "error",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=sorted(backends.HOMES), metavar="OP", help="time only this op")
    parser.add_argument("--case", default="", metavar="SUBSTRING", help="time only cases with this in their names")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")


def main(options: argparse.Namespace) -> int:
    """Print a table per case; exit code 1 if a version is wrong."""
    cases = timing.selected(options.device, options.only, options.case)
    if not cases:
        options.parser.error(
            f"no case of {options.only or 'any op'} on {options.device} has '{options.case}' in its name"
        )
    torch._logging.set_logs(all=logging.ERROR)  # torch.compile warns about every data-dependent length
    out, machine, rates = console(), environment(options.device), machine_rates(options.device)
    print_machine(out, machine, rates)
    report: dict[str, Any] = {"environment": machine, "rates": rates._asdict(), "results": []}
    for place, case in enumerate(cases, 1):
        started = time.perf_counter()
        out.print(f"\n[{place}/{len(cases)}] {case.op}: {case.name} ...", markup=False)
        rows = timing.run_case(case, options.device, rates)
        out.print(table(COLUMNS, [cells(row) for row in rows if "median_ms" in row]))
        print_verdicts(out, rows, FIGURES)
        out.print(f"{time.perf_counter() - started:.0f} s")
        report["results"] += rows
        if options.json:  # after every case, in case a later one is interrupted
            write_json(options.json, report)
    return 1 if any("wrong" in row for row in report["results"]) else 0


def cells(row: dict[str, Any]) -> list[str]:
    def ratio(name: str) -> str:
        return number(row[name]) if name in row else ""

    return [
        row["version"],
        number(row["median_ms"]),
        f"{number(row['p20_ms'])} .. {number(row['p80_ms'])}",
        *(ratio(f"speedup_{kind}") for kind in timing.BASELINES),
        number(row["extra_bytes"] / 1e6),
        ratio("memory_eager"),
        number(row["gb_per_s"]),
        f"{row['of_copy']:.0%}",
        number(row["gflop_per_s"]),
        f"{row['of_matmul']:.0%}",
        f"{row['relative_error']:.0e}",
    ]
