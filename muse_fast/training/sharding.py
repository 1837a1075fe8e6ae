"""Tensors that may be sharded over the ranks (FSDP2's DTensors), and their plain form in checkpoints.

`full` and `like` convert between the two, so a checkpoint does not depend on how it was written.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the part of each tensor on this rank, sharing its memory."""
    return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]


def full(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; all ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return ``value``, which all ranks have in full, with the device, sharding and strides of ``tensor``."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    # Fused optimisers traverse weight and moments by address: a channels-last weight needs channels-last moments.
    return torch.empty_like(tensor, dtype=value.dtype).copy_(value)
