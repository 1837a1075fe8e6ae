"""The ranks of a job; without a process group there is one rank."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from muse_fast.errors import UserError
from muse_fast.runtime.watchdog import Place, Watchdog

_T = TypeVar("_T")
_TIMEOUT = timedelta(minutes=30)  # of a collective; the other ranks wait in one while the main rank saves or draws
_LOST = ("gloo/transport", "ncclRemoteError")  # in errors of gloo and NCCL when another rank is gone


def launched() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


_place = Place(0, 0)  # where this rank is


def at_step(step: int) -> None:
    """Record for the watchdog which step begins."""
    global _place
    _place = _place._replace(step=step)


def _count_collective() -> None:
    global _place
    _place = _place._replace(collectives=_place.collectives + 1)


@contextmanager
def process_group(device: torch.device, timeout: float, tell: Callable[[str, int], None]) -> Iterator[None]:
    """Create the process group of a launched job: NCCL for GPUs, gloo for CPUs; none for a single process.

    A rank that makes no progress for ``timeout`` seconds prints which rank it waits for, calls ``tell`` with that
    message and its step, and ends with code 4.

    Raises:
        UserError: the connection to another rank broke.
    """
    if not launched():
        yield
        return
    store, rank, world_size = join_store()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=_TIMEOUT,
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device if device.type == "cuda" else None,
    )
    with Watchdog(store, rank, world_size, timeout, lambda: _place, tell), _lost_rank_explained(rank):
        yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that may be gone


def join_store() -> tuple[dist.Store, int, int]:
    """Return the store of a launched job, this process's rank, and the number of ranks, once all have joined.

    Raises:
        torch.distributed.DistStoreError: not all ranks joined within half an hour.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    return store_of_this_start(store, rank, world_size, _TIMEOUT), rank, world_size


@contextmanager
def _lost_rank_explained(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in _LOST):
            raise
        raise UserError(
            f"step {_place.step}: rank {rank} lost its connection to another rank, which was killed or has ended "
            f"({str(error).splitlines()[0]}); see the output of that rank; the newest checkpoint is intact: start "
            "again to continue"
        ) from error


def store_of_this_start(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return a part of the job's store that only this start of the job uses.

    torchrun keeps one store over its restarts, with the addresses of ranks that are gone. A rank that reads one before
    the new address is written connects to a dead rank (pytorch/pytorch#167288). torchrun counts restarts per machine
    (#108158), so the count does not identify a start. Therefore rank 0 draws a random name, and every other rank asks
    for it until the current rank 0 has answered.

    Raises:
        torch.distributed.DistStoreError: not all ranks joined within ``timeout``.
    """
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("start", me)
        for other in range(1, world_size):
            store.wait([f"{me}/{other}"], timeout)
            store.set(f"{me}/{store.get(f'{me}/{other}').decode()}", "welcome")
        return dist.PrefixStore(me, store)
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", me)
        try:
            store.wait([f"{start}/{me}"], timedelta(seconds=1))
            return dist.PrefixStore(start, store)
        except dist.DistStoreError:  # this rank 0 is gone, or busy
            if time.monotonic() > deadline:
                raise


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of ranks on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    return dist.get_world_size() if _initialised() else 1


def is_main() -> bool:
    return rank() == 0


def wait_for_all() -> None:
    """Wait until all ranks have called this."""
    if world_size() > 1:
        _count_collective()
        dist.barrier()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true on any rank; all ranks wait for each other."""
    if world_size() == 1:
        return flag
    return sum_over_ranks(torch.tensor(float(flag), device=device)).item() > 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all ranks in place and return it."""
    if world_size() > 1:
        _count_collective()
        dist.all_reduce(tensor)
    return tensor


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """Gather ``[...]``, of the same shape on every rank, as ``[ranks, ...]`` on all of them."""
    tensor = tensor.unsqueeze(0)
    if world_size() == 1:
        return tensor
    gathered = tensor.new_empty(world_size(), *tensor.shape[1:])
    _count_collective()
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def gather_objects(value: _T) -> list[_T]:
    """Gather what each rank passes, in the order of ranks, on all of them."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    _count_collective()
    dist.all_gather_object(gathered, value)
    return gathered


@contextmanager
def alone() -> Iterator[None]:
    """In the body, this rank is the only one of its job and exchanges nothing with others."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


_is_alone = False


def _initialised() -> bool:
    return not _is_alone and dist.is_available() and dist.is_initialized()
