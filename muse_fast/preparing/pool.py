"""Processes that several threads share, each of which wants its results in order."""

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
    """Some processes, or none, and then everything runs where it is called.

    At most two results per process wait at a time, however many threads ask for them.
    """

    def __init__(self, workers: int) -> None:
        # A fork would copy the locks of running threads.
        self._executor = ProcessPoolExecutor(workers, get_context("spawn"), _prepare) if workers > 1 else None
        self._room = threading.Semaphore(2 * workers)
        self._stopped = False

    def call(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """The result of one call.

        Raises:
            BrokenProcessPool: a process has died, of this call or of another.
        """
        return self._executor.submit(function, *arguments).result() if self._executor else function(*arguments)

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """Results in the order of the items. Errors as of ``call``."""
        if self._executor is None:
            for item in items:
                if self._stopped:
                    raise CancelledError
                yield function(item)
            return
        waiting: deque[Future[_Result]] = deque()
        try:
            for item in items:
                # A caller with results waiting takes one of them instead of waiting for room, so none waits for ever.
                while not self._room.acquire(blocking=not waiting):
                    yield self._next(waiting)
                try:
                    waiting.append(self._executor.submit(function, item))
                except BaseException:
                    self._room.release()
                    raise
            while waiting:
                yield self._next(waiting)
        finally:
            for future in waiting:
                future.cancel()
                self._room.release()

    def _next(self, waiting: deque[Future[_Result]]) -> _Result:
        self._room.release()
        return waiting.popleft().result()

    def stop(self) -> None:
        """Drop what has not begun; its callers get an error."""
        self._stopped = True
        if self._executor:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)


def _prepare() -> None:
    """In a new process: leave Ctrl-C and Slurm's warning to the parent, and end when it does, even by kill -9."""
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
