"""gelu against the error function in float64, torch's own operators, and hand-computed values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast import ops
from muse_fast.ops import backends
from tests.support.agreement import FLOOR, GRADIENT_CAP, LOSS_CAP, assert_as_exact_as_eager

pytestmark = pytest.mark.usefixtures("deterministic")

needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels; on the CPU they are interpreted
ALL = ["reference", pytest.param("triton", marks=needs_triton)]

SIZES = {  # rows, columns
    "one_value": (1, 1),
    "one_row": (1, 37),
    "one_column": (5, 1),
    "odd": (67, 35),
    "several_blocks_of_columns": (19, 300),
}


def make_case(rows: int, columns: int) -> list[Tensor]:
    """Hidden values and a bias; the hidden values are exact in bfloat16 and reach far into both tails."""
    hidden = (torch.randn(rows, columns, dtype=torch.float64) * 2 + 0.3).bfloat16().double()
    return [hidden, torch.randn(columns, dtype=torch.float64)]


def by_definition(hidden: Tensor, bias: Tensor) -> Tensor:
    hidden = hidden + bias - bias.detach()  # it is in the hidden values already
    return hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2


def learn(op: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Return the result and both gradients of a weighted sum of it."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves, **options)
    (out * torch.linspace(-1, 1.5, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def to(inputs: list[Tensor], hidden: torch.dtype, bias: torch.dtype) -> list[Tensor]:
    return [inputs[0].to(DEVICE, hidden), inputs[1].to(DEVICE, bias)]


@pytest.mark.parametrize("backend", ALL)
def test_equals_hand_computed_values(backend: str) -> None:
    """y = h Phi(h): 0 at 0, and 1 - erfc(1) / 2 times sqrt(2) at sqrt(2). y' = Phi(h) + h phi(h)."""
    hidden = torch.tensor([[0.0, math.sqrt(2)], [0.0, -40.0]], device=DEVICE, requires_grad=True)
    bias = torch.zeros(2, device=DEVICE, requires_grad=True)
    out = ops.gelu(hidden, bias, backend=backend)
    torch.testing.assert_close(out.cpu(), torch.tensor([[0.0, 1.3029856], [0.0, 0.0]]), rtol=1e-6, atol=0)
    out.backward(torch.tensor([[1.0, 1.0], [2.0, 5.0]], device=DEVICE))
    slope = 0.92135040 + math.sqrt(2) * 0.14676266
    assert hidden.grad is not None and bias.grad is not None
    torch.testing.assert_close(hidden.grad.cpu(), torch.tensor([[0.5, slope], [1.0, 0.0]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(bias.grad.cpu(), torch.tensor([1.5, slope]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_float64_equals_the_definition(size: str) -> None:
    inputs = to(make_case(*SIZES[size]), torch.float64, torch.float64)
    torch.testing.assert_close(learn(ops.gelu, inputs), learn(by_definition, inputs), rtol=1e-9, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("size", [size for size in SIZES if not size.startswith("one_")])
def test_is_as_exact_as_eager(size: str) -> None:
    inputs = make_case(*SIZES[size])
    truth = learn(by_definition, to(inputs, torch.float64, torch.float64))
    given = to(inputs, torch.float32, torch.float32)
    eager, got = (learn(ops.gelu, given, backend=backend) for backend in ("reference", "triton"))
    caps = [LOSS_CAP[torch.float32], *[GRADIENT_CAP[torch.float32]] * 2]
    assert_as_exact_as_eager(got, eager, truth, caps, FLOOR[torch.float32])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bits(dtype: torch.dtype) -> None:
    """Values are torch's own. The gradient of a float32 bias is summed before anything is rounded."""
    inputs = make_case(67, 150)
    given = to(inputs, dtype, torch.float32)
    pull = torch.randn(67, 150, dtype=torch.float64).to(dtype).to(DEVICE)
    leaves = [x.detach().requires_grad_() for x in given]
    out = ops.gelu(*leaves, backend="triton")
    assert out.dtype == dtype and torch.equal(out, F.gelu(given[0]))
    out.backward(pull)
    exact = [x.double().requires_grad_() for x in given]
    by_definition(*exact).backward(pull.double())
    got, expected = [leaf.grad for leaf in leaves], [leaf.grad for leaf in exact]
    assert [g.dtype for g in got if g is not None] == [dtype, torch.float32]
    for ours, truth, cap in zip(got, expected, (2 * GRADIENT_CAP[dtype], 2e-6), strict=True):
        assert ours is not None and truth is not None
        assert (ours.double() - truth).norm() <= cap * truth.norm()  # the interpreter truncates where a GPU rounds


@pytest.mark.parametrize("backend", ALL)
def test_no_rows(backend: str) -> None:
    learned = learn(ops.gelu, to(make_case(0, 8), torch.float32, torch.float32), backend=backend)
    assert [tuple(one.shape) for one in learned] == [(0, 8), (0, 8), (8,)]
    assert not learned[2].any()


@needs_triton
@pytest.mark.parametrize("programs", [1, 2, 3])
def test_runs_of_several_tiles(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with more tiles than programs: the same but for the order of the sums, and twice the same bits."""
    from muse_fast.kernels.fused import gelu as fused

    inputs = to(make_case(150, 140), torch.float32, torch.float32)
    expected = learn(ops.gelu, inputs, backend="triton")
    monkeypatch.setattr(fused, "PROGRAMS", programs)
    got, again = (learn(ops.gelu, inputs, backend="triton") for _ in range(2))
    assert all(map(torch.equal, got, again)) and all(map(torch.equal, got[:2], expected[:2]))
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-5)


@needs_triton
def test_strided_inputs() -> None:
    inputs = to(make_case(20, 24), torch.float32, torch.float32)
    strided = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in inputs]
    for a, b in zip(*(learn(ops.gelu, x, backend="triton") for x in (strided, inputs)), strict=True):
        assert torch.equal(a, b)


@needs_triton
def test_opcheck() -> None:
    from muse_fast.kernels.fused import gelu as fused

    hidden, bias = to(make_case(5, 7), torch.bfloat16, torch.float32)
    torch.library.opcheck(fused.gelu_fwd, (hidden.requires_grad_(), bias.requires_grad_()))
    expanded = torch.ones(1, 7, device=DEVICE).expand(5, 7)
    torch.library.opcheck(fused.gelu_bwd, (expanded, hidden.detach()))


@needs_triton
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    torch.compiler.reset()  # other forms count towards the limit of recompilations
    compiled = torch.compile(ops.gelu, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 7):
        inputs = to(make_case(rows, 9), torch.float32, torch.float32)
        expected = learn(ops.gelu, inputs, backend="triton")
        assert all(map(torch.equal, learn(compiled, inputs, backend="triton"), expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"expected hidden \[M, C\]"),
        ({"bias": torch.zeros(3)}, r"got \(2, 4\) and \(3,\)"),
        ({"hidden": torch.zeros(2, 4).long()}, "must be floating point, got torch.int64"),
        ({"bias": torch.zeros(4, device="meta")}, "hidden is on cpu, bias on meta"),
        ({"backend": "cpp"}, "no cpp implementation"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"gelu: .*{message}"):
        ops.gelu(**({"hidden": torch.zeros(2, 4), "bias": torch.zeros(4)} | change))
