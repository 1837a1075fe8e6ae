"""Tensors that may be sharded over the ranks (FSDP2's DTensors), and their plain form in checkpoints.

`full` and `like` convert between the two, so a checkpoint does not depend on how it was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from muse_fast.runtime.distributed import sum_over_ranks


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the part of each tensor on this rank: the tensor itself if it is not sharded, else sharing its memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def full(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; all ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of each whole tensor, ``[n]``; the host does not wait for the device.

    Either all tensors are sharded, then all ranks must call this together and it costs one all-reduce, or none is.
    """
    found = torch.stack(torch._foreach_norm(local(tensors)))
    if isinstance(tensors[0], DTensor):
        found = sum_over_ranks(found**2) ** 0.5
    return found


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return ``value``, which all ranks have in full, with the device, sharding and strides of ``tensor``."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    # Fused optimisers traverse weight and moments by address: a channels-last weight needs channels-last moments.
    return torch.empty_like(tensor, dtype=value.dtype).copy_(value)
