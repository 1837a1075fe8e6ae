"""Times every op: interleaved repeats, after a check that all versions compute the same."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import CASES, Case
from muse_fast import ops
from muse_fast.ops import backends

REPEATS = 20
SECONDS_PER_CASE = 5.0
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative L2 against the literal version

Version = Callable[..., Any]


def run(device: str) -> dict[str, Any]:
    """All cases of a device; the result is what goes into the JSON file."""
    cases = [case for case in CASES if device in case.devices]
    return {"environment": environment(device), "results": [row for case in cases for row in run_case(case, device)]}


def run_case(case: Case, device: str) -> list[dict[str, Any]]:
    """One row per version. A version that computes something else gets an error instead of a time."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    arguments = to_device(case.inputs(torch.Generator().manual_seed(0), dtype), device)
    versions = available_versions(case, device)
    truth = outputs(case.literal, arguments)
    errors = {name: relative_error(outputs(version, arguments), truth) for name, version in versions.items()}
    sound = {name: version for name, version in versions.items() if errors[name] <= TOLERANCE[dtype]}
    milliseconds, peak = measure(sound, arguments, device)

    rows = []
    for name, error in errors.items():
        row: dict[str, Any] = {"op": case.op, "case": case.name, "version": name, "relative_error": error}
        if name in sound:
            deciles = statistics.quantiles(milliseconds[name], n=10, method="inclusive")
            p20, median, p80 = (deciles[place] for place in (1, 4, 7))
            row |= {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "repeats": len(milliseconds[name])}
            row["peak_mb"] = peak[name]
        rows.append(row)
    return rows


def available_versions(case: Case, device: str) -> dict[str, Version]:
    """The literal version, the reference, and every fast backend that runs here."""
    names = ["reference"] + [
        home for home in backends.HOMES[case.op] if backends.why_not(case.op, home, device) is None
    ]
    op = getattr(ops, case.op)
    return {"literal": case.literal} | {name: partial(op, backend=name) for name in names}


def outputs(version: Version, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a version returns, then the gradients of its inputs for fixed weights of the output."""
    result = version(*arguments)
    if isinstance(result, tuple):
        return list(result)
    weights = torch.linspace(0.5, 1.5, result.numel(), device=result.device, dtype=result.dtype)
    result.backward(weights.view_as(result))
    gradients = []
    for tensor in tensors_of(arguments):
        if tensor.grad is not None:
            gradients.append(tensor.grad)
            tensor.grad = None
    return [result.detach(), *gradients]


def measure(
    versions: dict[str, Version], arguments: tuple[Any, ...], device: str
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Milliseconds of forward and backward, the versions taking turns so that drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    peak: dict[str, float | None] = dict.fromkeys(versions)
    started = time.perf_counter()
    for repeat in range(REPEATS + 1):
        if repeat > 3 and time.perf_counter() - started > SECONDS_PER_CASE:
            break
        for name, version in versions.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                torch.cuda.synchronize()
            start = time.perf_counter()
            outputs(version, arguments)
            if device == "cuda":
                torch.cuda.synchronize()
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
            if repeat > 0:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return times, peak


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative L2 distance; infinite where shapes or the number of gradients differ."""
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in expected]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True)]
    return max(((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)


def tensors_of(arguments: tuple[Any, ...]) -> list[Tensor]:
    flat = [item for argument in arguments for item in (argument if isinstance(argument, list) else [argument])]
    return [item for item in flat if isinstance(item, Tensor)]


def to_device(arguments: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """Leaves on the device; the maps, logits, features and prototypes ask for gradients."""

    def move(argument: Any) -> Any:
        if isinstance(argument, list):
            return [move(item) for item in argument]
        if not isinstance(argument, Tensor):
            return argument
        differentiable = argument.is_floating_point() and argument.dim() > 1 and argument.shape[1] > 2
        return argument.to(device).requires_grad_(differentiable)

    return tuple(move(argument) for argument in arguments)


def environment(device: str) -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
        "repeats_at_most": REPEATS,
    }


def commit() -> str:
    """Of the checkout; ``$COMMIT`` names it where the sources were copied without their history."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:  # no git
        return "unknown"
