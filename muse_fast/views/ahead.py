"""Batches that are made on a GPU during the step before the one that uses them, on a stream of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def one_ahead(
    items: Iterable[_Item], make: Callable[[_Item], _Made], device: torch.device, *, thread: bool = False
) -> Generator[_Made]:
    """Yield ``make(item)`` of each item, where the device makes one while it still works on the step before.

    Args:
        make: gives the device work, on the stream that is then the current one; its result is a tensor, or a dataclass
            or a tuple of these.
        thread: whether it takes the host so long that it is called in a thread. Its error is raised in its turn.
    """
    stream = torch.cuda.Stream(device)

    def begin(item: _Item) -> tuple[_Made, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return make(item), stream.record_event()

    ahead: deque[Future[tuple[_Made, torch.cuda.Event]]] = deque()
    with ThreadPoolExecutor(1, "one ahead") if thread else nullcontext() as pool:
        for item in items:
            ahead.append(_done(begin(item)) if pool is None else pool.submit(begin, item))
            if len(ahead) > 1:
                yield _hand_over(*ahead.popleft().result(), device)
        while ahead:
            yield _hand_over(*ahead.popleft().result(), device)


def _done(result: _Item) -> Future[_Item]:
    future: Future[_Item] = Future()
    future.set_result(result)
    return future


def _hand_over(made: _Made, done: torch.cuda.Event, device: torch.device) -> _Made:
    """Pass tensors to the current stream, which waits for them and keeps their memory until it has read them."""
    current = torch.cuda.current_stream(device)
    current.wait_event(done)
    for tensor in _tensors(made):
        if tensor.is_cuda:
            tensor.record_stream(current)
    return made


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, tuple):
        for each in value:
            yield from _tensors(each)
