"""Explain that a run is out of memory: where it was, how large its batch is, and which settings to lower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from muse_fast.errors import UserError
from muse_fast.runtime.device import peak_memory

_CPU_MESSAGE = "can't allocate memory"  # of torch's CPU allocator, whose error does not have its own class


class Situation(NamedTuple):
    """The state of a run."""

    step: int  # the current one, counted from 1
    held: str  # a sentence that describes its batch
    remedies: list[str]  # settings that lower the memory, best first


@contextmanager
def explained_out_of_memory(device: torch.device, situation: Callable[[], Situation]) -> Iterator[None]:
    """Turn an allocator's error into a message that helps.

    Raises:
        UserError: out of memory; gives step, shapes of the batch, peak memory and three settings to lower.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_MESSAGE in str(error)):
            raise
        reason = next(iter(str(error).splitlines()), "") or "no memory left"
        now = situation()
        raise UserError(
            f"out of memory at step {now.step} on {device} ({reason}). {now.held}; its peak was "
            f"{peak_memory(device) / 2**20:.0f} MiB. Set one of: {', '.join(now.remedies[:3])}; "
            "the newest checkpoint is intact"
        ) from error
