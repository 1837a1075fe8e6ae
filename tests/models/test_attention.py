"""Attention over packed tokens against an explicit softmax, image by image."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from muse_fast.config import ATTENTION, load_config
from muse_fast.errors import UserError
from muse_fast.models import attention
from muse_fast.models.attention import Layout, attend, why_not
from muse_fast.models.backbone import build_backbone
from muse_fast.pretraining.trainer import Trainer

CPU = torch.device("cpu")
HEADS, WIDTH = 3, 24
LAYOUTS: list[Layout] = [((2, 5), (3, 4)), ((1, 1),), ((4, 7),), ((1, 17), (2, 3), (1, 6)), ((0, 5), (2, 3))]


def rows_of(layout: Layout) -> int:
    return sum(images * tokens for images, tokens in layout)


def explicit(qkv: Tensor, heads: int, layout: Layout) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` per image and head, in loops."""
    width, first, images = qkv.shape[1] // 3, 0, []
    for count, tokens in layout:
        for _ in range(count):
            q, k, v = qkv[first : first + tokens].split(width, dim=1)
            parts = zip(*(x.chunk(heads, dim=1) for x in (q, k, v)), strict=True)
            images.append(torch.cat([(q @ k.T / k.shape[1] ** 0.5).softmax(dim=1) @ v for q, k, v in parts], dim=1))
            first += tokens
    return torch.cat(images)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sdpa_equals_the_explicit_softmax(layout: Layout) -> None:
    qkv = torch.randn(rows_of(layout), 3 * WIDTH, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(rows_of(layout), WIDTH, dtype=torch.float64)
    got, expected = attend(qkv, HEADS, layout, "sdpa"), explicit(qkv, HEADS, layout)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y, qkv, slope)[0] for y in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_a_bias_that_is_already_added_gets_its_gradient() -> None:
    """As if attention were given ``x + bias``."""
    layout: Layout = ((2, 5), (3, 4))
    x, slope = (torch.randn(rows_of(layout), width, dtype=torch.float64) for width in (3 * WIDTH, WIDTH))
    bias = torch.randn(3 * WIDTH, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(attend(x + bias.detach(), HEADS, layout, "sdpa", bias), bias, slope)
    expected = torch.autograd.grad(explicit(x + bias, HEADS, layout), bias, slope)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_sdpa_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    layout: Layout = ((2, 37), (3, 10))
    qkv = torch.randn(rows_of(layout), 3 * WIDTH, dtype=dtype)
    got = attend(qkv, HEADS, layout, "sdpa")
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), explicit(qkv.double(), HEADS, layout), rtol=tolerance, atol=tolerance)


def test_varlen_leaves_float32_to_sdpa() -> None:
    """Evaluations of a run in bf16 are in float32, which torch's variable-length attention does not take."""
    layout = LAYOUTS[0]
    qkv = torch.randn(rows_of(layout), 3 * WIDTH)
    assert torch.equal(attend(qkv, HEADS, layout, "varlen"), attend(qkv, HEADS, layout, "sdpa"))


def test_no_images() -> None:
    assert attend(torch.zeros(0, 3 * WIDTH), HEADS, ((0, 5),), "sdpa").shape == (0, WIDTH)


def test_images_do_not_influence_each_other() -> None:
    """Tokens of an image, its image feature and its gradient do not depend on other images of either resolution."""
    encoder = build_backbone("vit_tiny", image_size=96).encoder
    images = [torch.randn(2, 3, 96, 96), torch.randn(3, 3, 64, 64)]
    cls, tokens = encoder(images)
    for group, image in ((0, 1), (1, 0)):
        other = [x.clone() for x in images]
        other[group][image] = torch.randn_like(other[group][image])
        changed, changed_tokens = encoder(other)
        at = image + group * len(images[0])
        for i in range(len(cls)):
            assert torch.equal(cls[i], changed[i]) == (i != at)
        for tap, changed_tap in zip(tokens.taps, changed_tokens.taps, strict=True):
            for place, (before, after) in enumerate(
                zip(tokens.split(tap), changed_tokens.split(changed_tap), strict=True)
            ):
                for i in range(len(before)):
                    assert torch.equal(before[i], after[i]) == ((place, i) != (group, image))

    inputs = [x.requires_grad_() for x in images]
    encoder(inputs)[0][3].square().sum().backward()  # the second image of the second resolution
    assert inputs[0].grad is not None and inputs[1].grad is not None
    assert not inputs[0].grad.any()
    assert [bool(x.any()) for x in inputs[1].grad] == [False, True, False]


@pytest.mark.parametrize("backend", ["xformers", "varlen"])
def test_why_not_on_a_cpu(backend: str) -> None:
    assert why_not("sdpa", CPU, torch.float64) is None
    assert why_not(backend, CPU, torch.bfloat16) == "it runs only on CUDA GPUs, and the run is on cpu"


def test_why_not_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setitem(sys.modules, "xformers.ops", None)  # so that its import fails
    cuda = torch.device("cuda", 0)
    assert "bf16 and fp16" in (why_not("varlen", cuda, torch.float32) or "")
    assert "train.precision=bf16" in (why_not("varlen", cuda, torch.float32) or "")
    assert "compute capability 8.0" in (why_not("varlen", cuda, torch.bfloat16) or "")
    assert "xformers.ops cannot be imported" in (why_not("xformers", cuda, torch.float32) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_failure", lambda *_: None)
    assert why_not("varlen", cuda, torch.bfloat16) is None


def test_a_package_that_imports_but_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As xformers does if it was built for another torch. The example itself is tried on the CPU."""

    def broken(*arguments: object, **options: object) -> Tensor:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nwith inputs ...")

    fake = ModuleType("xformers.ops")
    fake.memory_efficient_attention = broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    monkeypatch.setattr(attention, "_block_diagonal", lambda *_: None)
    attention._failure.cache_clear()
    said = attention._failure("xformers", CPU, torch.float32)
    assert said == (
        "a small example fails (NotImplementedError: No operator found for `memory_efficient_attention_forward`)"
    )
    assert attention._failure("sdpa", CPU, torch.float32) is None


@pytest.mark.parametrize("backend", ["xformers", "varlen"])
def test_a_run_with_an_unusable_attention_is_refused(backend: str) -> None:
    config = load_config(None, [f"model.attention={backend}", "model.arch=vit_tiny", "head.prototypes=16"])
    with pytest.raises(UserError, match=rf"^model\.attention={backend} cannot run: .*on cpu.*sdpa"):
        Trainer(config, CPU)


def test_a_student_can_reuse_bounds_cached_by_a_teacher() -> None:
    layout: Layout = ((2, 5), (1, 3))
    attention._bounds.cache_clear()
    with torch.inference_mode():
        bounds = attention._bounds(layout, CPU)
    assert bounds.tolist() == [0, 5, 10, 13] and bounds.dtype == torch.int32
    assert not bounds.is_inference()  # so autograd can save it
    assert attention._bounds(layout, CPU) is bounds


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def skip_unless_it_runs(backend: str, dtype: torch.dtype) -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := why_not(backend, device, dtype):
        pytest.skip(f"{backend}: {reason}")
    return device


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("xformers", torch.float32), ("xformers", torch.bfloat16), ("varlen", torch.bfloat16), ("varlen", torch.float16)],
)
@pytest.mark.parametrize("layout", [((2, 197), (5, 37)), ((3, 170),), ((1, 1025), (4, 170))], ids=str)
def test_other_backends_are_as_accurate_as_sdpa(layout: Layout, backend: str, dtype: torch.dtype) -> None:
    """Values and gradients, compared with float64."""
    device, heads, width = skip_unless_it_runs(backend, dtype), 6, 384
    qkv = torch.randn(rows_of(layout), 3 * width, device=device).to(dtype)
    slope = torch.randn(rows_of(layout), width, device=device).to(dtype)

    def learn(backend: str, qkv: Tensor) -> tuple[Tensor, Tensor]:
        qkv = qkv.detach().requires_grad_()
        y = attend(qkv, heads, layout, backend)
        return y.detach(), torch.autograd.grad(y, qkv, slope.to(y.dtype))[0]

    truth = learn("sdpa", qkv.double())
    for ours, sdpa, exact in zip(learn(backend, qkv), learn("sdpa", qkv), truth, strict=True):
        assert ours.dtype == dtype
        assert (ours - exact).norm() <= 1.5 * (sdpa - exact).norm() + 1e-6 * exact.norm()


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("backend", [name for name in ATTENTION if name != "sdpa"])
def test_a_backbone_agrees_with_every_backend(backend: str) -> None:
    """CLS and gradients under autocast are about as close to float64 as those of sdpa."""
    device = skip_unless_it_runs(backend, torch.bfloat16)
    models = {name: build_backbone("vit_tiny", image_size=96, attention=name).to(device) for name in ("sdpa", backend)}
    models[backend].load_state_dict(models["sdpa"].state_dict())
    images = [torch.randn(2, 3, 96, 96, device=device), torch.randn(3, 3, 64, 64, device=device)]
    results = []
    for name, dtype in (("sdpa", torch.float64), ("sdpa", torch.float32), (backend, torch.float32)):
        model = models[name].to(dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            cls, _ = model.encoder([x.to(dtype) for x in images])
        model.zero_grad()
        cls.double().square().sum().backward()
        grads = torch.cat([p.grad.double().flatten() for p in model.encoder.parameters()])
        results.append((cls.detach().double(), grads))
        model.float()
    for exact, sdpa, ours in zip(*results, strict=True):
        assert (ours - exact).norm() <= 1.5 * (sdpa - exact).norm()
