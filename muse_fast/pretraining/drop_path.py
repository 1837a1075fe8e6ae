"""Stochastic depth (Huang et al., 2016) that does not depend on how a batch is spread.

Which residual branches of which images are dropped is drawn on the host for the whole batch of a step, from the seed
and the step alone. A rank, or one of several micro-batches, takes the part of its ROIs. So a run is the same on one
rank and on many, and a checkpoint needs no random state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_STREAM = 0xD409  # keeps these draws apart from others made from the seed


def draw_scales(rates: Sequence[float], seed: int, step: int, num_views: int, num_rois: int) -> Tensor:
    """Factors of every residual branch of every view of the step's batch: 0 with its rate, else 1 / (1 - rate).

    Args:
        rates: of the branches, each from 0 to below 1.
        num_rois: in the batch of all ranks.

    Returns:
        ``[branches, num_views, num_rois]`` float32.
    """
    rate = np.asarray(rates)[:, None, None]
    rng = np.random.default_rng([seed, _STREAM, step])
    kept = rng.random((len(rates), num_views, num_rois), dtype=np.float32) >= rate
    return torch.from_numpy((kept / (1 - rate)).astype(np.float32))
