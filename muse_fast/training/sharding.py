"""Tensors that may be sharded over the ranks (FSDP2's DTensors), and their plain form in checkpoints.

`full` and `like` translate between the two, so a checkpoint is the same whatever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The part of each tensor that lies on this rank, sharing its memory."""
    return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor; all ranks must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """The whole ``value``, which all ranks have, laid out as ``tensor``: its device, sharding and strides."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    # Fused optimisers walk through weight and moments by address: a channels-last weight needs such moments.
    return torch.empty_like(tensor, dtype=value.dtype).copy_(value)
