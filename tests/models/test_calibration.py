"""Calibration gives the statistics that float64 gives, and changes nothing else."""

from __future__ import annotations

import torch
from torch import nn

from muse_fast.models.backbone import build_backbone
from muse_fast.models.calibration import batch_norms_of, set_batch_norm_statistics


def test_statistics_are_means_of_the_batches() -> None:
    norm = nn.BatchNorm1d(3, momentum=0.3)
    norm(torch.randn(9, 3) + 50)  # earlier statistics have no influence
    batches = [torch.randn(count, 3) * 4 + 2 for count in (5, 5, 2)]
    assert set_batch_norm_statistics(nn.Sequential(norm), batches, norm) == 1
    weights = torch.tensor([5, 5, 2], dtype=torch.float64) / 12
    for name, of_batch in (("running_mean", lambda x: x.mean(0)), ("running_var", lambda x: x.var(0))):
        expected = sum(weight * of_batch(batch.double()) for weight, batch in zip(weights, batches, strict=True))
        torch.testing.assert_close(getattr(norm, name).double(), expected, rtol=1e-5, atol=1e-5)
    assert norm.momentum == 0.3 and not norm.training


def test_a_backbone_keeps_its_weights(thin: None) -> None:
    backbone = build_backbone("resnet50")
    weights = [parameter.clone() for parameter in backbone.parameters()]
    images = torch.randn(4, 3, 64, 64) * 3 + 1
    assert set_batch_norm_statistics(backbone, [images], backbone) == len(batch_norms_of(backbone)) > 50
    assert all(torch.equal(a, b) for a, b in zip(weights, backbone.parameters(), strict=True))


def test_nothing_to_calibrate() -> None:
    layer = nn.Linear(2, 2)
    assert set_batch_norm_statistics(layer, [torch.zeros(1, 2)], layer) == 0 and not layer.training
