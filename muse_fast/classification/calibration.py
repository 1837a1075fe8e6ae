"""BatchNorm statistics of an untrained network, from the tiles on which it is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from muse_fast.classification.features import features_of, stack_tiles
from muse_fast.classification.tiles import Tile
from muse_fast.models.calibration import set_batch_norm_statistics
from muse_fast.runtime.progress_bar import ShowProgress


def calibrate_batch_norm(
    backbone: Any,
    tiles: Sequence[Tile],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    bf16: bool = False,
    seed: int = 0,
    progress: ShowProgress | None = None,
) -> int:
    """Set the running statistics of every BatchNorm layer to those of ``tiles``; the weights do not change.

    The tiles pass once, in an order that ``seed`` draws, so that a batch has tiles of several patients.

    Args:
        backbone: on ``device``, with `muse_fast.classification.features.NucleusFeatures`; left in evaluation mode.
        tiles: of one size, at least one.
        batch_size: most tiles in a batch; below 3, it is 3. Batches differ by at most one tile, so none has a single
            one, whose coarsest map may have only one value per channel.

    Returns:
        Number of layers that were calibrated; 0 if the network has none, and nothing ran.
    """
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(seed))
    chosen = order.tensor_split(math.ceil(len(tiles) / max(batch_size, 3)))
    batches = [[tiles[i] for i in numbers.tolist()] for numbers in chosen]
    done = 0

    def forward(batch: Sequence[Tile]) -> None:
        nonlocal done
        features_of(backbone, stack_tiles(batch, device), bf16)
        done += len(batch)
        if progress is not None:
            progress(done, len(tiles), "tiles to calibrate")

    return set_batch_norm_statistics(backbone, batches, forward)
