import copy

import pytest
import torch

from muse_fast.batch import PackedNuclei, Views
from muse_fast.models.backbone import build_backbone
from muse_fast.pretraining.retrieval import nucleus_retrieval, retrieval_at_1


def test_by_hand() -> None:
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    second = torch.tensor([[2.0, 0.1], [0.2, 1.0], [-1.0, 0.0]])
    keys = torch.tensor([[0], [1], [2]])
    # 0 and 1 find themselves both ways, 2 in neither: 4 of 6.
    found = retrieval_at_1(first, keys, second, keys)
    assert found.top1 == pytest.approx(4 / 6) and found.queries == 6 and found.chance == pytest.approx(1 / 3)


def test_only_nuclei_in_both_views_are_queries() -> None:
    found = retrieval_at_1(torch.eye(2), torch.tensor([[0], [1]]), torch.eye(2), torch.tensor([[0], [7]]))
    assert found.queries == 2 and found.top1 == 1.0


def test_no_queries() -> None:
    empty = torch.empty(0, 4)
    found = retrieval_at_1(empty, torch.empty(0, 1), torch.randn(3, 4), torch.tensor([[0], [1], [2]]))
    assert found.queries == 0 and found.top1 == 0.0


def test_identical_views_are_found_and_the_network_does_not_change() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny", image_size=64)
    before = copy.deepcopy(backbone.state_dict())
    images = torch.randn(3, 3, 64, 64)
    xy = torch.rand(12, 2) * 60
    nuclei = PackedNuclei(
        torch.cat([xy, xy]),
        torch.arange(4, dtype=torch.int32).repeat(6),
        torch.arange(0, 25, 4, dtype=torch.int32),
    )
    views = Views(
        torch.cat([images, images]),
        torch.empty(0, 3, 32, 32),
        nuclei,
        24,
        torch.ones(6),
        torch.arange(3),
        torch.zeros(3),
    )
    found = nucleus_retrieval(backbone, [views, views])
    # The same batch twice: its copy in the other batch ties with the nucleus itself, and the first one wins.
    assert found.queries == 48 and found.top1 >= 0.5
    assert nucleus_retrieval(backbone, [views]).top1 == 1.0
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
