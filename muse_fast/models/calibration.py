"""BatchNorm statistics of an untrained network.

Pretraining adapts two things to its images: the weights, and the statistics by which BatchNorm normalises. Only the
first is learning, so an untrained network should be compared after it has got the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_Batch = TypeVar("_Batch", bound=Sized)


def batch_norms_of(network: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of ``network`` that have running statistics."""
    return [one for one in network.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]


@torch.no_grad()
def set_batch_norm_statistics(network: nn.Module, batches: Iterable[_Batch], forward: Callable[[_Batch], Any]) -> int:
    """Set the running statistics of every BatchNorm layer to those of ``batches``; the weights do not change.

    The result is the mean of the batches' statistics, weighted by their lengths: for batches of one length what torch
    computes with ``momentum=None``. Earlier statistics have no influence. All ranks must call it.

    Args:
        network: left in evaluation mode.
        forward: runs the network on a batch.

    Returns:
        Number of layers that were calibrated; 0 if the network has none, and nothing ran.
    """
    norms = batch_norms_of(network)
    if not norms:
        network.eval()
        return 0
    momenta = [norm.momentum for norm in norms]
    done = 0
    network.train()
    try:
        for norm in norms:
            norm.reset_running_stats()
        for batch in batches:
            done += len(batch)
            for norm in norms:
                norm.momentum = len(batch) / done
            forward(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        network.eval()
    return len(norms)
