"""Predict what a training step costs on a GPU, without one: count launches, waits, copies, bytes, FLOPs and memory on a
stand-in, and the least time that these need at the rates of given GPUs; compare with the committed counts. With --host,
compare the CPU time of the host instead."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import environment
from bench.measure import quantiles
from bench.plan.counts import RATES
from bench.plan.standin import run
from bench.report import console, number, table, write_json
from muse_fast.errors import UserError

COMMITTED = Path(__file__).with_name("counts.json")
FIGURES = ("launches", "replayed", "waits", "pageable_copies", "bytes", "flops", "peak_bytes")
LOCAL_SIZE = {224: 96, 512: 208}
PRETRAINING = ("ours", "fair", "literal")
TOLERANCE = 0.01
TIMES = ("median", "p20", "p80")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=[*PRETRAINING, "all", "finetune"], default="ours")
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--size", type=int, default=224, help="side of global views (224, 512) or of samples")
    parser.add_argument("--batch", type=int, default=64, metavar="IMAGES", help="ROIs or samples of a step")
    parser.add_argument("--gpu", choices=RATES, default="H100", help="whose rates rank the operations")
    parser.add_argument("--top", type=int, default=15, metavar="N", help="operations to list")
    parser.add_argument("--lines", type=int, default=0, metavar="N", help="lines to list, by launches of the host")
    parser.add_argument(
        "--host", action="store_true", help="instead of counting, time the host's steps: ratios of CPU time only"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all counts here")
    parser.add_argument("--commit", action="store_true", help=f"write the counts into {COMMITTED.name}")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the run")


def main(options: argparse.Namespace) -> int:
    """Print predictions; exit code 1 if a count differs from the committed one by more than 1 %."""
    out = console()
    if options.host:
        return host(out, options)
    try:
        results = count([job(engine, options) for engine in engines(options)], trace=options.lines > 0)
    except UserError as error:
        options.parser.error(str(error))
    out.print("Predictions: counted on a stand-in for a GPU. Times are least times at the rates given, not measured.")
    print_totals(out, results)
    for result in results:
        print_places(out, result)
    print_operations(out, results[0], options.gpu, options.top)
    if options.lines:
        print_lines(out, results[0], options.lines)
    known = committed()
    changes = [line for result in results for line in differences(result, known.get(key(result)))]
    for line in changes:
        out.print(line)
    if options.json:
        write_json(options.json, {"results": results})
    if options.commit:
        write_json(COMMITTED, known | {key(result): {name: result[name] for name in FIGURES} for result in results})
        return 0
    return 1 if changes else 0


def host(out: Console, options: argparse.Namespace) -> int:
    """Print how long the host computes for a step of each engine, and its ratio to *fair*."""
    names = list(dict.fromkeys([*engines(options), "fair"]))
    try:
        times = json.loads(run("bench.plan.worker", ["host", json.dumps([job(name, options) for name in names])]))
    except UserError as error:
        options.parser.error(str(error))
    rows: list[dict[str, Any]] = [
        {"engine": name, **quantiles([1e3 * s for s in some])} for name, some in zip(names, times, strict=True)
    ]
    of_fair = next(row["median_ms"] for row in rows if row["engine"] == "fair")
    for row in rows:
        row["of_fair"] = row["median_ms"] / of_fair
    out.print("CPU time of steps whose kernels do nothing. Most of it is the stand-in's, so only ratios say something.")
    cells = [[row["engine"], *(number(row[f"{name}_ms"]) for name in TIMES), f"{row['of_fair']:.2f}"] for row in rows]
    out.print(table(("engine", *(f"{name}, ms of CPU" for name in TIMES), "of fair"), cells))
    if options.json:
        write_json(options.json, {"environment": environment("cpu"), "results": rows})
    return 0


def engines(options: argparse.Namespace) -> Sequence[str]:
    return PRETRAINING if options.engine == "all" else (options.engine,)


def job(engine: str, options: argparse.Namespace) -> tuple[str, str, list[str]]:
    """The engine, arch and settings of `bench.plan.worker.Job`."""
    size, batch = options.size, f"optim.batch_size={options.batch}"
    if engine == "finetune":
        return engine, options.arch, [f"data.sample_size={size}", batch, *options.settings]
    if size not in LOCAL_SIZE:
        raise UserError(f"--size {size}: global views have {' or '.join(map(str, LOCAL_SIZE))} px")
    sizes = [f"views.global_size={size}", f"views.local_size={LOCAL_SIZE[size]}"]
    return engine, options.arch, [*sizes, batch, *options.settings]


def count(jobs: Sequence[Any], *, trace: bool = False) -> list[dict[str, Any]]:
    """The counts of a step of each job, see `bench.plan.worker`."""
    return json.loads(run("bench.plan.worker", ["trace" if trace else "count", json.dumps(jobs)]))


def committed() -> dict[str, dict[str, float]]:
    """The figures in the repository, by `key`."""
    return json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}


def key(result: dict[str, Any]) -> str:
    return " ".join([result["engine"], result["arch"], *result["settings"]])


def differences(result: dict[str, Any], known: dict[str, float] | None) -> list[str]:
    """A line for each figure that is not within 1 % of the committed one; waits and pageable copies must be equal."""
    if known is None:
        return []
    lines = []
    for name in FIGURES:
        now, before = result[name], known[name]
        allowed = 0 if name in ("waits", "pageable_copies") else TOLERANCE * before
        if abs(now - before) > allowed:
            change = f" ({now / before - 1:+.1%})" if before else ""
            lines.append(f"{result['engine']}: {name} {now:,.0f}, committed {before:,.0f}{change}")
    return lines


def print_totals(out: Console, results: Sequence[dict[str, Any]]) -> None:
    columns = ("engine", "launches", "replayed", "waits", "pageable", "GB", "TFLOP", "useful", "peak GiB")
    times = [f"{gpu} {unit}" for gpu in RATES for unit in ("ms", "us/img")]
    rows = []
    for result in results:
        useful = result["useful_flops"]
        seconds = result["seconds"].values()
        rows.append(
            [
                result["engine"],
                *(f"{result[name]:,}" for name in ("launches", "replayed", "waits", "pageable_copies")),
                f"{result['bytes'] / 1e9:.1f}",
                f"{result['flops'] / 1e12:.2f}",
                "" if useful is None else f"{useful / 1e12:.2f}",
                f"{result['peak_bytes'] / 2**30:.2f}",
                *(text for s in seconds for text in (f"{s * 1e3:.1f}", f"{s / result['images'] * 1e6:.0f}")),
            ]
        )
    out.print(table((*columns, *times), rows))


def print_places(out: Console, result: dict[str, Any]) -> None:
    """Where the host waits and where it copies pageable memory."""
    for what, places in (("wait", result["waits_at"]), ("pageable copy", result["pageable_at"])):
        for place, times in places.items():
            out.print(f"{result['engine']}: {times} x {what}: {place}")


def print_operations(out: Console, result: dict[str, Any], gpu: str, top: int) -> None:
    ranked = sorted(result["operations"].items(), key=lambda item: -item[1]["seconds"][gpu])[:top]
    rows = [
        [
            name,
            str(row["calls"]),
            str(row["launches"] + row["replayed"]),
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['flops'] / 1e12:.3f}",
            number(row["seconds"][gpu] * 1e3),
        ]
        for name, row in ranked
    ]
    out.print(f"{result['engine']}: the operations with the largest least time on an {gpu}")
    out.print(table(("operation", "calls", "launches", "GB", "TFLOP", "ms"), rows))


def print_lines(out: Console, result: dict[str, Any], top: int) -> None:
    rows = [[where, name, str(launches)] for launches, where, name in result["launched_at"][:top]]
    out.print(f"{result['engine']}: lines of the project by what the host launches there")
    out.print(table(("line", "operation", "launches"), rows))
