"""Ranks of the job; without an initialised process group there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT = timedelta(minutes=30)  # for one collective: the other ranks wait in one while the main one saves or draws


def launched() -> bool:
    """Whether torchrun, or whoever sets its variables, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The process group of a launched job: NCCL between GPUs, gloo between CPUs; nothing where there is one process."""
    if not launched():
        yield
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    yield
    dist.destroy_process_group()  # not after an error, when other ranks may be gone: it would wait for them


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    return dist.get_world_size() if _initialised() else 1


def is_main() -> bool:
    return rank() == 0


def wait_for_all() -> None:
    """Return when every rank is here."""
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank; all ranks wait for each other."""
    if world_size() == 1:
        return flag
    return sum_over_ranks(torch.tensor(float(flag), device=device)).item() > 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up ``tensor`` over all ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """``[...]`` of the same shape on every rank -> ``[ranks, ...]``, the same on all of them."""
    tensor = tensor.unsqueeze(0)
    if world_size() == 1:
        return tensor
    gathered = tensor.new_empty(world_size(), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
