"""Images of two resolutions in one pass, compared with one pass per resolution and with timm, with all gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from muse_fast.batch import PackedNuclei
from muse_fast.models.backbone import build_backbone
from muse_fast.pretraining.distill import encode
from muse_fast.pretraining.drop_path import draw_scales
from tests.support.filled import open_branches
from tests.support.published import dino_pos_embed

COUNTS = (2, 3)  # images of each resolution
SIZES = [
    pytest.param("vit_tiny", (224, 96), id="vit_tiny-224-96"),
    pytest.param("vit_small", (224, 96), id="vit_small-224-96", marks=pytest.mark.heavy),
    pytest.param("vit_tiny", (320, 208), id="vit_tiny-320-208"),
    pytest.param("vit_small", (512, 208), id="vit_small-512-208", marks=pytest.mark.heavy),
]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Require errors of at most ``tolerance`` times the largest entry of each tensor."""
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        other = expected[name]
        assert tensor.shape == other.shape, name
        assert not other.numel() or (tensor - other).abs().max() <= tolerance * other.abs().max(), name


def gradients(model: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return ours | {f"images {place}": x.grad for place, x in enumerate(images) if x.grad is not None}


def make_images(sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(count, 3, side, side) for count, side in zip(COUNTS, sizes, strict=True)]


def make_nuclei(images: int, side: int) -> PackedNuclei:
    """Each image has a different number of nuclei, the first has none."""
    counts = 4 * torch.arange(images)
    offsets = torch.tensor([0, *counts.cumsum(0)], dtype=torch.int32)
    total = int(offsets[-1])
    return PackedNuclei(torch.rand(total, 2) * side, torch.zeros(total, dtype=torch.int32), offsets)


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("drop", [False, True], ids=["no-drop", "drop-path"])
@pytest.mark.parametrize(("arch", "sizes"), [*SIZES[:3], pytest.param("resnet50", (64, 32), id="resnet50-64-32")])
def test_one_pass_over_two_resolutions_equals_two_passes(arch: str, sizes: tuple[int, int], drop: bool) -> None:
    """CLS and nucleus rows, gradients of weights and images, and running statistics, which depend on the order."""
    packed = open_branches(build_backbone(arch, drop_path=0.4, image_size=sizes[0])).train()
    separate = copy.deepcopy(packed)
    images, nuclei = make_images(sizes), [make_nuclei(n, side) for n, side in zip(COUNTS, sizes, strict=True)]
    scales = draw_scales(packed.encoder.drop_rates, 0, 0, 1, sum(COUNTS)).flatten(1) if drop else None
    rows = sum(len(part.index) for part in nuclei)
    weight = torch.randn(sum(COUNTS), packed.image_dim), torch.randn(rows, packed.dense_dim)

    def learn(backbone: Any, together: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        inputs = [x.clone().requires_grad_() for x in images]
        if together:
            cls, rows = encode(backbone, inputs, nuclei, scales)
        else:
            shares = [None, None] if scales is None else scales.split(COUNTS, dim=1)
            parts = [encode(backbone, [x], [n], s) for x, n, s in zip(inputs, nuclei, shares, strict=True)]
            cls, rows = (torch.cat(each) for each in zip(*parts, strict=True))
        ((cls * weight[0]).sum() + (rows * weight[1]).sum()).backward()
        buffers = {name: b.double() for name, b in backbone.named_buffers()}
        return {"cls": cls.detach(), "rows": rows.detach()}, gradients(backbone, inputs), buffers

    for got, expected in zip(learn(packed, True), learn(separate, False), strict=True):
        assert_close(got, expected)


class TimmTaps(nn.Module):
    """timm's ViT for images of one size; returns tokens after layers 2, 5, 8 and 11, each through the final norm."""

    def __init__(self, arch: str, side: int) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        self.vit = timm.create_model(f"{arch}_patch16_224", num_classes=0, img_size=side)

    def forward(self, images: Tensor, scales: Tensor) -> list[Tensor]:
        for layer, block in enumerate(self.vit.blocks):
            for branch, name in enumerate(("drop_path1", "drop_path2")):
                setattr(block, name, Scale(scales[2 * layer + branch]))
        taps = self.vit.forward_intermediates(
            images,
            indices=[2, 5, 8, 11],
            norm=True,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in taps]


class Scale(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


@pytest.mark.parametrize(("arch", "sizes"), SIZES)
def test_one_pass_over_two_resolutions_equals_timm(arch: str, sizes: tuple[int, int]) -> None:
    """Every tapped token, and gradients of weights and images, with dropped paths."""
    ours = build_backbone(arch, drop_path=0.4, image_size=sizes[0]).encoder
    with torch.no_grad():  # initial biases and norms, all zeros and ones, would hide a swap
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    images = make_images(sizes)
    scales = draw_scales(ours.drop_rates, 0, 0, 1, sum(COUNTS)).flatten(1)
    weights = [[torch.randn(n, 1 + (s // 16) ** 2, ours.encoder.dim) for _ in range(4)]
               for n, s in zip(COUNTS, sizes, strict=True)]  # fmt: skip

    inputs = [x.clone().requires_grad_() for x in images]
    cls, tokens = ours(inputs, scales)
    got = [tokens.split(tap) for tap in tokens.taps]  # layer, resolution
    sum((got[layer][i] * weights[i][layer]).sum() for layer in range(4) for i in range(2)).backward()
    our_gradients = gradients(ours.encoder, inputs)

    theirs = {name: p.detach().clone().requires_grad_() for name, p in ours.encoder.named_parameters()}
    inputs = [x.clone().requires_grad_() for x in images]
    total, last = torch.zeros(()), []
    for i, (side, x, scale) in enumerate(zip(sizes, inputs, scales.split(COUNTS, dim=1), strict=True)):
        # timm resizes by a rule of its own, so it gets the embedding that DINO's formula gives.
        stored = theirs["pos_embed"]
        table = stored if side == sizes[0] else dino_pos_embed(stored, side // 16)
        state = {f"vit.{name}": p for name, p in (theirs | {"pos_embed": table}).items()}
        taps = functional_call(TimmTaps(arch, side), state, (x, scale), strict=True)
        for layer, tap in enumerate(taps):
            torch.testing.assert_close(got[layer][i], tap, rtol=1e-5, atol=1e-5)
            total = total + (tap * weights[i][layer]).sum()
        last.append(taps[-1][:, 0])
    torch.testing.assert_close(cls, torch.cat(last), rtol=1e-5, atol=1e-5)
    total.backward()
    expected = {name: p.grad for name, p in theirs.items()} | {f"images {i}": x.grad for i, x in enumerate(inputs)}
    assert_close(our_gradients, expected)
