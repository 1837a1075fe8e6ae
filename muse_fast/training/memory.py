"""What a run says when memory is short: where it was, how large its batch is, and what to lower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from muse_fast.errors import UserError
from muse_fast.runtime.device import peak_memory

_SAID = "can't allocate memory"  # by torch's allocator on the CPU, whose error has no class of its own


class Situation(NamedTuple):
    """Where a run is."""

    step: int  # the one at hand, counted from 1
    held: str  # what its batch consists of, as a sentence
    remedies: list[str]  # settings that would lower the memory, the best first


@contextmanager
def explained_out_of_memory(device: torch.device, situation: Callable[[], Situation]) -> Iterator[None]:
    """Turn an error of an allocator into words.

    Raises:
        UserError: step, shapes of the batch, peak memory and three settings to lower.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or _SAID in str(error)):
            raise
        reason = next(iter(str(error).splitlines()), "") or "no memory left"
        now = situation()
        raise UserError(
            f"out of memory at step {now.step} on {device} ({reason}). {now.held}; its peak was "
            f"{peak_memory(device) / 2**20:.0f} MiB. Set one of: {', '.join(now.remedies[:3])}; "
            "the newest checkpoint is untouched"
        ) from error
