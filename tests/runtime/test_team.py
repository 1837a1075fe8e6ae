"""Items shared out over ranks, here threads with one store."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import DistStoreError, HashStore

from muse_fast.errors import UserError
from muse_fast.runtime import team as module
from muse_fast.runtime.team import ALONE, Team


def on_ranks(size: int, act: Callable[[Team], Any]) -> list[Any]:
    """Results or errors of ranks that act together; an error reaches the other ranks as in `joined`."""
    store = HashStore()

    def of_rank(rank: int) -> Any:
        one = Team(store, rank, size)
        try:
            return act(one)
        except Exception as error:
            one.tell_failure(error)
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(of_rank, range(size)))


@pytest.mark.parametrize("items", [0, 1, 2, 7])
def test_rank_0_has_the_results_of_all_in_order(items: int) -> None:
    who: list[tuple[int, int]] = []

    def act(team: Team) -> list[list[int]]:
        def square(item: int) -> int:
            who.append((item, team.rank))
            return item**2

        return [team.map(square, range(items)), team.map(str, iter(range(items)))]

    expected = [ALONE.map(lambda item: item**2, range(items)), ALONE.map(str, range(items))]
    assert on_ranks(3, act) == [expected, [[], []], [[], []]]
    assert sorted(who) == [(item, item % 3) for item in range(items)]


def test_results_larger_than_a_value_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART", 1000)
    tensors = [torch.randn(n) for n in (2000, 0, 251, 7000)]
    main, _ = on_ranks(2, lambda team: team.map(lambda n: tensors[n], range(4)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(main, tensors, strict=True))


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int32", "int64", "float16", "float32", "float64"])
def test_what_results_consist_of(dtype: str) -> None:
    array = np.arange(6).astype(dtype).reshape(2, 3)
    rest = {"a": [1, 2.5, None, True, "µm"], 3: (np.float64(0.1), ())}
    result = (torch.arange(3).bfloat16(), array, array[1, 2], rest)
    ours, theirs = on_ranks(2, lambda team: team.map(lambda _: result, range(2)))[0]
    assert torch.equal(theirs[0], ours[0]) and theirs[0].dtype == torch.bfloat16
    assert theirs[1].dtype == array.dtype and np.array_equal(theirs[1], array)
    assert theirs[2] == array[1, 2] and type(theirs[2]) is type(array[1, 2])
    assert theirs[3] == rest


def test_a_result_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    store = HashStore()
    Team(store, 1, 2).map(lambda _: Payload(), range(2))
    with pytest.raises(UnpicklingError, match="mkdir"):
        Team(store, 0, 2).map(str, range(2))
    assert not (tmp_path / "run").exists()


def test_nothing_stays_in_the_store() -> None:
    store = HashStore()
    Team(store, 1, 2).map(str, range(6))
    assert store.num_keys() == 6  # each result and the number of its parts
    assert Team(store, 0, 2).map(str, range(6)) == ["0", "1", "2", "3", "4", "5"]
    assert store.num_keys() == 0


def test_what_is_shown_as_done() -> None:
    seen: dict[int, list[int]] = {0: [], 1: []}
    on_ranks(2, lambda team: team.map(str, range(5), seen[team.rank].append))
    assert seen == {0: [1, 3, 5], 1: [2, 4]}


@pytest.mark.parametrize(
    ("error", "said"), [(UserError("x.png is damaged"), "x.png is damaged"), (KeyError("x"), "KeyError: 'x'")]
)
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_rank_that_fails_ends_the_others_with_its_message(error: Exception, said: str, culprit: int) -> None:
    notified = threading.Event()

    def act(team: Team) -> list[int]:
        def work(item: int) -> int:
            if team.rank == culprit:
                notified.set()
                raise error
            notified.wait(60)
            return item

        while True:  # a rank notices when it gives or needs a result
            team.map(work, range(3))

    ended = on_ranks(3, act)
    assert ended[culprit] is error
    for rank in {0, 1, 2} - {culprit}:
        assert isinstance(ended[rank], UserError) and str(ended[rank]) == f"rank {culprit}: {said}"


def test_the_store_is_gone() -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise DistStoreError("Connection was reset\nC++ stack")

    with pytest.raises(UserError, match=r"rank 1: rank 0 has ended \(Connection was reset\); see its output"):
        Team(Gone(), 1, 2).map(str, range(2))
    Team(Gone(), 1, 2).tell_failure(UserError("late"))
