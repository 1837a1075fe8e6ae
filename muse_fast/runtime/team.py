"""Independent items of a command shared out over the ranks that torchrun has started, with the results of one process.

Item ``n`` is done by rank ``n % ranks``, and its result goes to rank 0 through the job's store. There is no process
group: networks of different ranks do not exchange anything (BatchNorm would), and a rank may take as long as it needs.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from muse_fast.errors import UserError
from muse_fast.runtime import distributed

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_PART = 4 << 20  # bytes; the store refuses values of more than 8 MiB
_FAILED = "failed"
_SECONDS_BETWEEN_LOOKS = 0.05
# Anyone who reaches the store's port could write to it, so reading a result must not run code: besides what torch
# accepts, these types of NumPy, which no subclass or function can replace.
_ACCEPTED = [
    np.ndarray,
    np.dtype,
    np.empty(0).__reduce__()[0],  # what builds arrays and numbers, under a name that depends on NumPy's version
    np.float64().__reduce__()[0],
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
]


class Team:
    """The ranks of a job.

    Args:
        store: of the job; a single rank does not use it.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size
        self._calls = count()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def map(
        self,
        function: Callable[[_Item], _Result],
        items: Iterable[_Item],
        done: Callable[[int], None] | None = None,
    ) -> list[_Result]:
        """Call ``function`` with the items of this rank; return the results of all items on rank 0, none on the others.

        All ranks must call this, with the same items; each goes through all of them.

        Args:
            function: its results are tensors, arrays, numbers, strings, None, and tuples, lists and dicts of these.
            done: called after each item of this rank with its number, counted from 1.

        Raises:
            UserError: another rank has failed; contains its message.
        """
        call, found, total = next(self._calls), dict[int, _Result](), 0
        for total, item in enumerate(items, 1):
            number = total - 1
            if number % self.size != self.rank:
                continue
            result = function(item)
            if self.is_main:
                found[number] = result
            else:
                self._give(f"{call}/{number}", result)
            if done is not None:
                done(total)
        if not self.is_main:
            return []
        return [found[number] if number in found else self._take(f"{call}/{number}") for number in range(total)]

    def tell_failure(self, error: BaseException) -> None:
        """Let the other ranks end with the message of this rank's error."""
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with suppress(dist.DistError):  # rank 0, which may have the store, may be gone
            if not self._store.check([_FAILED]):
                self._store.set(_FAILED, f"rank {self.rank}: {said}")

    def _give(self, key: str, result: Any) -> None:
        file = io.BytesIO()
        torch.save(result, file)
        data = file.getvalue()
        starts = range(0, len(data), _PART)
        try:
            self._raise_failure_of_another()
            for part, start in enumerate(starts):
                self._store.set(f"{key}/{part}", data[start : start + _PART])
            self._store.set(key, str(len(starts)))
        except dist.DistError as error:
            said = str(error).splitlines()[0]
            raise UserError(f"rank {self.rank}: rank 0 has ended ({said}); see its output") from None

    def _take(self, key: str) -> Any:
        while not self._store.check([key]):
            self._raise_failure_of_another()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        parts = [f"{key}/{part}" for part in range(int(self._store.get(key)))]
        data = b"".join(self._store.get(part) for part in parts)
        with torch.serialization.safe_globals(_ACCEPTED):
            result = torch.load(io.BytesIO(data), weights_only=True)
        for used in (key, *parts):
            self._store.delete_key(used)
        return result

    def _raise_failure_of_another(self) -> None:
        if self._store.check([_FAILED]):
            raise UserError(self._store.get(_FAILED).decode())


ALONE = Team(None, 0, 1)
"""This process."""


@contextmanager
def joined() -> Iterator[Team]:
    """Join the ranks of a launched job, all of which must call this; without a launcher, it is this process alone.

    Only rank 0 prints. If a rank fails, the others fail with its message as soon as they need or finish an item.
    """
    if not distributed.launched():
        yield ALONE
        return
    team = Team(*distributed.join_store())
    with ExitStack() as stack:
        if not team.is_main:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield team
        except BaseException as error:
            team.tell_failure(error)
            raise
