"""The models with the Triton kernels that they use on a GPU, here interpreted, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_fast.config import RECOMPUTE
from muse_fast.models.backbone import build_backbone
from muse_fast.ops import backends
from muse_fast.pretraining.distill import encode
from muse_fast.pretraining.drop_path import draw_scales
from tests.models.test_packed import make_nuclei

pytestmark = [
    pytest.mark.usefixtures("thin"),
    pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error())),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted"),
]
KERNELS = ("add_layer_norm", "batch_norm", "gelu", "join_heads", "resize_concat")
ARCHS = {
    "ours": "vit_tiny",
    "timm": "timm:vit_tiny_patch16_224:depth=2:embed_dim=24:num_heads=2",
    "timm-rope-layer-scale": "timm:vit_small_patch16_dinov3:depth=2:embed_dim=24:num_heads=2",
}
SIDES, COUNTS = (48, 32), (1, 2)


def learn(
    kernels: Sequence[str], arch: str, drop: bool, monkeypatch: pytest.MonkeyPatch, **how: Any
) -> dict[str, Tensor]:
    """Image features, nucleus features and all gradients."""
    monkeypatch.setenv(backends.ENVIRONMENT, ",".join(f"{op}=triton" for op in kernels))
    torch.manual_seed(0)
    model = build_backbone(ARCHS[arch], drop_path=0.4, image_size=48, **how).train()
    images = [torch.randn(count, 3, side, side) for count, side in zip(COUNTS, SIDES, strict=True)]
    nuclei = [make_nuclei(count, side) for count, side in zip(COUNTS, SIDES, strict=True)]
    scales = draw_scales(model.encoder.drop_rates, 0, 0, 1, sum(COUNTS)).flatten(1) if drop else None
    cls, rows = encode(model, images, nuclei, scales)
    sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in (cls, rows)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"cls": cls.detach(), "rows": rows.detach()} | gradients


@pytest.mark.parametrize(
    ("kernels", "arch", "drop"),
    [
        (KERNELS, "ours", True),
        (KERNELS[:-1], "ours", False),
        (KERNELS[:-1], "timm", True),
        (KERNELS[:-1], "timm-rope-layer-scale", True),
    ],
    ids=["ours", "no-drop", "timm", "timm-rope-layer-scale"],
)
def test_kernels_change_results_by_rounding_only(
    kernels: Sequence[str], arch: str, drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, got = (learn(each, arch, drop, monkeypatch) for each in ((), kernels))
    assert got.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in got.items():  # BatchNorm cancels most of some gradients, and leaves rounding
        assert (value - expected[name]).norm() <= 1e-4 * (expected[name].norm() + 0.1 * largest), name


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_recomputation_gives_the_same_with_kernels(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selective: the same bits. Full recomputation adds a branch outside of the kernel, with another rounding."""
    expected, got = (learn(KERNELS[:-1], "ours", True, monkeypatch, recompute=r) for r in ("none", recompute))
    for name, value in got.items():
        tolerance = 0 if recompute == "selective" else 1e-4
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


def test_features_are_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are bf16 for the decoder; image features have the dtype of the weights."""
    monkeypatch.setenv(backends.ENVIRONMENT, ",".join(f"{op}=triton" for op in KERNELS))
    model = build_backbone("vit_tiny", image_size=32).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cls, tokens = model.encoder([torch.randn(1, 3, 32, 32)])
    assert cls.dtype == torch.float32
    assert {tap.dtype for tap in tokens.taps} == {torch.bfloat16}
