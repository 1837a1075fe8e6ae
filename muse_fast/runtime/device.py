"""Which device a command runs on, how fast it can be and how much memory was used."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from muse_fast.errors import UserError

# Dense bf16 FLOP/s by words in the GPU's name, the most specific first.
_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 790e12),
    ("H200", 790e12),
    ("H800", 790e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)


def pick_device(name: str, key: str, index: int = 0) -> torch.device:
    """Return the device that the setting ``key`` names; ``auto`` is a CUDA GPU if there is one, else the CPU.

    ``cuda`` without a number is GPU ``index``. The GPU becomes the current one.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{key}={name}: expected auto, cpu, cuda or cuda:INDEX")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}={name}: torch finds no CUDA GPU; use {key}=cpu")
    if device.type == "cuda":
        device = torch.device("cuda", index if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{key}={name}: there is no {device} among the {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    return device


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 FLOP/s for MFU, or None if it is not known, as for a CPU or a slice of a GPU.

    It is the datasheet's value without sparsity, except for the SXM boards of H100, H200 and H800: 790e12 instead of
    989e12, because their power limit allows large matmuls about four fifths of it.
    """
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(gpu: str) -> float | None:
    """Return `peak_flops` of a GPU by its CUDA device name."""
    words = set(re.split(r"[ -]", gpu))
    if "MIG" in words:
        return None
    return next((peak for name, peak in _PEAKS if words.issuperset(name.split())), None)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return ``tensor``, which is on the host, on ``device``, without waiting for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def fix_cublas_workspace() -> None:
    """Give cuBLAS, before this process first uses it, a workspace with which its results are the same in every run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(device: torch.device, enabled: bool) -> Iterator[None]:
    """Within the body, operations give the same bits in every run of the same program on the same kind of GPU, if
    ``enabled``; RuntimeError if torch has no such form of one. On a CPU they always do.

    torch then takes flash attention instead of cuDNN's, whose backward is not deterministic.
    """
    if not enabled or device.type != "cuda":
        yield
        return
    fix_cublas_workspace()
    cudnn, memory = torch.backends.cudnn, cast("Any", torch.utils.deterministic)
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark = False  # it chooses by time
    memory.fill_uninitialized_memory = False  # nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.benchmark, memory.fill_uninitialized_memory = before[1:]


class Stopwatch:
    """Measures the work that a device is given from now until `stop`, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._marks = device.type == "cuda", list[Any]()
        self.stop()

    def stop(self) -> None:
        mark: Any = time.perf_counter()
        if self._on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append(mark)

    def seconds(self) -> float:
        """Seconds that the work took; waits until a GPU has done it."""
        began, ended = self._marks
        if not self._on_gpu:
            return float(ended - began)
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1e3


def keep_freed_memory() -> bool:
    """Let this process keep the host memory that it frees; return whether the C library can (glibc).

    Otherwise glibc returns to the system what a training step on the CPU frees, and the next step gets it back with a
    page fault for every 4 KiB, up to a sixth of its time. The peak stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Of malloc.h: never trim the heap, and take all memory from it. A threshold instead of the latter may be at most 32
    # MiB before glibc 2.35.
    trim_threshold, mmap_max = (-1, -1), (-4, 0)
    return mallopt is not None and all(mallopt(*option) for option in (trim_threshold, mmap_max))


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes in use so far: by tensors on a GPU, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of host memory that processes can still take, at most the limit of this process's cgroup.

    The limit counts in full, though other processes of the group may use some of it. Without ``/proc``, it is the
    machine's memory.
    """
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE)
        groups = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        found, groups = None, []
    machine = int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [limit for _, kinds, path in groups for limit in _limits(cgroups, kinds, path)]
    return min([machine, *limits])


def _limits(cgroups: Path, kinds: str, path: str) -> Iterator[int]:
    """Yield the memory limits of a group and those around it, of version 2 of cgroups (no kinds) or 1."""
    if kinds not in ("", "memory"):
        return
    root, name = (cgroups / "memory", "memory.limit_in_bytes") if kinds else (cgroups, "memory.max")
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        try:
            text = (folder / name).read_text().strip()
        except OSError:  # a container may not see the groups around it
            text = ""
        if text.isdigit():
            yield int(text)
        if folder == root:
            return
