"""Time whole fine-tuning steps of the engine, and of the paper's way in plain eager PyTorch, from the same weights on
the same samples: time, memory, and the share of matching nuclei with proposals."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.finetune_step import timing
from bench.machine import environment
from bench.report import console, number, print_verdicts, table, write_json
from bench.step.command import ARCH, PRECISION, profile_cells
from muse_fast.errors import UserError

BATCH = {"cpu": 2, "cuda": 4}
NUCLEI = 300  # in a sample of 512 px, half of which is annotated: 0.009 per um2
COLUMNS = (
    "px", "version", "ms", "p20 .. p80", "CPU ms", "img/s", "x literal", "CPU x literal", "matching ms", "share",
    "step MB", "x literal", "peak MB", "error",
)  # fmt: skip
FIGURES = {"speedup_literal": "{}x faster than literal"}
TARGET = 2.0  # at 512 px on a CPU
TOP = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", help="vit_tiny on a CPU, vit_small on CUDA")
    parser.add_argument("--size", type=int, nargs="+", default=[256, 512], help="sides of samples in px (256 512)")
    parser.add_argument(
        "--batch", type=int, metavar="IMAGES", help=" or ".join(f"{n} on {d}" for d, n in BATCH.items())
    )
    parser.add_argument("--nuclei", type=int, default=NUCLEI, help="annotated in a sample of 512 px (%(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="fp32 on a CPU, bf16 on CUDA")
    parser.add_argument("--only", choices=timing.KINDS, action="append", help="kind of version to time (both)")
    parser.add_argument("--seconds", type=float, default=20, help="time per version; at least three repeats")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the run, as for finetune")


def main(options: argparse.Namespace) -> int:
    """Print a table; exit code 1 if a version is wrong or did not run."""
    out, machine = console(), environment(options.device)
    out.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    report: dict[str, Any] = {"environment": machine, "weights": weights(options), "results": []}

    def keep() -> None:  # again and again, in case the command is interrupted
        if options.json:
            write_json(options.json, report)

    try:
        for side in options.size:
            of_side = case(options, side)
            out.print(f"{side} px: {of_side.config.optim.batch_size} samples with {of_side.nuclei} nuclei each ...")
            report["results"] += timing.new_rows(of_side, options.only or timing.KINDS)
            timing.run(of_side, [row for row in report["results"] if row["px"] == side], options.seconds, keep)
    except UserError as error:
        options.parser.error(str(error))
    keep()
    show(out, report["results"], options.device)
    return 1 if any(row.keys() & {"wrong", "skipped"} for row in report["results"]) else 0


def weights(options: argparse.Namespace) -> str:
    return f"random:{options.arch or ARCH[options.device]}"


def case(options: argparse.Namespace, side: int) -> timing.Case:
    device = options.device
    config = timing.settings(
        side, options.batch or BATCH[device], options.precision or PRECISION[device], options.settings
    )
    nuclei = max(1, round(options.nuclei * (side / 512) ** 2))
    return timing.Case(config=config, weights=weights(options), nuclei=nuclei, device=device)


def show(out: Console, rows: list[dict[str, Any]], device: str) -> None:
    out.print(table(COLUMNS, [cells(row) for row in rows if "median_ms" in row]))
    for row in rows:
        if "profile" in row:
            out.print(f"{row['px']} px, {row['version']}: where the time of a step goes")
            out.print(
                table(("operation", "calls", "ms", "share"), [profile_cells(one) for one in row["profile"][:TOP]])
            )
        if device == "cpu" and row["px"] == 512 and "speedup_literal" in row:
            reached = row["speedup_literal"]
            row["targets"] = [
                {"figure": "speedup_literal", "reached": reached, "at_least": TARGET, "met": reached >= TARGET}
            ]
    print_verdicts(out, rows, FIGURES)


def cells(row: dict[str, Any]) -> list[str]:
    def figure(name: str) -> str:
        return number(row[name]) if name in row else ""

    return [
        str(row["px"]),
        row["version"],
        number(row["median_ms"]),
        f"{number(row['p20_ms'])} .. {number(row['p80_ms'])}",
        number(row["cpu_ms"]),
        number(row["img_per_s"]),
        figure("speedup_literal"),
        figure("cpu_speedup_literal"),
        number(row["matching_ms"]),
        f"{row['matching_share']:.1%}",
        number(row["step_bytes"] / 1e6),
        figure("memory_literal"),
        number(row["peak_bytes"] / 1e6),
        f"{row['relative_error']:.0e}",
    ]
