"""Stochastic depth (Huang et al., 2016) that does not depend on how a batch is split.

The host draws which residual branches of which images to drop for the whole batch of a step, from the seed and the
step only. Each rank and micro-batch uses the part for its ROIs. So a run is the same on any number of ranks, and a
checkpoint needs no random state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_STREAM = 0xD409  # separates these draws from others that use the seed


def draw_scales(rates: Sequence[float], seed: int, step: int, num_views: int, num_rois: int) -> Tensor:
    """Draw the factor of every residual branch and view of the step's batch: 0 with its rate, else 1 / (1 - rate).

    Args:
        rates: drop rates of the branches, in [0, 1).
        num_rois: in the batch over all ranks.

    Returns:
        ``[branches, num_views, num_rois]`` float32.
    """
    rate = np.asarray(rates)[:, None, None]
    rng = np.random.default_rng([seed, _STREAM, step])
    kept = rng.random((len(rates), num_views, num_rois), dtype=np.float32) >= rate
    return torch.from_numpy((kept / (1 - rate)).astype(np.float32))
