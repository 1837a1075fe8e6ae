"""Which device a command runs on."""

from __future__ import annotations

import torch

from muse_fast.errors import UserError


def pick_device(name: str, key: str) -> torch.device:
    """The device that the setting ``key`` names; ``auto`` takes a CUDA GPU where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{key}={name}: expected auto, cpu, cuda or cuda:INDEX") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}={name}: torch sees no CUDA GPU here; use {key}=cpu")
    return device
