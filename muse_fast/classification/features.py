"""Nucleus features of evaluation tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from muse_fast.classification.tiles import Tile
from muse_fast.images.imagenet import normalise
from muse_fast.models.backbone import Backbone
from muse_fast.models.timm.backbone import TimmBackbone
from muse_fast.runtime.progress_bar import ShowProgress
from muse_fast.runtime.team import ALONE, Team
from muse_fast.sources.names import patient_or_slide


class NucleusFeatures(Protocol):
    """Part of `muse_fast.models.backbone.Backbone` that feature extraction uses."""

    def nucleus_features(self, images: Tensor, xy: Tensor, image_index: Tensor) -> Tensor: ...


class CropFeatures(nn.Module):
    """Describes the only nucleus of each tile by the tile's image feature.

    Args:
        backbone: with ``cls``.
    """

    def __init__(self, backbone: Backbone | TimmBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def nucleus_features(self, images: Tensor, xy: Tensor, image_index: Tensor) -> Tensor:
        return self.backbone.cls(images)


@dataclass(frozen=True, slots=True)
class NucleusSet:
    """The nuclei of one split, one row each."""

    features: Tensor  # [N, D] float32
    labels: Tensor  # [N] int64
    patients: Tensor  # [N] int64, patient of each nucleus, or slide; nuclei of one patient are not independent

    def to(self, device: torch.device | str) -> NucleusSet:
        return NucleusSet(self.features.to(device), self.labels.to(device), self.patients.to(device))

    def __getitem__(self, rows: Tensor) -> NucleusSet:
        """The nuclei that ``rows`` selects: their numbers, or a mask ``[N]``."""
        return NucleusSet(self.features[rows], self.labels[rows], self.patients[rows])

    @staticmethod
    def joined(parts: Sequence[NucleusSet]) -> NucleusSet:
        """All nuclei of ``parts``, one after the other."""
        columns = ([one.features for one in parts], [one.labels for one in parts], [one.patients for one in parts])
        return NucleusSet(*(torch.cat(column) for column in columns))


@dataclass(frozen=True, slots=True)
class TileBatch:
    """Tiles stacked for a backbone."""

    images: Tensor  # [I, 3, size, size] float32, ImageNet-normalised
    xy: Tensor  # [N, 2] float32, pixels
    image_index: Tensor  # [N] int64
    labels: Tensor  # [N] int64


def stack_tiles(tiles: Sequence[Tile], device: torch.device | str = "cpu") -> TileBatch:
    """Stack ``tiles`` into one batch on ``device``; pixels are transferred as uint8."""
    counts = torch.tensor([len(tile.label) for tile in tiles])
    pixels = torch.from_numpy(np.stack([tile.image for tile in tiles])).to(device)
    return TileBatch(
        images=normalise(pixels.permute(0, 3, 1, 2)).contiguous(),
        xy=torch.from_numpy(np.concatenate([tile.xy for tile in tiles])).to(device),
        image_index=torch.repeat_interleave(torch.arange(len(tiles)), counts).to(device),
        labels=torch.from_numpy(np.concatenate([tile.label for tile in tiles])).to(device),
    )


def extract_features(
    backbone: NucleusFeatures,
    tiles: Mapping[str, Sequence[Tile]],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    bf16: bool = False,
    progress: ShowProgress | None = None,
    team: Team = ALONE,
) -> dict[str, NucleusSet]:
    """Features of every nucleus of every split, on the CPU; the backbone must be in eval mode on ``device``.

    Patients are numbered in the order of their names, over all splits; a slide counts as one if its patient is unknown.

    Args:
        team: its ranks share the batches out, which are the same for any number of ranks; only rank 0 gets features.
    """
    batches = [
        found[start : start + batch_size] for found in tiles.values() for start in range(0, len(found), batch_size)
    ]
    ends = np.cumsum([len(batch) for batch in batches]).tolist()

    def features(batch: Sequence[Tile]) -> Tensor:
        return features_of(backbone, stack_tiles(batch, device), bf16).cpu()

    def show(done: int) -> None:
        if progress is not None:
            progress(ends[done - 1], ends[-1], "tiles")

    rows = team.map(features, batches, show)
    if not team.is_main:
        return {}
    names = sorted({patient_or_slide(tile.slide) for found in tiles.values() for tile in found})
    number_of = {name: number for number, name in enumerate(names)}
    nuclei = [sum(len(tile.label) for tile in found) for found in tiles.values()]
    return {
        split: NucleusSet(part, *_labels_and_patients(tiles[split], number_of))
        for split, part in zip(tiles, torch.cat(rows).split(nuclei), strict=True)
    }


@torch.inference_mode()
def features_of(backbone: NucleusFeatures, batch: TileBatch, bf16: bool) -> Tensor:
    """Features ``[N, D]`` float32 of the nuclei of a batch."""
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
        return backbone.nucleus_features(batch.images, batch.xy, batch.image_index).float()


def _labels_and_patients(tiles: Sequence[Tile], number_of: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    labels = torch.from_numpy(np.concatenate([tile.label for tile in tiles]))
    patients = torch.tensor([number_of[patient_or_slide(tile.slide)] for tile in tiles])
    return labels, patients.repeat_interleave(torch.tensor([len(tile.label) for tile in tiles]))
