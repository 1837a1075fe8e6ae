"""Ranks for tests: processes joined by gloo that last for the test session, and checks of what they do."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from torture.processes import FORKED

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")

aten = torch.ops.aten
# Ops for which the host waits on a GPU: they return values, or results whose size depends on values. Not all of them
# go through the dispatcher, hence the methods.
WAITING_OPS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}
WAITING_METHODS = ("cpu", "numpy", "tolist", "__array__")


class Ranks:
    """``ranks(function, shares)`` returns ``[function(*share) for share in shares]``, each run on its own rank.

    Functions must be at a module's top level. One that raises breaks the group: later tests fail instead of waiting.
    The processes are forked from the server of `torture.processes`, which has imported torch and the commands.
    """

    def __init__(self, size: int, folder: Path) -> None:
        store = f"file://{folder / 'store'}"
        self.processes = [
            ProcessPoolExecutor(1, FORKED, initializer=_join, initargs=(store, rank, size)) for rank in range(size)
        ]

    def __call__(self, function: Callable[..., Any], shares: Sequence[tuple[Any, ...]]) -> list[Any]:
        tasks = [pickle.dumps((function, share)) for share in shares]  # the pool would share tensors
        futures = [process.submit(_run, task) for process, task in zip(self.processes, tasks, strict=True)]
        return [future.result() for future in futures]

    def close(self) -> None:
        for process in self.processes:
            process.shutdown()


def _join(store: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))


def _run(task: bytes) -> Any:
    function, share = pickle.loads(task)
    return function(*share)


@contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """Record the names of the collectives that this rank calls."""
    names: list[str] = []

    def counted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return collective(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: counted(name, getattr(dist, name)) for name in COLLECTIVES}):
        yield names


class HostWaitError(AssertionError):
    pass


class NoHostWait(TorchDispatchMode):
    """Raises where the host would wait for the device if the tensors were on a GPU, also in the backward pass."""

    def __enter__(self) -> Any:
        self._patch = mock.patch.multiple(torch.Tensor, **{name: _refuse(name) for name in WAITING_METHODS})
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._patch.stop()
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        waits = func in WAITING_OPS
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if func is aten.repeat_interleave.Tensor:
            waits = kwargs.get("output_size") is None
        if waits:
            raise HostWaitError(func)
        return func(*args, **kwargs)


def _refuse(name: str) -> Callable[..., Any]:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise HostWaitError(f"Tensor.{name}")

    return refused
