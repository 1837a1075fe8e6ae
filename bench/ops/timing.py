"""Time every op: its versions, the check that they agree, and the figures of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.machine import Rates
from bench.measure import evaluate, extra_memory, interleaved, quantiles, relative_error, tensors_of
from bench.ops.baselines import EAGER, LITERAL
from bench.ops.cases import CASES, WORK, Case, Work
from muse_fast import ops
from muse_fast.ops import backends

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative L2 against float64; an error of 1 % fails
LEVELS = {"augment_views": 0.02}  # values are whole grey levels: at a tie two versions differ by one of 256
LENGTHS_FROM_DATA = ("match_nuclei", "augment_views")  # torch.compile would run these in eager mode
BASELINES = ("literal", "eager", "compile")

Row = dict[str, Any]


class Version(NamedTuple):
    """One way to compute an op; ``kind`` is one of BASELINES, or ``fast`` for a backend."""

    name: str
    kind: str
    call: Callable[..., Any]


def selected(device: str, only: str | None = None, name: str = "") -> list[Case]:
    """Return the cases of a device, optionally of one op, whose names contain ``name``.

    On CUDA those with targets come first, as compiling the forms of all takes minutes there.
    """
    cases = [
        case
        for case in CASES
        if device in case.devices and only in (None, case.op) and name.lower() in case.name.lower()
    ]
    return sorted(cases, key=lambda case: device == "cuda" and all(t.device != device for t in case.targets))


def run_case(case: Case, device: str, rates: Rates) -> list[Row]:
    """Return one row per version: its figures, or under ``wrong`` or ``skipped`` the reason why it has none."""
    torch.compiler.reset()  # a form compiled for the sizes of another case would be recompiled as dynamic
    arguments = arguments_of(case, device)
    truth = expected(case, arguments)
    work = WORK[case.op](truth, *arguments)
    versions = {version.name: version for version in versions_of(case.op, device)}
    rows = {name: check(case.op, version, arguments, truth) for name, version in versions.items()}
    passed = {name: versions[name].call for name, row in rows.items() if row.keys() == {"relative_error"}}
    for name, times in interleaved(passed, arguments, device).items():
        rows[name] |= figures(times, extra_memory(passed[name], arguments, device), work, rates)

    about = {"op": case.op, "case": case.name, "inputs": [describe(tensor) for tensor in tensors_of(arguments)]}
    report = [about | {"version": name, "kind": versions[name].kind} | row for name, row in rows.items()]
    add_ratios(report)
    add_targets(report, case, device)
    return report + [about | row for row in skipped(case.op, device)]


def arguments_of(case: Case, device: str) -> tuple[Any, ...]:
    """Build the arguments on the device; where the dtype is free, float32 on the CPU and bfloat16 on CUDA."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return mapped(case.inputs(torch.Generator().manual_seed(0), dtype), lambda tensor: tensor.to(device))


def expected(case: Case, arguments: Sequence[Any]) -> list[Tensor]:
    """Return the results of the literal version in float64."""
    return evaluate(
        LITERAL[case.op],
        mapped(arguments, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor),
    )


def mapped(arguments: Sequence[Any], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """Apply ``change`` to the tensors, and return new leaves that require a gradient if the arguments do."""

    def apply(argument: Any) -> Any:
        if isinstance(argument, list):
            return [apply(item) for item in argument]
        if not isinstance(argument, Tensor):
            return argument
        return change(argument.detach()).requires_grad_(argument.requires_grad)

    return tuple(apply(argument) for argument in arguments)


def versions_of(op: str, device: str) -> list[Version]:
    """Return the literal version, each eager form, plain and compiled, and every fast backend that runs here."""
    eager = [Version(f"eager {form}".strip(), "eager", call) for form, call in EAGER[op].items()]
    compiled = [
        Version(version.name.replace("eager", "compile"), "compile", torch.compile(version.call, dynamic=False))
        for version in eager
        if op not in LENGTHS_FROM_DATA
    ]
    fast = [
        Version(backend, "fast", partial(getattr(ops, op), backend=backend))
        for backend in backends.HOMES[op]
        if backends.why_not(op, backend, device) is None
    ]
    return [Version("literal", "literal", LITERAL[op]), *eager, *compiled, *fast]


def skipped(op: str, device: str) -> list[Row]:
    """Return the versions that `versions_of` does not return, and why."""
    reasons = {backend: backends.why_not(op, backend, device) for backend in backends.HOMES[op]}
    rows = [{"version": backend, "kind": "fast", "skipped": reason} for backend, reason in reasons.items() if reason]
    if op in LENGTHS_FROM_DATA:
        reason = "it has data-dependent lengths, so it would run in eager mode"
        rows.append({"version": "compile", "kind": "compile", "skipped": reason})
    return rows


def check(op: str, version: Version, arguments: Sequence[Any], truth: Sequence[Tensor]) -> Row:
    """Return the error of a version's results and gradients, and ``wrong`` if it is too large or the version fails.

    A form that torch.compile cannot compile is ``skipped``, not ``wrong``.
    """
    try:
        error = relative_error(evaluate(version.call, arguments), truth)
    except Exception as exception:  # any failure goes into the report
        reason = f"{type(exception).__name__}: {exception}".splitlines()[0]
        return {"skipped" if version.kind == "compile" else "wrong": reason}
    tolerance = LEVELS.get(op, max(TOLERANCE.get(tensor.dtype, 0.0) for tensor in tensors_of(arguments)))
    if version.kind in BASELINES:
        tolerance *= 2  # PyTorch accumulates in bfloat16 in some places
    if error <= tolerance:
        return {"relative_error": error}
    return {"relative_error": error, "wrong": f"relative error {error:.0e}, above {tolerance:.0e}"}


def figures(times: list[float], extra: int, work: Work, rates: Rates) -> Row:
    """Return quantiles, memory, and the rates of the minimum work in the median time."""
    row = quantiles(times)
    bytes_per_second, flops = work.bytes / row["median_ms"] * 1e3, work.flops / row["median_ms"] * 1e3
    return row | {
        "extra_bytes": extra,
        "least_bytes": work.bytes,
        "least_flops": work.flops,
        "gb_per_s": bytes_per_second / 1e9,
        "gflop_per_s": flops / 1e9,
        "of_copy": bytes_per_second / rates.copy,
        "of_matmul": flops / rates.matmul,
    }


def add_ratios(rows: list[Row]) -> None:
    """Add ``speedup_X`` and ``memory_X``: time and extra memory of the fastest version of kind X over the row's own."""
    timed = [row for row in rows if "median_ms" in row]
    for kind in BASELINES:
        of_kind = [row for row in timed if row["kind"] == kind]
        if not of_kind:
            continue
        baseline = min(of_kind, key=lambda row: row["median_ms"])
        for row in timed:
            row[f"speedup_{kind}"] = baseline["median_ms"] / row["median_ms"]
            row[f"memory_{kind}"] = baseline["extra_bytes"] / max(1, row["extra_bytes"])


def add_targets(rows: list[Row], case: Case, device: str) -> None:
    """Add to the default backend's row each target, the value it reached, and whether the target was met."""
    for row in rows:
        if row["version"] == backends.choose(case.op, device, None) and "median_ms" in row:
            row["targets"] = [
                {"figure": figure, "at_least": least, "reached": row[figure], "met": row[figure] >= least}
                for where, figure, least in case.targets
                if where == device and figure in row
            ]


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
