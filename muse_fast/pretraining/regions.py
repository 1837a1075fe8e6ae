"""Whole ROIs as a trained network sees them: windows that cover a ROI, its nuclei with their features, neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from muse_fast.config import ViewsConfig
from muse_fast.images.imagenet import normalise
from muse_fast.models.backbone import Backbone
from muse_fast.roiset.records import Roi
from muse_fast.roiset.roiset import RoiSet
from muse_fast.views.boxes import ViewBox

_MIN_SIDE = 256  # of a window in pixels: smaller ones show the borders of convolutions more than tissue
_PIXELS_AT_ONCE = 8 * 256**2
_REGION_UM = 1500  # most of a slide that a region covers


@dataclass(frozen=True, slots=True)
class NucleusTable:
    """The nuclei of several ROIs, one row each, ROI after ROI."""

    roi: Tensor  # [N] int64, position of the nucleus's ROI
    xy: NDArray[np.float32]  # [N, 2], pixels of that ROI
    features: Tensor  # [N, D] float32, on the CPU

    def rows(self, kept: Tensor) -> NucleusTable:
        """The rows that ``kept`` selects: a mask ``[N]`` or their numbers."""
        return NucleusTable(self.roi[kept], self.xy[kept.numpy()], self.features[kept])


def window_size(roiset: RoiSet, views: ViewsConfig) -> int:
    """Side in pixels of the windows of a set: of several global views, a size that every network accepts which accepts
    these. It is at least ``_MIN_SIDE``, unless the smallest ROI has no room for that at the finest scale of the views.
    """
    room = float((np.minimum(roiset.width, roiset.height) * roiset.mpp).min()) / views.global_mpp_min
    return views.global_size * max(1, min(math.ceil(_MIN_SIDE / views.global_size), int(room / views.global_size)))


def windows(roi: Roi, size: int, mpp: float) -> list[ViewBox]:
    """Windows of ``size`` px at ``mpp`` um/px, or finer in a small ROI, that cover it evenly, row by row."""
    side = _side(roi, size, mpp)
    return [ViewBox(x, y, side, size) for y in _starts(roi.height, side) for x in _starts(roi.width, side)]


def middle_window(roi: Roi, size: int, mpp: float) -> ViewBox:
    """The window in the middle of ``roi``."""
    side = _side(roi, size, mpp)
    return ViewBox((roi.width - side) // 2, (roi.height - side) // 2, side, size)


def _side(roi: Roi, size: int, mpp: float) -> int:
    return max(1, min(round(size * mpp / roi.mpp), roi.width, roi.height))


def _starts(length: int, side: int) -> list[int]:
    return np.linspace(0, length - side, math.ceil(length / side)).round().astype(int).tolist()


@torch.inference_mode()
def nucleus_tables(
    networks: Mapping[str, Backbone], rois: Sequence[Roi], boxes: Sequence[Sequence[ViewBox]]
) -> dict[str, NucleusTable]:
    """Compute the features of the nuclei in ``boxes``, windows of each ROI, by each network; of several windows, the
    one counts in which a nucleus is closest to the middle.

    Args:
        networks: in evaluation mode, by name. All see the same pixels, which are decoded once.
    """
    parts = [_nuclei_of(networks, roi, of_roi) for roi, of_roi in zip(rois, boxes, strict=True)]
    xy = np.concatenate(
        [np.empty((0, 2), np.float32), *(roi.xy[index] for roi, (index, _) in zip(rois, parts, strict=True))]
    )
    roi_of = torch.arange(len(rois)).repeat_interleave(torch.tensor([len(i) for i, _ in parts], dtype=torch.long))
    return {
        name: NucleusTable(roi_of, xy, torch.cat([torch.empty(0, one.dense_dim), *(rows[name] for _, rows in parts)]))
        for name, one in networks.items()
    }


def _nuclei_of(
    networks: Mapping[str, Backbone], roi: Roi, boxes: Sequence[ViewBox]
) -> tuple[NDArray[np.int32], dict[str, Tensor]]:
    """Numbers ``[m]`` of the nuclei of ``roi`` in ``boxes``, and their features ``[m, D]`` by each network."""
    centres = np.array([(box.x + box.side / 2, box.y + box.side / 2) for box in boxes])
    nearest = np.abs(roi.xy[:, None] - centres).max(axis=2).argmin(axis=1)
    seen = [box.nuclei(roi.xy) for box in boxes]
    seen = [(xy[nearest[index] == box], index[nearest[index] == box]) for box, (xy, index) in enumerate(seen)]
    pixels = torch.from_numpy(roi.decode()).permute(2, 0, 1)
    features = {name: [torch.empty(0, one.dense_dim)] for name, one in networks.items()}
    at_once = max(1, _PIXELS_AT_ONCE // boxes[0].size ** 2)
    for first in range(0, len(boxes), at_once):
        of_boxes = seen[first : first + at_once]
        counts = torch.tensor([len(index) for _, index in of_boxes])
        if counts.any():
            images = normalise(torch.stack([box.render(pixels) for box in boxes[first : first + at_once]]))
            xy = torch.from_numpy(np.concatenate([xy for xy, _ in of_boxes]))
            image_index = torch.arange(len(counts)).repeat_interleave(counts)
            for name, one in networks.items():
                parameter = next(one.parameters())
                rows = one.nucleus_features(images.to(parameter.device, parameter.dtype), xy, image_index)
                features[name].append(rows.float().cpu())
    numbers = np.concatenate([index for _, index in seen])
    return numbers, {name: torch.cat(rows) for name, rows in features.items()}


def neighbouring_rois(roiset: RoiSet, roi_ids: NDArray[np.int64], side_um: float = _REGION_UM) -> list[int]:
    """Choose the ROIs of a region of at most ``side_um`` in the middle of a slide, none of which overlap.

    It is the slide that most of ``roi_ids`` are from.
    """
    slide = roiset.slide[roi_ids]
    found = roi_ids[slide == np.bincount(slide).argmax()]
    sides = np.stack([roiset.width[found], roiset.height[found]], axis=1).astype(np.int64)
    origins, mpp = roiset.origin[found], roiset.mpp[found[0]]
    distances = np.abs(origins - np.median(origins, axis=0))
    centre = origins[distances.sum(axis=1).argmin()]
    away = np.abs(origins - centre).max(axis=1)
    chosen: list[int] = []
    for place in np.argsort(away, kind="stable").tolist():
        apart = (np.abs(origins[chosen] - origins[place]) >= np.maximum(sides[chosen], sides[place])).any(axis=1)
        if ((away[place] + sides[place].max() / 2) * mpp <= side_um / 2 and apart.all()) or not chosen:
            chosen.append(place)
    return sorted(found[chosen].tolist())


def nearest_elsewhere(table: NucleusTable, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nuclei of other ROIs whose features are nearest: cosines and rows, ``[Q, count]`` or fewer, nearest first.

    Args:
        queries: ``[Q]`` rows of the table.
    """
    rows = F.normalize(table.features, dim=1)
    cosines = rows[queries] @ rows.T
    cosines[table.roi[queries][:, None] == table.roi] = -torch.inf
    possible = len(rows) - int(torch.bincount(table.roi).max()) if len(rows) else 0
    values, nearest = cosines.topk(min(count, possible), dim=1)
    return values, nearest


def share_elsewhere(table: NucleusTable, count: int = 5, most: int = 2048) -> tuple[float, float] | None:
    """How many of the nearest nuclei are in other ROIs, on average, and how many would be if features said nothing.

    Features of an untrained network tell where a nucleus is (stain, focus, tissue around it) rather than what it is:
    most of its nearest neighbours are in its own ROI.

    Args:
        most: nuclei that are compared, spread evenly.

    Returns:
        ``(share, chance)``, or None if there are no ``count`` neighbours.
    """
    table = table.rows(torch.linspace(0, len(table.roi) - 1, min(most, len(table.roi))).round().long())
    if len(table.roi) <= count:
        return None
    rows = F.normalize(table.features, dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-torch.inf)
    nearest = cosines.topk(count, dim=1).indices
    other = table.roi[:, None] != table.roi
    return float(other.gather(1, nearest).double().mean()), int(other.sum()) / (len(rows) * (len(rows) - 1))
