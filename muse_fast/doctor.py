"""``python -m muse_fast.doctor [[--deep] FOLDER]``: show what is installed, which backend each op would use and why.

With the folder of a ROI set, check every byte of it instead; with ``--deep``, check a ROI set or a run and remove what
killed processes left behind.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from muse_fast.errors import UserError
from muse_fast.images import jpeg, jpeg_rows
from muse_fast.ops import backends
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime import exit_codes
from muse_fast.runtime.cli import run
from muse_fast.training import deep_check

# Distribution names; the first installed one counts.
PACKAGES = {
    "muse_fast": ("muse_fast",),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "triton": ("triton", "pytorch-triton"),
    "timm": ("timm",),
    "openslide": ("openslide-python",),
    "simplejpeg": ("simplejpeg",),
    "DALI": ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"),
    "xformers": ("xformers",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 1 if a ROI set or a run has problems that were not repaired."""
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.doctor",
        description="Show what is installed and which backend each op would use, or check a ROI set or a run.",
    )
    parser.add_argument("roiset", nargs="?", type=Path, metavar="FOLDER", help="ROI set to check (with --deep: or run)")
    parser.add_argument("--deep", action="store_true", help="check thoroughly, and repair if possible")
    options = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    if options.deep:
        if options.roiset is None:
            raise UserError("--deep needs the folder of a run or a ROI set")
        return check_deeply(options.roiset, console)
    if options.roiset is not None:
        return check_roiset(options.roiset, console)
    console.print(machine_table())
    console.print(backend_table())
    return 0


def check_roiset(path: Path, console: Console) -> int:
    """Print the problems of a ROI set and return the exit code."""
    roiset = RoiSet(path)
    console.print(f"{path}: {len(roiset)} ROIs, reading all of them")
    problems = roiset.verify()
    for problem in problems:
        console.print(f"[red]problem[/red] {problem}")
    console.print(f"{len(problems)} problems" if problems else "no problems")
    return exit_codes.FOUND if problems else 0


def check_deeply(path: Path, console: Console) -> int:
    """Print the problems of a run or a ROI set and what was done about them; return the exit code."""
    what, findings = deep_check.check(path)
    console.print(f"{path}: {what}, read completely")
    unrepaired = [finding for finding in findings if finding.repair not in deep_check.REPAIRED]
    for problem, repair in findings:
        console.print(f"[red]problem[/red] {problem}{f': {repair}' if repair else ''}")
    console.print(
        f"{len(findings)} problems, {len(findings) - len(unrepaired)} repaired or left alone"
        if findings
        else "no problems"
    )
    return exit_codes.FOUND if unrepaired else 0


def machine_table() -> Table:
    table = Table(title="What is installed", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("version or state", overflow="fold")
    for name, state in machine():
        table.add_row(name, state)
    return table


def machine() -> Iterator[tuple[str, str]]:
    """Yield names and states in the order of the table."""
    yield "Python", platform.python_version()
    for name, distributions in PACKAGES.items():
        yield name, installed_version(distributions)
    yield "CUDA of torch", torch.version.cuda or "none"
    yield "CUDA devices", ", ".join(cuda_devices()) or "none"
    yield "CPU threads", f"{len(os.sched_getaffinity(0))} usable, torch uses {torch.get_num_threads()}"
    yield "C++ library", backends.library_error() or f"loaded from {backends.LIBRARY}"
    compiled = jpeg.cutter is not jpeg_rows
    yield "JPEG rows", f"cut by {jpeg.cutter.__file__}" if compiled else "cut in Python: muse_fast/_jpeg was not built"
    yield "Triton kernels", backends.triton_error() or "importable"
    if forced := os.environ.get(backends.ENVIRONMENT):
        yield backends.ENVIRONMENT, forced


def installed_version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def cuda_devices() -> list[str]:
    """Return the name, compute capability and memory of each device."""
    devices = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = properties.total_memory / 2**30
        devices.append(f"{properties.name} (sm_{properties.major}{properties.minor}, {memory:.0f} GiB)")
    return devices


def backend_table() -> Table:
    table = Table(title="Backend of each op", title_justify="left")
    for column in ("op", "tensors on", "backend"):
        table.add_column(column, no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in backends.table():
        table.add_row(row.op, row.device, row.backend, row.reason)
    return table


if __name__ == "__main__":
    raise SystemExit(run(main))
