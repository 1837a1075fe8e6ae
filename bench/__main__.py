"""``python -m bench ops [--device cpu|cuda] [--json OUT]``"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import ops


def main(argv: list[str] | None = None) -> int:
    """Prints the table, writes the JSON; exit code 1 when a version computes something else than the literal one."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time the ops of muse_fast.")
    parser.add_argument("what", choices=["ops"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")

    report = ops.run(options.device)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    wrong = [row for row in report["results"] if "median_ms" not in row]
    return 1 if wrong else 0


def show(report: dict[str, Any]) -> None:
    medians = {(row["op"], row["case"], row["version"]): row.get("median_ms") for row in report["results"]}
    table = Table()
    for column in ("op", "case", "version"):
        table.add_column(column, no_wrap=True)
    for column in ("median ms", "p20 .. p80", "n", "vs literal", "vs reference", "peak MB", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["results"]:
        numbers = ["wrong result", "", "", "", "", ""]
        if "median_ms" in row:
            baselines = [medians[row["op"], row["case"], name] for name in ("literal", "reference")]
            ratios = [f"{baseline / row['median_ms']:.2f}x" if baseline else "" for baseline in baselines]
            spread = f"{row['p20_ms']:.2f} .. {row['p80_ms']:.2f}"
            peak = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
            numbers = [f"{row['median_ms']:.2f}", spread, str(row["repeats"]), *ratios, peak]
        table.add_row(row["op"], row["case"], row["version"], *numbers, f"{row['relative_error']:.0e}")
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
