"""Time the matrix products and convolutions of a step by themselves: the fastest that the engine could run them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.machine import environment, machine_rates
from bench.measure import milliseconds, quantiles
from bench.report import console, number, print_machine, table, write_json

REPEATS = 10
# Tokens of 64 ROIs (2 x 197 and 8 x 37 each), and widths K -> N of the layers of ViT-S and ViT-B.
TOKENS = {"cuda": 64 * (2 * 197 + 8 * 37), "cpu": 2 * (2 * 197 + 8 * 37)}
PRODUCTS = ((384, 1152), (384, 384), (384, 1536), (1536, 384), (768, 2304), (768, 768), (768, 3072), (3072, 768))
# 3 x 3 convolutions of the decoder: channels in and out, side of the map of a global view.
CONVOLUTIONS = ((96, 96, 56), (192, 192, 28), (384, 384, 14))
IMAGES = {"cuda": 128, "cpu": 2}


class Piece(NamedTuple):
    """What is timed."""

    name: str
    run: Callable[[], Tensor]
    flops: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers and the environment here")


def main(options: argparse.Namespace) -> int:
    """Print a table; the JSON is written after every row."""
    out, machine, rates = console(), environment(options.device), machine_rates(options.device)
    print_machine(out, machine, rates)
    report: dict[str, Any] = {"environment": machine, "rates": rates._asdict(), "results": []}
    for piece in pieces(options.device):
        times = quantiles([milliseconds(piece.run, options.device) for _ in range(1 + REPEATS)][1:])
        per_second = piece.flops / times["median_ms"] * 1e3
        report["results"].append(
            {"name": piece.name, **times, "flop_per_s": per_second, "of_matmul": per_second / rates.matmul}
        )
        if options.json:
            write_json(options.json, report)
    rows = [
        [row["name"], number(row["median_ms"]), number(row["flop_per_s"] / 1e12), f"{row['of_matmul']:.0%}"]
        for row in report["results"]
    ]
    out.print(table(("piece", "ms", "TFLOP/s", "of matmul"), rows))
    return 0


def pieces(device: str) -> Iterator[Piece]:
    """Yield the pieces with inputs on ``device``, in bfloat16 on CUDA and float32 on the CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    make = partial(torch.randn, device=device, dtype=dtype)
    tokens, images = TOKENS[device], IMAGES[device]
    for width, wider in PRODUCTS:
        x, weight = make(tokens, width), make(wider, width)
        yield Piece(f"[{tokens}, {width}] x {wider}", partial(F.linear, x, weight), 2 * tokens * width * wider)
    for given, made, side in CONVOLUTIONS:
        x = make(images, given, side, side).contiguous(memory_format=torch.channels_last)
        kernel = make(made, given, 3, 3).contiguous(memory_format=torch.channels_last)
        run = partial(F.conv2d, x, kernel, padding=1)
        yield Piece(f"3 x 3, {images} x {given} x {side}^2 -> {made}", run, 2 * 9 * images * side**2 * given * made)
