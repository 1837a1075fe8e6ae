"""Nucleus retrieval@1: how well features distinguish nuclei across views, without labels.

Every nucleus that is in both global views of its ROI is a query. It is a hit if its nearest feature (cosine) among all
nuclei of the other view of all ROIs is the nucleus itself. The score is the share of hits. A collapsed
network scores about chance, one in the number of candidates; an untrained one may score several times that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muse_fast.batch import Views
from muse_fast.images.imagenet import normalised
from muse_fast.models.backbone import Backbone
from muse_fast.pretraining.distill import encode


@dataclass(frozen=True, slots=True)
class Retrieval:
    top1: float  # share of queries whose nearest neighbour is the nucleus itself
    chance: float  # expected score of guessing
    queries: int


@torch.no_grad()
def nucleus_retrieval(backbone: Backbone, batches: Sequence[Views], device: torch.device | str = "cpu") -> Retrieval:
    """Compute retrieval@1 between the two global views, in both directions, over all ROIs of ``batches`` at once.

    Features are those of training: BatchNorm uses the batch's statistics. The backbone does not change.
    """
    features, keys = zip(*(global_features(backbone, views, device) for views in batches), strict=True)
    first, second = (torch.cat([f[side] for f in features]) for side in (0, 1))
    # A key is (batch, ROI in the batch, nucleus), unique over all batches.
    numbered = [
        [torch.cat([torch.full((len(k), 1), number), k], dim=1) for k in pair] for number, pair in enumerate(keys)
    ]
    first_keys, second_keys = (torch.cat([pair[side] for pair in numbered]) for side in (0, 1))
    return retrieval_at_1(first, first_keys, second, second_keys)


def retrieval_at_1(first: Tensor, first_keys: Tensor, second: Tensor, second_keys: Tensor) -> Retrieval:
    """Score how often features ``[n, D]``, ``[m, D]`` with unique keys ``[n, j]``, ``[m, j]`` find their own key."""
    same = (first_keys[:, None] == second_keys[None]).all(dim=2)
    similarity = nn.functional.normalize(first, dim=1) @ nn.functional.normalize(second, dim=1).T
    hits, queries, chance = 0, 0, 0.0
    for found, score in ((same, similarity), (same.T, similarity.T)):
        is_query = found.any(dim=1)
        if is_query.any():
            nearest = score[is_query].argmax(dim=1, keepdim=True)
            hits += int(found[is_query].gather(1, nearest).sum())
            queries += int(is_query.sum())
            chance += int(is_query.sum()) / score.shape[1]
    if queries == 0:
        return Retrieval(top1=0.0, chance=0.0, queries=0)
    return Retrieval(top1=hits / queries, chance=chance / queries, queries=queries)


@torch.no_grad()
def global_features(
    backbone: Backbone, views: Views, device: torch.device | str
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return nucleus features of the two global views and their keys (ROI in the batch, nucleus index), on the CPU."""
    # A copy in training mode uses batch statistics without changing the running ones of the original.
    network = copy.deepcopy(backbone).to(device).train()
    num_rois = views.num_rois
    nuclei = views.groups()[1][0]
    images = normalised(views.global_images.to(device)).to(next(network.parameters()).dtype)
    rows = encode(network, [images], [nuclei.to(device)])[1].float().cpu()
    image = nuclei.image_index()
    keys = torch.stack([image % num_rois, nuclei.index.long()], dim=1)
    split = int(nuclei.offsets[num_rois])
    return (rows[:split], rows[split:]), (keys[:split], keys[split:])
