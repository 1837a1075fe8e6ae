"""join_heads against a loop over tokens, and its column sums against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from muse_fast import ops
from muse_fast.ops import backends

pytestmark = pytest.mark.usefixtures("deterministic")

needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels; on the CPU they are interpreted
ALL = ["reference", pytest.param("triton", marks=needs_triton)]

LAYOUTS = {  # images and tokens of each resolution, heads and their width
    "one_value": ([(1, 1)], 1, 1),
    "one_resolution": ([(3, 7)], 2, 8),
    "odd": ([(2, 11), (5, 3)], 3, 5),
    "two_blocks_of_columns": ([(2, 9), (1, 4)], 3, 64),
    "a_resolution_without_images": ([(0, 9), (2, 4)], 2, 4),
    "three_resolutions": ([(1, 17), (2, 3), (1, 6)], 2, 16),
}


def make_parts(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """As attention returns them, heads before tokens in memory; values are exact in bfloat16."""
    layout, heads, width = LAYOUTS[name]
    shapes = [(images, heads, tokens, width) for images, tokens in layout for _ in range(3)]
    parts = [torch.randn(shape).bfloat16().to(dtype) for shape in shapes]
    return [part.to(DEVICE).transpose(1, 2) for part in parts]


def by_loops(parts: list[Tensor]) -> Tensor:
    """Token after token."""
    rows = [
        torch.cat([part[image, token].flatten() for part in parts[first : first + 3]])
        for first in range(0, len(parts), 3)
        for image in range(parts[first].shape[0])
        for token in range(parts[first].shape[1])
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_loop_and_float64(layout: str, dtype: torch.dtype, backend: str) -> None:
    """Values are copied; sums are float32 with triton, and else of the dtype of the parts, as torch sums a gradient."""
    parts = make_parts(layout, dtype)
    joined, sums = ops.join_heads(parts, with_sums=True, backend=backend)
    expected = by_loops(parts)
    assert sums is not None and torch.equal(joined, expected)
    assert sums.dtype == (torch.float32 if backend == "triton" else dtype)
    exact = expected.double().sum(0)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[sums.dtype]
    assert (sums.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("backend", ALL)
def test_other_strides_and_no_sums(backend: str) -> None:
    """Contiguous, sliced in the last dimension, expanded, and each of three in another order."""
    parts = make_parts("odd")
    expected = by_loops(parts)
    sliced = [part.repeat_interleave(2, dim=-1)[..., ::2] for part in parts]
    mixed = [part if number % 3 else part.contiguous() for number, part in enumerate(parts)]
    for some in ([part.contiguous() for part in parts], sliced, mixed):
        joined, sums = ops.join_heads(some, backend=backend)
        assert torch.equal(joined, expected) and sums is None
    ones = [torch.ones(1, 1, 1, 1, device=DEVICE).expand(part.shape) for part in parts]
    assert torch.equal(ops.join_heads(ones, backend=backend)[0], torch.ones_like(expected))


@pytest.mark.parametrize("backend", ALL)
def test_no_rows(backend: str) -> None:
    joined, sums = ops.join_heads([torch.zeros(0, 5, 2, 4, device=DEVICE)] * 3, with_sums=True, backend=backend)
    assert joined.shape == (0, 24) and sums is not None
    assert sums.tolist() == [0.0] * 24


@needs_triton
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_runs_of_several_tiles(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from muse_fast.kernels.fused import gelu

    monkeypatch.setattr(gelu, "PROGRAMS", programs)
    torch.manual_seed(0)
    parts = [torch.randn(4, 23, 2, 4, device=DEVICE) for _ in range(3)]
    (joined, sums), (_, again) = (ops.join_heads(parts, with_sums=True, backend="triton") for _ in range(2))
    expected = by_loops(parts)
    assert torch.equal(joined, expected) and sums is not None and again is not None
    assert torch.equal(sums, again)
    torch.testing.assert_close(sums.double(), expected.double().sum(0), rtol=1e-5, atol=1e-5)


@needs_triton
def test_opcheck() -> None:
    from muse_fast.kernels.fused import join_heads as fused

    for layout in ("odd", "a_resolution_without_images"):
        torch.library.opcheck(fused.join_heads, (make_parts(layout, torch.bfloat16),))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "expected q, k, v"),
        ([torch.zeros(1, 2, 3, 4)] * 2, "expected q, k, v"),
        ([torch.zeros(2, 3, 4)] * 3, r"expected q, k, v \[images, tokens, heads, d\]"),
        ([torch.zeros(1, 2, 3, 4)] * 3 + [torch.zeros(1, 2, 4, 3)] * 3, "expected q, k, v"),
        ([torch.zeros(1, 2, 3, 4)] * 2 + [torch.zeros(2, 2, 3, 4)], "must have one shape"),
        ([torch.zeros(1, 2, 3, 4)] * 2 + [torch.zeros(1, 2, 3, 4).double()], "one floating point dtype and device"),
        ([torch.zeros(1, 2, 3, 4).long()] * 3, "one floating point dtype and device"),
    ],
)
def test_errors(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"join_heads: .*{message}"):
        ops.join_heads(parts)


def test_a_forced_backend_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="no cpp implementation"):
        ops.join_heads([torch.zeros(1, 2, 3, 4)] * 3, backend="cpp")
