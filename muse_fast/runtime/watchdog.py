"""Find the rank that keeps the others waiting.

A rank that hangs leaves the others in a collective. torch ends that after half an hour and names neither rank nor step.
So a thread of each rank regularly writes a sign of life to the job's store: its step and the number of collectives it
has begun. A rank that makes no progress for some time compares all signs: a rank that no longer writes is stopped or
gone, and a rank that is behind in collectives is the one that the others wait for. The job then ends, because no rank
can leave a collective that another does not enter.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from muse_fast.runtime import exit_codes

_BEAT = 1.0  # seconds between signs of life


class Place(NamedTuple):
    """How far a rank has come."""

    step: int
    collectives: int


class Watchdog:
    """Ends this process with code 4 if it makes no progress for a time, after reporting which rank it waits for.

    Args:
        store: of the job; the watchdog opens its own connection.
        timeout: seconds without progress.
        place: returns how far this rank has come.
        tell: called with the message and the step before the process ends.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout: float,
        place: Callable[[], Place],
        tell: Callable[[str, int], None],
    ) -> None:
        self._beat = min(_BEAT, timeout / 10)
        self._store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=max(5.0, 3 * self._beat)))
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._place, self._tell = place, tell
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        place, since = self._place(), time.monotonic()
        while not self._ended.wait(self._beat):
            with suppress(dist.DistError):  # the store's process is gone or stopped, which `_end` finds out
                self._give_sign()
            if self._place() != place:
                place, since = self._place(), time.monotonic()
            elif time.monotonic() - since > self._timeout:
                self._end(place)

    def _give_sign(self) -> None:
        self._beats += 1
        sign = {"beats": self._beats, **self._place()._asdict(), "host": socket.gethostname(), "pid": os.getpid()}
        self._store.set(str(self._rank), json.dumps(sign))

    def _signs(self) -> dict[int, dict[str, Any]]:
        """Return the last sign of each rank that has given one."""
        ranks = [rank for rank in range(self._world_size) if self._store.check([str(rank)])]
        return {rank: json.loads(self._store.get(str(rank))) for rank in ranks}

    def _end(self, place: Place) -> None:
        try:
            before = self._signs()
            for _ in range(3):
                time.sleep(self._beat)
                self._give_sign()
            now = self._signs()
            culprits, reason = waited_for(before, now, self._world_size)
        except dist.DistError as error:
            now, culprits = {}, []
            reason = f"the job's store does not answer ({str(error).splitlines()[0]})"
        if self._ended.is_set() or self._place() != place:
            return
        message = (
            f"step {place.step}: rank {self._rank} has made no progress for {self._timeout:g} s; {reason}. Raise "
            "train.timeout if it is only slow; the newest checkpoint is intact: start again to continue"
        )
        print(f"error: {message}", file=sys.stderr, flush=True)
        if self._rank in culprits:
            faulthandler.dump_traceback(sys.stderr)
        self._tell(message, place.step)
        os._exit(exit_codes.STALLED)  # the main thread, in a collective or worse, would not respond


def waited_for(
    before: dict[int, dict[str, Any]], now: dict[int, dict[str, Any]], world_size: int
) -> tuple[list[int], str]:
    """Return the ranks that keep the others waiting, and the reason, from the signs of all ranks at two times."""
    silent = [rank for rank in range(world_size) if rank not in now or now[rank] == before.get(rank)]
    if silent:
        return silent, f"{_named(silent, now)} no longer answers: stopped, or its machine is gone"
    least, most = (pick(sign["collectives"] for sign in now.values()) for pick in (min, max))
    behind = [rank for rank, sign in now.items() if sign["collectives"] == least]
    if least == most:
        return list(now), f"all ranks are in the same collective, at {_named(list(now), now)}: look at the network"
    return behind, f"{_named(behind, now)} has begun {least} collectives, others {most}, and keeps them waiting"


def _named(ranks: list[int], signs: dict[int, dict[str, Any]]) -> str:
    names = [
        f"rank {rank} (step {signs[rank]['step']}, pid {signs[rank]['pid']} on {signs[rank]['host']})"
        if rank in signs
        else f"rank {rank} (which never gave a sign)"
        for rank in ranks[:8]
    ]
    return " and ".join([*names, *([f"{len(ranks) - 8} more"] if len(ranks) > 8 else [])])
