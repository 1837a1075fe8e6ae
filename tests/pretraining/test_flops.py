import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muse_fast.config import load_config
from muse_fast.models.backbone import build_backbone
from muse_fast.models.heads import DINOHead
from muse_fast.pretraining.flops import head_flops, step_flops, view_flops

AT_224 = ("views.global_size=224", "views.local_size=96")
AT_512 = ("views.global_size=512", "views.local_size=208")


# Counted by torch's FlopCounterMode on the published modules, without the gradient of the images.
@pytest.mark.parametrize(
    ("arch", "views", "rows", "gflops"),
    [
        ("vit_small", AT_224, (216, 120), 248.5),
        ("vit_small", AT_512, (1078, 627), 1375.8),
        ("vit_base", AT_224, (216, 120), 873.6),
        ("vit_base", AT_512, (1078, 627), 4643.1),
        ("resnet50", AT_224, (216, 120), 836.6),
        ("resnet50", AT_512, (1078, 627), 4211),
    ],
)
def test_the_recipe_costs_what_the_published_modules_cost(
    arch: str, views: tuple[str, str], rows: tuple[float, float], gflops: float
) -> None:
    config = load_config(None, [f"model.arch={arch}", *views])
    assert gflops * 0.9999 <= step_flops(config, rows) / 1e9 <= gflops * 1.002


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("arch", ["vit_tiny", "resnet50"])
def test_a_view_costs_what_the_backbone_runs(arch: str, size: int) -> None:
    backbone, images = build_backbone(arch, image_size=size).eval(), torch.randn(1, 3, size, size)
    # FlopCounterMode counts the plain attention kernel on every device.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        backbone(images)
    assert counter.get_total_flops() == pytest.approx(view_flops(arch, size), rel=1e-3)


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet50"])
def test_a_backward_is_two_forwards_minus_the_gradient_of_the_images(arch: str) -> None:
    backbone, images = build_backbone(arch, image_size=64), torch.randn(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        features = backbone(images)
        (features.cls.sum() + sum(level.sum() for level in features.levels)).backward()
    of_images = 2 * 3 * (64**2 * 192 if arch == "vit_tiny" else 32**2 * 7**2 * 64)
    # The gradient of resizing, a product of matrices on a CPU, is not a useful FLOP: 0.2 % here.
    assert counter.get_total_flops() == pytest.approx(2 * (3 * view_flops(arch, 64) - of_images), rel=3e-3)


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet50"])
def test_a_frozen_encoder_has_no_backward(arch: str) -> None:
    config = load_config(None, [f"model.arch={arch}", *AT_224])
    encoder = build_backbone(arch).encoder.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        encoder([torch.randn(2, 3, 224, 224), torch.randn(8, 3, 96, 96)])
    saved = step_flops(config, (9, 4)) - step_flops(config, (9, 4), train_encoder=False)
    assert saved == pytest.approx(2 * counter.get_total_flops(), rel=1e-3)


def test_a_row_costs_what_the_head_runs() -> None:
    config = dataclasses.replace(load_config(None).head, hidden_dim=32, bottleneck_dim=16, prototypes=64)
    head = DINOHead(24, 32, 16, 64)
    with FlopCounterMode(display=False) as counter:
        z, prototypes = head(torch.randn(5, 24))
        z @ prototypes.T
    assert counter.get_total_flops() == 5 * head_flops(24, config)


def test_rows_and_views_count() -> None:
    config = load_config(None, ["model.arch=vit_tiny", *AT_224])
    per_row = head_flops(192, config.head)
    none, some = step_flops(config, (0, 0)), step_flops(config, (10, 4))
    assert some - none == (3 * 10 + 4) * per_row
    without_locals = dataclasses.replace(config, views=dataclasses.replace(config.views, num_locals=0))
    per_local = view_flops("vit_tiny", 96) + per_row
    assert none - step_flops(without_locals, (0, 0)) == 3 * config.views.num_locals * per_local
