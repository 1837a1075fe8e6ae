"""Which device a command runs on, how fast it can be and how much memory was used."""

from __future__ import annotations

import re
import resource
import sys

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


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes in use so far: by tensors on a GPU, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
