import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from muse_fast.errors import UserError
from muse_fast.runtime.device import (
    available_memory,
    deterministic,
    peak_flops,
    peak_flops_of,
    peak_memory,
    pick_device,
)


def test_auto_is_a_gpu_if_there_is_one() -> None:
    assert pick_device("auto", "device").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu", "device") == torch.device("cpu")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.device=gpu"):
        pick_device("gpu", "train.device")
    for other in ("mps", "meta"):
        with pytest.raises(UserError, match=f"device={other}: expected auto, cpu, cuda or cuda:INDEX"):
            pick_device(other, "device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"use train\.device=cpu"):
        pick_device("cuda", "train.device")


@pytest.mark.parametrize(
    ("gpu", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 790),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 790),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_by_name(gpu: str, teraflops: float | None) -> None:
    assert peak_flops_of(gpu) == (None if teraflops is None else teraflops * 1e12)


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_peak_memory_of_the_process_is_in_bytes() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
    assert 0.99 * resident <= peak_memory(torch.device("cpu")) < os.sysconf("SC_PHYS_PAGES") * page


FAULTS = """
import ctypes, resource, torch
from muse_fast.runtime.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(9 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():  # pages
    return int(open("/proc/self/statm").read().split()[1])

def given_back():  # pages, when 3 GiB are freed of which 64 MiB were used
    sizes = 3 * 2**29, 64 * 2**20, 3 * 2**29
    blocks = [ctypes.c_void_p(libc.malloc(size)) for size in sizes]
    ctypes.memset(blocks[1], 1, sizes[1])
    held = resident()
    for block in blocks:
        libc.free(block)
    return held - resident()

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype, libc.free.restype = [ctypes.c_size_t], ctypes.c_void_p, None
faults(), print(faults()), print(keep_freed_memory())
print(given_back(), min(faults() for _ in range(10)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_not_faulted_in_again() -> None:
    """Nor is it given back when much is freed at once."""
    output = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    before, can, given_back, after = output.split()
    pages = 36 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert can == "True"
    assert int(before) >= pages
    assert int(after) < pages / 100
    assert int(given_back) < pages / 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu_includes_freed_memory() -> None:
    device = torch.device("cuda")
    torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    assert 64 * 2**20 <= peak_memory(device) < torch.cuda.get_device_properties(device).total_memory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_gpu_is_found_by_its_name() -> None:
    device = torch.device("cuda")
    assert peak_flops(device) == peak_flops_of(torch.cuda.get_device_name(device))


@pytest.mark.parametrize(
    ("group", "limits", "expected"),
    [
        ("0::/", {}, 2000 * 1024),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "3000"}, 3000),
        ("0::/a/b", {"a/b/memory.max": "5000", "a/memory.max": "7000", "memory.max": "6000"}, 5000),
        ("0::/gone/b", {"memory.max": "4000"}, 4000),
        ("0::/a", {"a/memory.max": "9000000000"}, 2000 * 1024),
        ("4:memory:/x", {"memory/x/memory.limit_in_bytes": "8000", "x/memory.max": "1"}, 8000),
        ("4:memory:/x", {"memory/memory.limit_in_bytes": "9000"}, 9000),
        ("4:cpu:/x\n0::/", {"cpu/x/memory.limit_in_bytes": "1"}, 2000 * 1024),
    ],
)
def test_available_memory_is_limited_by_the_cgroup(
    group: str, limits: dict[str, str], expected: int, tmp_path: Path
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  1 kB\nMemAvailable:    2000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"{group}\n")
    for name, limit in limits.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    assert available_memory(tmp_path / "proc", tmp_path / "cgroup") == expected


def test_available_memory_of_this_machine(tmp_path: Path) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_memory(tmp_path) == physical  # without /proc
    assert 0 < available_memory() <= physical


@pytest.mark.parametrize(
    ("device", "enabled", "expected"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_deterministic_only_within_its_body(
    device: str, enabled: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked only to warn, torch would not choose the deterministic form of attention."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with suppress(KeyError), deterministic(torch.device(device), enabled):
        assert torch.are_deterministic_algorithms_enabled() == expected
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.benchmark != expected
        assert torch.utils.deterministic.fill_uninitialized_memory != expected
        assert (os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8") == expected
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert torch.utils.deterministic.fill_uninitialized_memory
