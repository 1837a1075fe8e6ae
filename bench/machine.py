"""The machine that the numbers come from: its name, its software and its peak rates."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.measure import milliseconds

H100_FLOPS = 790e12  # sustained dense bf16


class Rates(NamedTuple):
    """Measured rates: bytes per second (read plus written) of a large copy, FLOP per second of a large matrix
    product."""

    copy: float
    matmul: float


def machine_rates(device: str) -> Rates:
    cuda = device == "cuda"
    source = torch.ones(2**31 if cuda else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / best_seconds(lambda: target.copy_(source), device)
    if cuda and "H100" in torch.cuda.get_device_name():
        return Rates(copy, H100_FLOPS)
    side = 8192 if cuda else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    return Rates(copy, 2 * side**3 / best_seconds(lambda: a @ b, device))


def best_seconds(run: Callable[[], Any], device: str) -> float:
    return min(milliseconds(run, device) for _ in range(6)) / 1e3


def environment(device: str) -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "torch": torch.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
    }


def processor() -> str:
    """Return the CPU model from /proc/cpuinfo, else Python's name for it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of the checkout, or ``$COMMIT`` if the sources were copied without their history."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:  # no git
        return "unknown"
