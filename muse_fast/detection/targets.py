"""Targets of the proposals from the annotated nuclei, found in a thread while the device goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from muse_fast.detection.assignment import match
from muse_fast.detection.detector import Proposals
from muse_fast.detection.losses import UNKNOWN
from muse_fast.detection.samples import ANNOTATED, LfovBatch


class Targets(NamedTuple):
    """Targets of the proposals of a batch from the annotated nuclei, image after image."""

    type: Tensor  # [I * P] int64; UNKNOWN outside annotated regions and at nuclei of unknown class
    matched: Tensor  # [M] int64, rows of the proposals matched with a nucleus
    nuclei: Tensor  # [M, 2], positions of these nuclei


class Matcher:
    """Finds the targets of one batch at a time, in a thread that waits for the device instead of the caller.

    Args:
        distance_weight: cost of one pixel in the matching, relative to probabilities.
    """

    def __init__(self, distance_weight: float) -> None:
        self._distance_weight, self._thread = distance_weight, ThreadPoolExecutor(1, "matching")

    def begin(self, proposals: Proposals, places: Tensor, batch: LfovBatch) -> Future[Targets]:
        """Begin to `assign` the nuclei of a batch, with one copy from the device for all images.

        Args:
            places: ``[I, P]`` on the host, see `proposal_places`.
        """
        probabilities = proposals.logits.detach().softmax(dim=-1)
        predicted = torch.cat([proposals.points.detach(), probabilities], dim=-1)
        arrived = torch.cuda.Event() if predicted.is_cuda else None
        on_host = predicted.to("cpu", non_blocking=True)  # in pinned memory
        if arrived is not None:
            arrived.record()
        return self._thread.submit(self._assign, on_host, arrived, places, batch)

    def _assign(self, predicted: Tensor, arrived: torch.cuda.Event | None, places: Tensor, batch: LfovBatch) -> Targets:
        if arrived is not None:
            arrived.synchronize()
        return assign(predicted[..., :2], predicted[..., 2:], places, batch, self._distance_weight)


def proposal_places(places: Tensor, stride: int) -> Tensor:
    """Sample ``[I, R, R]`` at the proposals: ``[I, P]``, in the order of `detection.detector.grid`."""
    return places[:, stride // 2 :: stride, stride // 2 :: stride].flatten(1)


def assign(points: Tensor, probabilities: Tensor, places: Tensor, batch: LfovBatch, distance_weight: float) -> Targets:
    """Match the annotated nuclei of each image with proposals in its annotated region; all tensors are on the host.

    Unmatched proposals in that region have background as target.

    Args:
        points: ``[I, P, 2]``, predicted.
        probabilities: ``[I, P, C + 1]``, background last.
        places: ``[I, P]`` of the proposals.
        batch: has the nuclei.
        distance_weight: cost of one pixel, relative to probabilities.
    """
    annotated, size = (places == ANNOTATED).numpy(), places.shape[1]
    target = np.where(annotated, probabilities.shape[-1] - 1, UNKNOWN).astype(np.int64)
    bounds = np.cumsum(batch.counts.numpy())[:-1]
    all_xy, all_labels = (np.split(one.numpy(), bounds) for one in (batch.xy, batch.label))
    all_points, all_probabilities = points.numpy(), probabilities.numpy()
    matched, nuclei = [], []
    for i, (xy, label) in enumerate(zip(all_xy, all_labels, strict=True)):
        rows = np.flatnonzero(annotated[i])
        proposal, nucleus = match(
            all_points[i, rows], all_probabilities[i, rows], xy, label, distance_weight=distance_weight
        )
        target[i, rows[proposal]] = label[nucleus]
        matched.append(i * size + rows[proposal])
        nuclei.append(xy[nucleus])
    return Targets(
        torch.from_numpy(target.ravel()),
        torch.from_numpy(np.concatenate(matched)),
        torch.from_numpy(np.concatenate(nuclei)).to(points.dtype),
    )
