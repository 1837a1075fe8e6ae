"""A pool of processes shared by several threads, each of which gets its results in order."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Pool:
    """``workers`` processes; with 0 or 1, calls run in the calling thread.

    At most two results per process are pending at a time, regardless of the number of threads.
    """

    def __init__(self, workers: int) -> None:
        # A fork would copy the locks of running threads.
        self._executor = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) if workers > 1 else None
        self._room = threading.Semaphore(2 * workers)
        self._stopped = False

    def call(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call ``function`` in a process and return its result.

        Raises:
            BrokenProcessPool: a process has died, in this call or another.
        """
        return self._executor.submit(function, *arguments).result() if self._executor else function(*arguments)

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """Yield the results in the order of the items. Raises the same errors as ``call``."""
        if self._executor is None:
            for item in items:
                if self._stopped:
                    raise CancelledError
                yield function(item)
            return
        pending: deque[Future[_Result]] = deque()
        try:
            for item in items:
                # Without room, a caller with pending results takes one of them instead of waiting: no deadlock.
                while not self._room.acquire(blocking=not pending):
                    yield self._next(pending)
                try:
                    pending.append(self._executor.submit(function, item))
                except BaseException:
                    self._room.release()
                    raise
            while pending:
                yield self._next(pending)
        finally:
            for future in pending:
                future.cancel()
                self._room.release()

    def _next(self, pending: deque[Future[_Result]]) -> _Result:
        self._room.release()
        return pending.popleft().result()

    def stop(self) -> None:
        """Cancel calls that have not started; their callers get an error."""
        self._stopped = True
        if self._executor:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Set up a new process: leave Ctrl-C and Slurm's warning to the parent, and die with it, even by kill -9."""
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
