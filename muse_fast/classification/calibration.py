"""BatchNorm statistics of an untrained network.

Pretraining adapts two things to its images: the weights, and the statistics by which BatchNorm normalises. Only the
first is learning, so an untrained network should be compared after it has got the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from muse_fast.classification.features import features_of, stack_tiles
from muse_fast.classification.tiles import Tile
from muse_fast.runtime.progress_bar import ShowProgress


def batch_norms_of(network: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of ``network`` that have running statistics."""
    return [one for one in network.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]


def calibrate_batch_norm(
    backbone: nn.Module,
    tiles: Sequence[Tile],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    bf16: bool = False,
    seed: int = 0,
    progress: ShowProgress | None = None,
) -> int:
    """Set the running statistics of every BatchNorm layer to those of ``tiles``; the weights do not change.

    The tiles pass once, in an order that ``seed`` draws, so that a batch has tiles of several patients. The result is
    the mean of the batches' statistics, weighted by their tiles: what torch computes with ``momentum=None``. Earlier
    statistics have no influence.

    Args:
        backbone: on ``device``, with `muse_fast.classification.features.NucleusFeatures`; left in evaluation mode.
        tiles: of one size, at least one.
        batch_size: most tiles in a batch; below 3, it is 3. Batches differ by at most one tile, so none has a single
            one, whose coarsest map may have only one value per channel.

    Returns:
        Number of layers that were calibrated; 0 if the network has none, and nothing ran.
    """
    norms = batch_norms_of(backbone)
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(seed))
    done = 0
    backbone.train()
    try:
        for norm in norms:
            norm.reset_running_stats()
        for chosen in order.tensor_split(math.ceil(len(tiles) / max(batch_size, 3))):
            done += len(chosen)
            for norm in norms:
                norm.momentum = len(chosen) / done
            features_of(backbone, stack_tiles([tiles[i] for i in chosen.tolist()], device), bf16)  # type: ignore[arg-type]
            if progress is not None:
                progress(done, len(tiles), "tiles to calibrate")
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        backbone.eval()
    return len(norms)
