"""The ResNet-50 encoder: names, widths, sizes."""

from __future__ import annotations

import pytest
import torch

from muse_fast.errors import UserError
from muse_fast.models.resnet import WIDTHS, ResNetEncoder
from tests.support.filled import open_branches


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    return open_branches(ResNetEncoder())


def test_names_are_those_of_a_timm_resnet50_without_its_classifier(encoder):
    import timm

    whole = timm.create_model("resnet50", num_classes=0)
    assert {f"encoder.{name}" for name in whole.state_dict()} == set(encoder.state_dict())


def test_maps_and_image_feature_equal_timm(encoder):
    import timm

    whole = timm.create_model("resnet50", num_classes=0).eval()
    whole.load_state_dict(encoder.encoder.state_dict())
    images = torch.randn(1, 3, 96, 96)
    encoder.eval()
    with torch.no_grad():
        feature, (maps,) = encoder([images])
        torch.testing.assert_close(feature, whole(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(maps[-1], whole.forward_features(images), rtol=0, atol=0)


@pytest.mark.parametrize(("side", "sides"), [(96, (24, 12, 6, 3)), (208, (52, 26, 13, 7))])
def test_widths_and_strides(encoder, side, sides):
    _, (maps,) = encoder([torch.randn(1, 3, side, side)])
    assert [tuple(m.shape) for m in maps] == [(1, w, s, s) for w, s in zip(WIDTHS, sides, strict=True)]


def test_initial_weights_are_those_of_timm():
    """MUSE's encoder is timm's ``resnet50``: a block starts as its shortcut, and learns from the first step on."""
    import timm

    torch.manual_seed(3)
    ours = ResNetEncoder().encoder
    torch.manual_seed(3)
    theirs = timm.create_model("resnet50", features_only=True, out_indices=(1, 2, 3, 4)).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())
    block, x = ours.layer2[1], torch.rand(2, 512, 8, 8)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.bn3.weight.grad.abs().min() > 0


def test_unsupported_images_are_refused(encoder):
    with pytest.raises(UserError, match="multiple of 16"):
        encoder([torch.zeros(1, 3, 100, 100)])
