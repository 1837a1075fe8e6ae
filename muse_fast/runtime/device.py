"""Which device a command runs on, how fast it can be and how much memory was used."""

from __future__ import annotations

import re
import resource
import sys

import torch

from muse_fast.errors import UserError

# Dense bf16 FLOP/s by the words of the GPU's name, the more special first.
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
    """The device that the setting ``key`` names; ``auto`` takes a CUDA GPU where there is one.

    A name without a number stands for GPU ``index``, which becomes the current one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{key}={name}: expected auto, cpu, cuda or cuda:INDEX") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}={name}: torch sees no CUDA GPU here; use {key}=cpu")
    if device.type == "cuda":
        device = torch.device("cuda", index if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"{key}={name}: there are {torch.cuda.device_count()} GPUs here, none is {device}")
        torch.cuda.set_device(device)
    return device


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that MFU is measured against; None where it is not known, as for a CPU or a slice of a GPU.

    It is the datasheet's figure without sparsity, except for the SXM boards of H100, H200 and H800: 790e12 where the
    datasheet says 989e12, for their power limit holds large matmuls to about four fifths of it.
    """
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(gpu: str) -> float | None:
    """`peak_flops` of a GPU by its name, as CUDA gives it."""
    words = set(re.split(r"[ -]", gpu))
    if "MIG" in words:
        return None
    return next((peak for name, peak in _PEAKS if words.issuperset(name.split())), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: by tensors on a GPU, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
