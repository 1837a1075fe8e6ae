"""CUDA graphs without CUDA: recordings that run their work again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from muse_fast.training import graphs


class Repeater:
    """A `muse_fast.training.graphs.Recorder` for any device: results are overwritten by those of the same work, run
    again.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.recorded = 0

    def warm_up(self, work: Callable[[], Any]) -> None:
        work()

    def record(self, work: graphs.Work) -> tuple[list[Tensor], Callable[[], None]]:
        results = [tensor.clone() for tensor in work()]
        self.recorded += 1

        def replay() -> None:
            for result, tensor in zip(results, work(), strict=True):
                result.copy_(tensor)

        return results, replay


@contextmanager
def repeated_graphs() -> Iterator[None]:
    """Let ``train.cuda_graph`` work on the CPU."""
    with mock.patch.object(graphs, "CudaRecorder", Repeater), mock.patch.object(graphs, "why_not", return_value=None):
        yield
