"""Start and watch the loader's worker processes, and end them with the run."""

from __future__ import annotations

import ctypes
import math
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from muse_fast.errors import UserError
from muse_fast.runtime import distributed

STALLED_AFTER = 300  # seconds without a batch before a worker counts as stalled
SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps the batches that workers hand over
_AHEAD = 2  # batches that a worker prepares before they are asked for
_POLL = 1.0  # seconds after which torch checks that its workers are alive
_PR_SET_PDEATHSIG = 1  # Linux: the signal that a process receives when its parent dies

_Batch = TypeVar("_Batch")
_Samples = Sampler[list[tuple[int, int]]]  # lists of (epoch, number of the item)


def load(
    dataset: Dataset[_Batch],
    sampler: _Samples,
    workers: int,
    pin_memory: bool,
    timeout: int,
    named: Callable[[Sequence[int]], str],
    batch_bytes: int,
) -> Generator[_Batch]:
    """Yield the items of ``dataset`` in the sampler's order.

    Args:
        batch_bytes: size of an item, nearly.

    Raises:
        UserError: the workers' batches do not fit into shared memory; or a worker died or produced nothing for
            ``timeout`` seconds; names it and what it was reading.
    """
    if workers:
        check_shared_memory(workers, batch_bytes)
    batches: Any = _iterate(_loader(dataset, sampler, workers, pin_memory))
    pool = _Workers(getattr(batches, "_workers", []), timeout, batch_bytes)
    for number in count():
        with pool.killed_when_stalled():
            while True:
                try:
                    batch = next(batches)
                    break
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:  # torch raises these for any worker failure
                    if pool.any_died():
                        raise pool.failure(sampler, number, named) from error
                    if "timed out" not in str(error):
                        raise
        yield batch


def check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Check that shared memory has room for all batches that workers prepare, those of this machine's other ranks too.

    Without room, torch's workers lose batches or die by SIGBUS. Containers often have only 64 MiB.

    Raises:
        UserError: it is too small; says how much is needed.
    """
    if not SHARED_MEMORY.is_dir():
        return
    room, own = shutil.disk_usage(SHARED_MEMORY), _bytes_ahead(workers, batch_bytes)
    needed = own * distributed.local_world_size()
    if own > room.free or needed > room.total:  # other ranks may have filled their share of what is not free
        raise UserError(
            f"data.workers={workers}: the batches that loader processes prepare, {batch_bytes / 2**20:,.1f} MiB each, "
            f"need {math.ceil(needed / 2**20):,} MiB in {SHARED_MEMORY}, which has {room.free // 2**20:,} of "
            f"{room.total // 2**20:,} MiB free; {_more_shared_memory(needed)}"
        )


def _bytes_ahead(workers: int, batch_bytes: int) -> int:
    """Bytes of the batches that a rank's workers prepare, and of the one in use."""
    return (workers * _AHEAD + 1) * batch_bytes


def _more_shared_memory(needed: int) -> str:
    return (
        f"enlarge it (docker run --shm-size={math.ceil(needed / 2**30)}g, or --ipc=host), lower data.workers, or set "
        "data.workers=0 to read in the process itself"
    )


def _iterate(loader: DataLoader[_Batch]) -> Iterator[_Batch]:
    """Start the loader without torch's SIGCHLD handler, which raises wherever the run is when a worker dies."""
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return iterator


class _Workers:
    """The loader's worker processes, which are killed when they produce nothing for too long.

    torch's own timeout does not cover every wait: even a finished batch is fetched from the worker that made it, and a
    stopped worker never hands it over. A program with a stopped worker would not exit either.
    """

    def __init__(self, processes: Sequence[BaseProcess], timeout: int, batch_bytes: int) -> None:
        self._processes, self._timeout, self._batch_bytes = processes, timeout, batch_bytes
        self._states: list[str] = []  # of the processes, when the time was up
        self._no_room = False  # for a batch in shared memory, when the time was up

    @contextmanager
    def killed_when_stalled(self) -> Iterator[None]:
        """Kill the workers if the body, which waits for a batch, takes longer than the timeout."""
        timer = threading.Timer(self._timeout, self._time_out)
        timer.daemon = True
        if self._processes:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _time_out(self) -> None:
        self._states = [_state(process.pid) for process in self._processes]
        self._no_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < self._batch_bytes
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def any_died(self) -> bool:
        """Whether a worker has died; waits a moment, as its connection breaks before the process is gone."""
        return bool(self._processes) and bool(wait([process.sentinel for process in self._processes], 0.2))

    def failure(self, sampler: _Samples, number: int, named: Callable[[Sequence[int]], str]) -> UserError:
        """Kill the remaining workers and return why batch ``number`` did not arrive."""
        if self._states:
            culprits = [worker for worker, state in enumerate(self._states) if state in "TD"]
        else:
            culprits = [worker for worker, process in enumerate(self._processes) if not process.is_alive()]
        self._kill()
        # Workers receive batches in turn.
        ahead = range(number, number + len(self._processes))
        batch = next((n for n in ahead if n % len(self._processes) in culprits), number)
        worker = batch % len(self._processes)
        items = [item for _, item in next(islice(sampler, batch, None), [])]
        who = f"loader process {worker} of {len(self._processes)} (pid {self._processes[worker].pid})"
        at = f"at or before {named(items)}"
        again = "the newest checkpoint is intact: start again to continue"
        needed = _bytes_ahead(len(self._processes), self._batch_bytes) * distributed.local_world_size()
        no_room = f"{SHARED_MEMORY} was full: {_more_shared_memory(needed)}"
        if self._states:
            state = {"T": " (stopped)", "D": " (waiting for a disk)"}.get(self._states[worker], "")
            advice = no_room if self._no_room else "if it is only slow, raise data.timeout"
            return UserError(f"{who} produced nothing for {self._timeout} s{state}, {at}; {advice}; {again}")
        code = self._processes[worker].exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        advice = no_room if code == -signal.SIGBUS else "if memory ran out, lower data.workers"
        return UserError(f"{who} {how}, {at}; {advice}; {again}")


def _state(pid: int | None) -> str:
    """Return the state of a process as Linux's letter: T stopped, D waiting for a disk; ``?`` if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return "?"


def _loader(dataset: Dataset[_Batch], sampler: _Samples, workers: int, pin_memory: bool) -> DataLoader[_Batch]:
    return DataLoader(
        dataset,
        batch_size=None,  # the sampler yields whole batches
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        pin_memory=pin_memory,
        timeout=_POLL if workers else 0,
        # Its own generator: otherwise each new iterator draws a seed from the global stream, and drop path in a resumed
        # run would differ from an uninterrupted one.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_die_with_parent,
    )


def _die_with_parent(worker: int) -> None:
    """Ignore the signals that torchrun and Ctrl-C also send to workers: the current step still needs them.

    They end when their parent closes them or dies. torch would let them notice a dead parent only after 5 s, and until
    then they keep the connections of a killed rank open, for which the other ranks wait.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
