"""Run one job after another, or several at a time in processes of their own, within a time limit."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class Here(Executor):
    """Runs a job when it is submitted, in this process."""

    def submit(self, run: Callable[..., _Result], /, *arguments: Any, **more: Any) -> Future[_Result]:
        done: Future[_Result] = Future()
        done.set_result(run(*arguments, **more))
        return done


def processes(jobs: int) -> Executor:
    """Return what runs ``jobs`` jobs at a time, each with its share of this machine's cores."""
    if jobs == 1:
        return Here()
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    spawn = multiprocessing.get_context("spawn")  # CUDA and torch's threads do not survive a fork
    return ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(threads,))


def in_turn(
    pool: Executor, jobs: int, cases: Sequence[_Job], seconds: float, run: Callable[[_Job], _Result]
) -> Iterator[tuple[_Job, _Result | None]]:
    """Run the cases in order, ``jobs`` at a time, and yield each when it is done; None for one that was skipped.

    A case is skipped if it might end later than ``seconds`` from now, supposing that it takes as long as the longest
    one so far.
    """
    began, longest = time.monotonic(), 0.0
    running: dict[Future[_Result], tuple[_Job, float]] = {}
    waiting = list(cases)
    while waiting or running:
        while waiting and len(running) < jobs:
            case, start = waiting.pop(0), time.monotonic()
            if start + longest - began > seconds:
                yield case, None
            else:
                running[pool.submit(run, case)] = case, start
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            case, start = running.pop(future)
            longest = max(longest, time.monotonic() - start)
            yield case, future.result()
