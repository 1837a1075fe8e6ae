"""Time the distillation loss on the CPU with stored logits and without, over rows and prototypes: what
`loss.logit_free=auto` chooses between."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.loss import timing
from bench.machine import environment
from bench.report import console, number, table, write_json

COLUMNS = (
    "prototypes", "rows", "stored ms", "p20 .. p80", "logit-free ms", "p20 .. p80", "logit-free / stored",
    "stored MB", "logit-free MB", "difference",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prototypes", type=int, nargs="+", default=[128, 512, 4096, 65536], metavar="K")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024, 4096], metavar="N", help="student rows")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")


def main(options: argparse.Namespace) -> int:
    """Print a table; exit code 1 if the two forms differ."""
    if options.device != "cpu":
        options.parser.error("a run on a GPU never stores logits by itself: use --device cpu")
    if min(*options.prototypes, *options.rows) < 1:
        options.parser.error("--prototypes and --rows: expected numbers above 0")
    out, machine = console(), environment(options.device)
    out.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows: list[timing.Row] = []
    for prototypes in options.prototypes:
        rows += [timing.run(count, prototypes) for count in options.rows]
        if options.json:  # after every number of prototypes, in case a later one is interrupted
            write_json(options.json, {"environment": machine, "width": timing.WIDTH, "results": rows})
    out.print(table(COLUMNS, [cells(row) for row in rows if "wrong" not in row]))
    for row in rows:
        if "wrong" in row:
            out.print(f"{row['prototypes']} prototypes, {row['rows']} rows: {row['wrong']}")
    return 1 if any("wrong" in row for row in rows) else 0


def cells(row: dict[str, Any]) -> list[str]:
    stored, free = row["stored"], row["logit-free"]
    return [
        str(row["prototypes"]),
        str(row["rows"]),
        *(text for form in (stored, free) for text in (number(form["median_ms"]), spread(form))),
        number(row["speedup_stored"]),
        *(number(form["extra_bytes"] / 1e6) for form in (stored, free)),
        f"{row['relative_error']:.0e}",
    ]


def spread(form: dict[str, Any]) -> str:
    return f"{number(form['p20_ms'])} .. {number(form['p80_ms'])}"
