"""The loader's processes: started, watched, and ended with the run."""

from __future__ import annotations

import ctypes
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

STALLED_AFTER = 300  # seconds without a batch before a worker is called stalled
_POLL = 1.0  # seconds after which torch is to look whether the workers live
_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent dies

_Batch = TypeVar("_Batch")
_Samples = Sampler[list[tuple[int, int]]]  # lists of (epoch, number of the item)


def load(
    dataset: Dataset[_Batch],
    sampler: _Samples,
    workers: int,
    pin_memory: bool,
    timeout: int,
    named: Callable[[Sequence[int]], str],
) -> Generator[_Batch]:
    """What the loader gives.

    Raises:
        UserError: a process died or gave nothing for ``timeout`` seconds; names it and what it was at.
    """
    batches: Any = _iterate(_loader(dataset, sampler, workers, pin_memory))
    processes = _Processes(getattr(batches, "_workers", []), timeout)
    for number in count():
        with processes.ended_when_stalled():
            while True:
                try:
                    batch = next(batches)
                    break
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:  # all that torch says, of whatever happened
                    if processes.have_died():
                        raise processes.lost(sampler, number, named) from error
                    if "timed out" not in str(error):
                        raise
        yield batch


def _iterate(loader: DataLoader[_Batch]) -> Iterator[_Batch]:
    """Without the signal handler by which torch raises an error wherever the run is when a process dies."""
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return iterator


class _Processes:
    """The loader's processes, which end when they give nothing for too long.

    torch's own limit does not hold for all waits: a batch that has arrived is fetched from the process that made it,
    and one that is stopped does not hand it over. Nor would a program end that leaves a stopped process behind.
    """

    def __init__(self, processes: Sequence[BaseProcess], timeout: int) -> None:
        self._processes, self._timeout = processes, timeout
        self._states: list[str] = []  # at the end of the time

    @contextmanager
    def ended_when_stalled(self) -> Iterator[None]:
        """Around the wait for a batch."""
        timer = threading.Timer(self._timeout, self._end)
        timer.daemon = True
        if self._processes:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self) -> None:
        self._states = [_state(process.pid) for process in self._processes]
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def have_died(self) -> bool:
        """Whether one has; waits a moment, as a connection breaks before its process is gone."""
        return bool(self._processes) and bool(wait([process.sentinel for process in self._processes], 0.2))

    def lost(self, sampler: _Samples, number: int, named: Callable[[Sequence[int]], str]) -> UserError:
        """Why batch ``number`` does not come; ends the others."""
        if self._states:
            culprits = [worker for worker, state in enumerate(self._states) if state in "TD"]
        else:
            culprits = [worker for worker, process in enumerate(self._processes) if not process.is_alive()]
        code = self._processes[culprits[0]].exitcode or 0 if culprits else 0
        self._kill()
        # Batches go to the processes in turn.
        ahead = range(number, number + len(self._processes))
        batch = next((n for n in ahead if n % len(self._processes) in culprits), number)
        worker = batch % len(self._processes)
        items = [item for _, item in next(islice(sampler, batch, None), [])]
        who = f"loader process {worker} of {len(self._processes)} (pid {self._processes[worker].pid})"
        at = f"at or before {named(items)}"
        again = "the newest checkpoint is untouched: start again to go on"
        if self._states:
            state = {"T": ", it was stopped", "D": ", it waited for a disk"}.get(self._states[worker], "")
            return UserError(f"{who} gave nothing for {self._timeout} s{state}, {at}; or raise data.timeout; {again}")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended by itself with code {code}"
        return UserError(f"{who} {how}, {at}; if memory was short, lower data.workers; {again}")


def _state(pid: int | None) -> str:
    """Letter of a process in Linux: T stopped, D in the midst of input or output; nothing where it is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return "?"


def _loader(dataset: Dataset[_Batch], sampler: _Samples, workers: int, pin_memory: bool) -> DataLoader[_Batch]:
    return DataLoader(
        dataset,
        batch_size=None,  # the sampler gives whole batches
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        timeout=_POLL if workers else 0,
        # A generator of its own: otherwise each new iterator draws a seed from the global stream, and a resumed run
        # would drop other paths than an unbroken one.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_live_as_the_run_does,
    )


def _live_as_the_run_does(worker: int) -> None:
    """torchrun and Ctrl-C signal workers too, which the step at hand still needs: they end when told by their process.

    Or with it: torch would let them notice after 5 s. Until then they hold the connections of a rank that was killed,
    and the other ranks wait for it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
