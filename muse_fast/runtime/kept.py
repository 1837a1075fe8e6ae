"""Small tensors that are made once and kept: making one copies from the host, which makes it wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

_KEPT: list[Any] = []


def kept(function: _Function) -> _Function:
    """Keep the results of ``function`` for its last 16 arguments, one of which is a device.

    They are made outside inference mode, because training may use what an evaluation has made.
    """
    cached: Any = lru_cache(maxsize=16)(torch.inference_mode(False)(function))
    _KEPT.append(cached)
    return cached


def forget() -> None:
    """Forget all of them, such as those made while tensors had no data."""
    for function in _KEPT:
        function.cache_clear()
