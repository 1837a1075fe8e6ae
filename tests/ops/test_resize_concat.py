"""resize_concat against products of matrices in float64, torch's interpolation, and hand-computed values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast import ops
from muse_fast.ops import backends

needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels; on the CPU they are interpreted
triton = pytest.param("triton", marks=needs_triton)
FAST = ["blocked", triton]
ALL = ["reference", *FAST]

CASES: dict[str, tuple[int, list[tuple[int, int, int]], int]] = {  # images, channels, height and width of maps, side
    "one_pixel": (1, [(1, 1, 1)], 1),
    "from_one_pixel": (2, [(3, 1, 1)], 4),
    "to_one_pixel": (2, [(3, 4, 5)], 1),
    "tokens_to_stride_4": (1, [(5, 7, 7)], 28),
    "tokens_to_stride_32": (2, [(35, 7, 7)], 3),
    "stage_of_the_decoder": (1, [(33, 4, 4), (3, 9, 9)], 9),
    "both_resized": (2, [(5, 4, 4), (3, 3, 3)], 8),
    "not_square": (2, [(2, 3, 8), (3, 9, 2), (1, 5, 5)], 5),
    "one_axis_kept": (2, [(2, 5, 3), (2, 4, 5)], 5),
    "six_fold": (1, [(2, 2, 3)], 12),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
cases = pytest.mark.parametrize("case", CASES)


def make_maps(case: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], int]:
    images, shapes, side = CASES[case]
    return [torch.randn(images, *shape, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes], side


def matrix(coarse: int, fine: int) -> Tensor:
    """``[fine, coarse]``: the weight of every pixel in every fine one."""
    position = torch.arange(fine, dtype=torch.float64) * ((coarse - 1) / max(fine - 1, 1))
    return (1 - (position[:, None] - torch.arange(coarse)).abs()).clamp(min=0).to(DEVICE)


def by_matrices(maps: Sequence[Tensor], side: int) -> Tensor:
    """In float64."""
    weights = [(matrix(x.shape[2], side), matrix(x.shape[3], side)) for x in maps]
    return torch.cat([torch.einsum("qi,pj,ncij->ncqp", *w, x.double()) for w, x in zip(weights, maps, strict=True)], 1)


def learn(op: Callable[..., Tensor], maps: Sequence[Tensor], side: int, **options: Any) -> list[Tensor]:
    """Return the concatenation, and the gradients of a weighted sum."""
    leaves = [x.detach().requires_grad_() for x in maps]
    out = op(leaves, side, **options)
    pull = torch.linspace(-1, 1.5, out.numel(), dtype=torch.float64, device=out.device).bfloat16().view(out.shape)
    gradients = torch.autograd.grad(out, leaves, pull.to(out.dtype).contiguous(memory_format=order_of(out)))
    return [out.detach(), *gradients]


def order_of(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


@pytest.mark.parametrize("backend", ALL)
@layouts
def test_equals_hand_computed_values(layout: torch.memory_format, backend: str) -> None:
    """Corners are kept, the middles are means; and a corner's gradient is (1 + 1/2)^2, of ones."""
    coarse = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]], device=DEVICE).to(memory_format=layout).requires_grad_()
    fine = torch.arange(9.0, device=DEVICE).view(1, 1, 3, 3).to(memory_format=layout).requires_grad_()
    out = ops.resize_concat([coarse, fine], 3, backend=backend)
    assert out[0, 0].tolist() == [[0, 2, 4], [4, 6, 8], [8, 10, 12]]
    assert torch.equal(out[0, 1], fine[0, 0])
    (out * torch.tensor([1.0, 5.0], device=DEVICE).view(2, 1, 1)).sum().backward()
    assert coarse.grad is not None
    assert fine.grad is not None
    assert coarse.grad.flatten().tolist() == [2.25] * 4
    assert fine.grad.flatten().tolist() == [5.0] * 9


@pytest.mark.parametrize("backend", ALL)
@layouts
@cases
def test_equals_products_of_matrices(case: str, layout: torch.memory_format, backend: str) -> None:
    """The reference in float64, the kernels in float32."""
    dtype, tolerance = (torch.float64, 1e-12) if backend == "reference" else (torch.float32, 2e-6)
    maps, side = make_maps(case, dtype)
    got = learn(ops.resize_concat, [x.to(memory_format=layout) for x in maps], side, backend=backend)
    for ours, exact in zip(got, learn(by_matrices, [x.double() for x in maps], side), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), exact, rtol=tolerance, atol=tolerance * (1 + exact.abs().max().item())
        )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ["tokens_to_stride_4", "tokens_to_stride_32"])
def test_16_bits_are_rounded_once(case: str, dtype: torch.dtype, unit: float, backend: str) -> None:
    """Also where a pixel gathers from 81 fine ones. Triton's interpreter truncates to bf16 where a GPU rounds."""
    maps, side = make_maps(case, dtype)
    truth = learn(by_matrices, [x.double() for x in maps], side)
    for ours, exact in zip(learn(ops.resize_concat, maps, side, backend=backend), truth, strict=True):
        assert ours.dtype == dtype
        assert ((ours.double() - exact).abs() <= unit * exact.abs() + 1e-5).all()


@needs_triton
@layouts
def test_maps_of_two_dtypes(layout: torch.memory_format) -> None:
    """As of an encoder that returns float32 beside a bf16 decoder: promoted as torch.cat does it."""
    maps, side = make_maps("stage_of_the_decoder", torch.float32)
    maps = [maps[0].bfloat16().to(memory_format=layout), maps[1].to(memory_format=layout)]
    got = learn(ops.resize_concat, maps, side, backend="triton")
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(got[0].double(), by_matrices(maps, side), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_autocast_changes_nothing(backend: str) -> None:
    maps, side = make_maps("stage_of_the_decoder", torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = ops.resize_concat(maps, side, backend=backend)
    assert torch.equal(got, ops.resize_concat(maps, side, backend=backend))
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", FAST)
@layouts
def test_layouts_and_two_runs(layout: torch.memory_format, backend: str) -> None:
    """The layout of the maps is kept, forward and backward; maps with gaps, as those of tokens, give the same bits."""
    maps, side = make_maps("one_axis_kept", torch.float32)
    dense = [x.to(memory_format=layout) for x in maps]
    first, second = (learn(ops.resize_concat, dense, side, backend=backend) for _ in range(2))
    apart = [F.pad(x, (0, 0, 0, 1)).to(memory_format=layout)[:, :, :-1] for x in maps]
    gaps = learn(ops.resize_concat, apart, side, backend=backend)
    for a, b, c in zip(first, second, gaps, strict=True):
        assert a.is_contiguous(memory_format=layout)
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("backend", ALL)
def test_one_map_of_the_right_size_is_returned(backend: str) -> None:
    x = torch.randn(2, 3, 5, 5, device=DEVICE)
    assert ops.resize_concat([x], 5, backend=backend) is x


@pytest.mark.parametrize("backend", FAST)
def test_no_images(backend: str) -> None:
    maps = [torch.zeros(0, 3, 4, 4, device=DEVICE), torch.zeros(0, 2, 7, 7, device=DEVICE)]
    got = learn(ops.resize_concat, maps, 7, backend=backend)
    assert [tuple(x.shape) for x in got] == [(0, 5, 7, 7), (0, 3, 4, 4), (0, 2, 7, 7)]


def test_gradcheck() -> None:
    maps, side = make_maps("not_square")
    leaves = [x.cpu().requires_grad_() for x in maps]
    assert torch.autograd.gradcheck(lambda *maps: ops.resize_concat(maps, side), tuple(leaves))


@needs_triton
@layouts
def test_opcheck(layout: torch.memory_format) -> None:
    from muse_fast.kernels.fused import resize_concat as fused

    maps, side = make_maps("one_axis_kept", torch.float32)
    leaves = [x.to(memory_format=layout).requires_grad_() for x in maps]
    torch.library.opcheck(fused.resize_concat_fwd, (leaves, side))
    gradient = torch.randn(2, 4, side, side, device=DEVICE).to(memory_format=layout)
    torch.library.opcheck(fused.resize_concat_bwd, (gradient[:, 1:3], 3, 3))
    torch.library.opcheck(fused.resize_concat_bwd, (gradient[:1, :1, :1, :1].expand(2, 3, 5, 5), 3, 4))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool, backend: str) -> None:
    compiled = torch.compile(ops.resize_concat, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    rounding = 0 if backend == "triton" else 2e-6  # torch.compile has an interpolation of its own
    for images in (2, 3):
        maps = [torch.randn(images, 4, side, side, device=DEVICE) for side in (3, 5)]
        expected = learn(ops.resize_concat, maps, 5, backend=backend)
        for first, second in zip(learn(compiled, maps, 5, backend=backend), expected, strict=True):
            torch.testing.assert_close(first, second, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": []}, r"expected maps \[I, c, h, w\] with at least one pixel, got \[\]"),
        ({"maps": [torch.zeros(2, 3, 4)]}, r"got \[\(2, 3, 4\)\]"),
        ({"maps": [torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)]}, r"\(1, 3, 4, 4\)\]"),
        ({"maps": [torch.zeros(2, 3, 0, 4)]}, "at least one pixel"),
        ({"maps": [torch.zeros(2, 3, 4, 4).long()]}, "must be floating point, got torch.int64"),
        ({"maps": [torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4, device="meta")]}, "maps are on cpu and meta"),
        ({"side": 0}, "side must be at least 1, got 0"),
        ({"backend": "cpp"}, "no cpp implementation"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"maps": [torch.zeros(1, 3, 4, 4)], "side": 5}
    with pytest.raises(ValueError, match=f"resize_concat: .*{message}"):
        ops.resize_concat(**(arguments | change))
