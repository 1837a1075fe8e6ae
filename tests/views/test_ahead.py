"""Batches made one ahead, with streams that only write down what is asked of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from muse_fast.batch import PackedNuclei, Views
from muse_fast.detection.samples import LfovBatch
from muse_fast.errors import UserError
from muse_fast.views.ahead import _tensors, one_ahead

GPU = torch.device("cuda", 0)


class Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> str:
        return "made"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log, "side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(log, "step"))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    return log


def items(log: list[str], count: int) -> Iterator[int]:
    for item in range(count):
        log.append(f"load {item}")
        yield item


def test_the_next_batch_is_begun_before_this_one_is_used(log: list[str]) -> None:
    def make(item: int) -> torch.Tensor:
        log.append(f"make {item}")
        return torch.tensor(10 * item)

    for batch in one_ahead(items(log, 3), make, GPU):
        log.append(f"use {int(batch)}")
    begun = ["load 0", "make 0", "load 1", "make 1", "step waits", "use 0", "load 2", "make 2", "step waits", "use 10"]
    assert log == [*begun, "step waits", "use 20"]


def test_a_thread_makes_batches_while_one_is_used(log: list[str]) -> None:
    used, begun, threads = threading.Event(), threading.Event(), set()

    def make(item: int) -> int:
        threads.add(threading.current_thread().name)
        if item == 1:
            begun.set()
            assert used.wait(10)  # not over before the first batch has been used
        return item

    batches = one_ahead(items(log, 3), make, GPU, thread=True)
    assert next(batches) == 0
    assert begun.wait(10)
    used.set()
    assert list(batches) == [1, 2]
    assert len(threads) == 1 and threading.current_thread().name not in threads


def test_an_error_comes_after_the_batches_before_it(log: list[str]) -> None:
    def make(item: int) -> int:
        if item == 2:
            raise UserError("damaged")
        return item

    batches = one_ahead(items(log, 4), make, GPU, thread=True)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(UserError, match="damaged"):
        next(batches)


def test_all_tensors_of_a_batch_are_found() -> None:
    one = torch.zeros(1)
    nuclei = PackedNuclei(one + 1, one + 2, one + 3)
    views = Views(one + 4, one + 5, nuclei, 1, one + 6, one + 7, one + 8)
    assert {int(tensor) for tensor in _tensors(views)} == {*range(1, 9)}
    batch: Any = LfovBatch(*(one + number for number in range(8)))
    assert {int(tensor) for tensor in _tensors(batch)} == {*range(8)}
