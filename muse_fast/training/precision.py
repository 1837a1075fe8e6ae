"""The precisions of a run: ``bf16`` is autocast over float32 weights, ``fp32`` and ``fp64`` are those of everything."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
"""Of matrix products."""


def dtype_of_weights(precision: str) -> torch.dtype:
    """Return the dtype of weights, losses and optimiser state."""
    return torch.promote_types(DTYPES[precision], torch.float32)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def print_precision_note(precision: str, device: torch.device) -> None:
    """Tell the user if the device only emulates bf16."""
    if precision == "bf16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        print("  note   this CPU emulates bf16, which is many times slower: train.precision=fp32")
