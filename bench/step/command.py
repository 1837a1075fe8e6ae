"""Time whole training steps of the engine and of two baselines in eager PyTorch, from the same weights on the same
views; or, with --lfov, forward and backward of a backbone on large images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.machine import environment, machine_rates
from bench.report import console, number, print_machine, print_verdicts, table, write_json
from bench.step import lfov, timing
from muse_fast.config import ATTENTION, load_config
from muse_fast.errors import UserError
from muse_fast.models.archs import check_model
from muse_fast.runtime.device import peak_flops

ARCH = {"cpu": "vit_tiny", "cuda": "vit_small"}
BATCH = {"cpu": 4, "cuda": 64}
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
LOCAL_SIZE = {224: 96, 512: 208}
FIGURES = {
    "speedup_literal": "{}x faster than literal",
    "speedup_fair": "{}x faster than fair",
    "memory_literal": "1/{} of the memory of literal's step",
    "memory_fair": "1/{} of the memory of fair's step",
    "mfu": "MFU {}",
}
COLUMNS = (
    "version", "ms", "p20 .. p80", "img/s", "x literal", "x fair", "TFLOP/s", "of matmul", "MFU",
    "step MB", "x literal", "x fair", "peak MB", "error",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        action="append",
        help="vit_tiny on a CPU, vit_small on CUDA; repeat to time the engine with others beside it (timm:NAME)",
    )
    parser.add_argument(
        "--size", type=int, choices=LOCAL_SIZE, default=224, help="side of global views; locals have 96 or 208 px"
    )
    parser.add_argument("--batch", type=int, metavar="ROIS", help=" or ".join(f"{n} on {d}" for d, n in BATCH.items()))
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="fp32 on a CPU, bf16 on CUDA")
    parser.add_argument(
        "--attention", choices=ATTENTION, action="append", help="attention of the engine; repeat to time several"
    )
    parser.add_argument(
        "--only", choices=[*timing.BASELINES, "fast"], action="append", help="kind of version to time (all); repeatable"
    )
    parser.add_argument(
        "--logit-free",
        choices=["auto", "true", "false"],
        action="append",
        help="loss of the engine; repeat to time several",
    )
    parser.add_argument("--compile", action="store_true", help="also time the engine with torch.compile")
    parser.add_argument(
        "--cuda-graph",
        choices=["auto", "true", "false"],
        action="append",
        help="whether the engine replays CUDA graphs; repeat to time both",
    )
    parser.add_argument(
        "--from-host",
        action="store_true",
        help="also time the engine on uint8 views that come from the host",
    )
    parser.add_argument("--seconds", type=float, default=20, help="time per version; at least three repeats")
    parser.add_argument("--lfov", type=int, metavar="SIDE", help="time forward and backward on images of SIDE pixels")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the run, as for pretraining")


def main(options: argparse.Namespace) -> int:
    """Print a table; exit code 1 if a version is wrong or the engine did not run."""
    device = options.device
    options.arch = options.arch or [ARCH[device]]
    options.precision = options.precision or PRECISION[device]
    options.batch = options.batch or (lfov.BATCH if options.lfov else BATCH[device])
    out, machine, rates = console(), environment(device), machine_rates(device)
    print_machine(out, machine, rates)
    peak = peak_flops(torch.device(device))

    def keep(report: dict[str, Any]) -> None:  # again and again, in case the command is interrupted
        if options.json:
            write_json(options.json, {"environment": machine, "rates": rates._asdict(), "peak_flops": peak, **report})

    try:
        report = (large_images if options.lfov else steps)(options, out, rates.matmul, peak, keep)
    except UserError as error:
        options.parser.error(str(error))
    keep(report)
    print_verdicts(out, report["results"], FIGURES)
    wanted = [row for row in report["results"] if row["kind"] == "fast"] or report["results"]
    return 1 if any("wrong" in row for row in report["results"]) or all("skipped" in row for row in wanted) else 0


Keep = Callable[[dict[str, Any]], None]


def steps(options: argparse.Namespace, out: Console, matmul: float, peak: float | None, keep: Keep) -> dict[str, Any]:
    shared = [
        f"model.arch={options.arch[0]}",
        f"views.global_size={options.size}",
        f"views.local_size={LOCAL_SIZE[options.size]}",
        f"optim.batch_size={options.batch}",
        f"train.precision={options.precision}",
        *options.settings,
    ]
    config = load_config(None, shared)
    for arch in options.arch:
        check_model(load_config(None, [*shared, f"model.arch={arch}"]))
    inputs = timing.describe(config)
    out.print(
        f"\n{config.model.arch}, {config.train.precision}, {inputs['rois']} ROIs of {config.views.num_globals} x "
        f"{config.views.global_size} and {config.views.num_locals} x {config.views.local_size} px, "
        f"{inputs['rows']:.0f} nuclei and {inputs['pairs']:.0f} pairs per ROI, {config.head.prototypes} prototypes ..."
    )
    known = {"settings": shared, "inputs": inputs}
    rows = timing.run(
        versions(options),
        shared,
        options.device,
        options.seconds,
        matmul,
        peak,
        lambda rows: keep({**known, "results": rows}),
    )
    chip = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    timing.add_targets(rows, timing.targets(chip, config))
    out.print(table(COLUMNS, [cells(row) for row in rows if "median_ms" in row]))
    for row in rows:
        if "profile" in row:
            out.print(f"{row['version']}: where the time of a step goes")
            out.print(table(("operation", "calls", "ms", "share"), [profile_cells(line) for line in row["profile"]]))
    return {**known, "results": rows}


def versions(options: argparse.Namespace) -> list[timing.Version]:
    fast = []
    attentions, losses, replays = options.attention or ["sdpa"], options.logit_free or [""], options.cuda_graph or [""]
    with_compile, with_host = ((False, True) if also else (False,) for also in (options.compile, options.from_host))
    for attention, loss, replay, compiled, from_host in product(attentions, losses, replays, with_compile, with_host):
        settings: tuple[str, ...] = (f"model.attention={attention}", f"train.compile={compiled}")
        settings += (f"loss.logit_free={loss}",) if loss else ()
        settings += (f"train.cuda_graph={replay}",) if replay else ()
        name = "fast"
        if len(attentions) > 1:
            name += f" {attention}"
        if len(losses) > 1:
            name += f" logit_free={loss}"
        if len(replays) > 1:
            name += f" cuda_graph={replay}"
        if compiled:
            name += " compiled"
        if from_host:
            name += " from host"
        fast.append(timing.Version(name, "fast", settings, from_host))
    beside = [
        timing.Version(f"{version.name} {arch}", "fast", (*version.settings, f"model.arch={arch}"), version.from_host)
        for arch in (options.arch or [])[1:]
        for version in fast
    ]
    found = [timing.Version("literal", "literal"), timing.Version("fair", "fair"), *fast, *beside]
    return [version for version in found if not options.only or version.kind in options.only]


def large_images(
    options: argparse.Namespace, out: Console, matmul: float, peak: float | None, keep: Keep
) -> dict[str, Any]:
    arch = options.arch[0]
    out.print(f"\n{arch}, {options.precision}, {options.batch} x {options.lfov} px, forward and backward ...")
    rows = lfov.run(arch, options.lfov, options.batch, options.precision, options.device, matmul, peak)
    out.print(table(COLUMNS, [cells(row) for row in rows if "median_ms" in row]))
    return {"settings": [f"model.arch={arch}", f"image={options.lfov}"], "results": rows}


def cells(row: dict[str, Any]) -> list[str]:
    def figure(name: str, form: str = "") -> str:
        return "" if name not in row else format(row[name], form) if form else number(row[name])

    return [
        row["version"],
        number(row["median_ms"]),
        f"{number(row['p20_ms'])} .. {number(row['p80_ms'])}",
        number(row["img_per_s"]),
        *(figure(f"speedup_{kind}") for kind in timing.BASELINES),
        number(row["gflop_per_s"] / 1e3),
        f"{row['of_matmul']:.0%}",
        figure("mfu", ".1%"),
        number(row["step_bytes"] / 1e6),
        *(figure(f"memory_{kind}") for kind in timing.BASELINES),
        number(row["peak_bytes"] / 1e6),
        figure("relative_error", ".0e"),
    ]


def profile_cells(line: dict[str, Any]) -> list[str]:
    name = line["name"]
    return [name if len(name) < 80 else f"{name[:79]}…", str(line["calls"]), number(line["ms"]), f"{line['share']:.1%}"]
