"""add_layer_norm against its equations in float64, torch's own operators, and hand-computed values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_fast import ops
from muse_fast.ops import backends
from tests.support.agreement import FLOOR, GRADIENT_CAP, LOSS_CAP, assert_as_exact_as_eager

pytestmark = pytest.mark.usefixtures("deterministic")

needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels; on the CPU they are interpreted
triton = pytest.param("triton", marks=needs_triton)
ALL = ["reference", triton]
EPS = 1e-6

SIZES = {  # rows, columns
    "one_value": (1, 1),
    "one_row": (1, 37),
    "one_column": (5, 1),
    "odd": (67, 35),
    "power_of_two": (16, 64),
    "vit_small": (9, 384),
    "wider_than_a_tile": (3, 2500),
    "several_tiles": (150, 24),
}
FORMS = {  # branch, scale, branch_bias
    "add": (True, False, False),
    "scaled": (True, True, True),
    "norm_only": (False, False, False),
}
forms = pytest.mark.parametrize("form", FORMS)


class Inputs(dict[str, Any]):
    """The arguments by name; those that get a gradient are leaves."""

    def to(self, **dtypes: torch.dtype) -> Inputs:
        return Inputs(
            {k: None if v is None else v.detach().to(DEVICE, dtypes.get(k, dtypes["rest"])) for k, v in self.items()}
        )


def make_case(rows: int, columns: int, form: str) -> Inputs:
    """A stream with a mean, branches of images that are dropped, kept and doubled; float64 values exact in bfloat16."""
    has_branch, has_scale, has_bias = FORMS[form]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).bfloat16().double()

    return Inputs(
        x=draw(rows, columns) * 2 + 0.5,
        branch=draw(rows, columns) if has_branch else None,
        scale=torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)[torch.arange(rows) % 3, None] if has_scale else None,
        weight=draw(columns) / 2 + 1,
        bias=draw(columns),
        branch_bias=draw(columns) if has_bias else None,
    )


def by_equations(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None,
) -> Any:
    """In the dtype of x, from sums alone."""
    if branch is not None and branch_bias is not None:
        branch = branch + branch_bias - branch_bias.detach()  # it is in the branch already
    total = x if branch is None else x + (1 if scale is None else scale) * branch
    centred = total - total.sum(1, keepdim=True) / total.shape[1]
    variance = (centred * centred).sum(1, keepdim=True) / total.shape[1]
    return total, centred / (variance + eps).sqrt() * weight + bias


def learn(op: Callable[..., Any], inputs: Inputs, eps: float = EPS, **options: Any) -> list[Tensor]:
    """Return both results and all gradients of a weighted sum of both."""
    leaves = {k: v if v is None or k == "scale" else v.detach().requires_grad_() for k, v in inputs.items()}
    total, normed = op(**leaves, eps=eps, **options)
    pulls = [torch.linspace(-1, 1.5, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in (total, normed)]
    ((total * pulls[0]).sum() + (normed * pulls[1].flip(0)).sum()).backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf is not None and leaf.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return [total.detach(), normed.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("backend", ALL)
def test_equals_hand_computed_values(backend: str) -> None:
    """t = (1, 3) + 2 (1, 1) = (3, 5): mean 4, deviation 1 without epsilon, so n = w (-1, 1) + b.

    No change of two values changes their norm, so only the gradient of t itself arrives at the inputs.
    """
    x = torch.tensor([[1.0, 3.0]], device=DEVICE, requires_grad=True)
    branch = torch.tensor([[1.0, 1.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([3.0, 0.5], device=DEVICE, requires_grad=True)
    bias = torch.tensor([10.0, 20.0], device=DEVICE, requires_grad=True)
    total, normed = ops.add_layer_norm(
        x, branch, torch.tensor([[2.0]], device=DEVICE), weight, bias, 0.0, backend=backend
    )
    assert (total.tolist(), normed.tolist()) == ([[3.0, 5.0]], [[7.0, 20.5]])
    (normed[0, 0] + 7 * total[0, 1]).backward()
    gradients = [leaf.grad.tolist() for leaf in (x, branch, weight, bias) if leaf.grad is not None]
    assert gradients == [[[0.0, 7.0]], [[0.0, 14.0]], [-1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("size", SIZES)
@forms
def test_float64_equals_the_equations(form: str, size: str) -> None:
    inputs = make_case(*SIZES[size], form).to(rest=torch.float64)
    expected, got = learn(by_equations, inputs), learn(ops.add_layer_norm, inputs)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def rounded_like(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Truncate to bfloat16 on Triton's interpreter, as it does where a GPU rounds."""
    if dtype != torch.bfloat16 or DEVICE == "cuda":
        return value
    return (value.float().view(torch.int32) & -0x10000).view(torch.float32).double()


@needs_triton
@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [size for size in SIZES if not size.startswith("one_")])
@forms
def test_is_as_exact_as_eager(form: str, size: str, branch: torch.dtype) -> None:
    """A float32 stream, as in training."""
    inputs = make_case(*SIZES[size], form)
    given = inputs.to(branch=branch, rest=torch.float32)
    truth = learn(by_equations, inputs.to(rest=torch.float64))
    eager, got = (learn(ops.add_layer_norm, given, backend=backend) for backend in ("reference", "triton"))
    has_branch, _, has_bias = FORMS[form]
    dtypes = [*[torch.float32] * 3, *[branch] * has_branch, *[torch.float32] * (2 + has_bias)]
    truth = [rounded_like(value, dtype) for value, dtype in zip(truth, dtypes, strict=True)]
    caps = [LOSS_CAP[torch.float32]] * 2 + [GRADIENT_CAP[dtype] for dtype in dtypes[2:]]
    assert_as_exact_as_eager(got, eager, truth, caps, FLOOR[torch.float32])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@forms
def test_a_stream_of_16_bits(form: str, dtype: torch.dtype) -> None:
    """The sum is rounded once, and the norm is that of the rounded sum: both as torch does."""
    inputs = make_case(33, 35, form).to(rest=dtype)
    eager, got = (ops.add_layer_norm(**inputs, eps=EPS, backend=backend) for backend in ("reference", "triton"))
    for ours, theirs in zip(got, eager, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=2**-6 if dtype == torch.bfloat16 else 2**-9, atol=1e-2)


@pytest.mark.parametrize("backend", ALL)
def test_a_mean_far_above_the_deviation_costs_no_digits(backend: str) -> None:
    """Rows on a grid around 1000: E[t^2] - E[t]^2 would lose 6 digits."""
    inputs = make_case(7, 96, "norm_only")
    inputs["x"] = (torch.randn(7, 96, dtype=torch.float64) * 64).round() / 64 + 1000
    exact = by_equations(**inputs.to(rest=torch.float64), eps=EPS)[1]
    got = ops.add_layer_norm(**inputs.to(rest=torch.float32), eps=EPS, backend=backend)[1]
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ALL)
@forms
def test_autocast_casts_the_norm_and_not_the_stream(form: str, backend: str) -> None:
    """So the result is the norm in float32, rounded; and gradients arrive in the dtypes of the inputs."""
    inputs = make_case(9, 35, form).to(branch=torch.bfloat16, rest=torch.float32)
    total, normed = ops.add_layer_norm(**inputs, eps=EPS, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        rounded_total, rounded = ops.add_layer_norm(**inputs, eps=EPS, backend=backend)
        learned = learn(ops.add_layer_norm, inputs, backend=backend)
        double = ops.add_layer_norm(**inputs.to(rest=torch.float64), eps=EPS)[1]
    assert torch.equal(total, rounded_total)
    assert rounded.dtype == torch.bfloat16
    expected = normed.double() if backend == "triton" and DEVICE == "cpu" else normed.bfloat16().double()
    torch.testing.assert_close(rounded.double(), rounded_like(expected, torch.bfloat16), rtol=0, atol=0)
    has_branch, _, has_bias = FORMS[form]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, *[torch.bfloat16] * has_branch]
    assert [one.dtype for one in learned] == [*dtypes, *[torch.float32] * (2 + has_bias)]
    assert double.dtype == torch.float64


@pytest.mark.parametrize("backend", ALL)
def test_without_a_branch_the_stream_is_x_itself(backend: str) -> None:
    inputs = make_case(3, 8, "norm_only").to(rest=torch.float32)
    assert ops.add_layer_norm(**inputs, eps=EPS, backend=backend)[0] is inputs["x"]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("used", [0, 1], ids=["only_the_sum", "only_the_norm"])
@forms
def test_one_result_may_be_unused(form: str, used: int, backend: str) -> None:
    """As the sum after the last layer; its gradient is then not computed with zeros but left out."""
    inputs = make_case(6, 10, form)
    results = []
    for op, given in (
        (by_equations, inputs.to(rest=torch.float64)),
        (ops.add_layer_norm, inputs.to(rest=torch.float32)),
    ):
        leaves = [v.requires_grad_() for k, v in given.items() if v is not None and k != "scale"]
        options = {"backend": backend} if op is ops.add_layer_norm else {}
        out = op(**given, eps=EPS, **options)[used]
        (out * torch.linspace(-1, 2, 60, dtype=out.dtype, device=DEVICE).view(6, 10)).sum().backward()
        results.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("rows", [0, 3])
@forms
def test_no_rows(form: str, rows: int, backend: str) -> None:
    inputs = make_case(rows, 8, form).to(rest=torch.float32)
    learned = learn(ops.add_layer_norm, inputs, backend=backend)
    assert all(one.isfinite().all() for one in learned)
    assert [tuple(one.shape) for one in learned[:2]] == [(rows, 8)] * 2
    if not rows:
        assert not any(one.any() for one in learned)


@needs_triton
def test_strided_inputs_and_two_runs() -> None:
    """Columns of a wider matrix, and gradients that are expanded: bit-identical to contiguous copies."""
    inputs = make_case(50, 24, "scaled").to(rest=torch.float32)
    strided = Inputs({k: v.repeat_interleave(2, dim=-1)[..., ::2] for k, v in inputs.items()})
    first, second, copies = (learn(ops.add_layer_norm, x, backend="triton") for x in (strided, strided, inputs))
    for a, b, c in zip(first, second, copies, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@needs_triton
@pytest.mark.parametrize("runs", [1, 2])
def test_runs_of_several_tiles(runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with more tiles than programs: gradients of rows are the same, those of weight and bias but for the order."""
    from muse_fast.kernels.fused import add_layer_norm as fused

    inputs = make_case(150, 24, "scaled").to(rest=torch.float32)
    expected = learn(ops.add_layer_norm, inputs, backend="triton")
    monkeypatch.setattr(fused, "RUNS", runs)
    got = learn(ops.add_layer_norm, inputs, backend="triton")
    for ours, theirs in zip(got[:4], expected[:4], strict=True):
        assert torch.equal(ours, theirs)
    assert len(got) == 7
    torch.testing.assert_close(got[4:], expected[4:], rtol=1e-5, atol=1e-4)


@forms
def test_gradcheck(form: str) -> None:
    inputs = make_case(4, 5, form)
    leaves = {k: v if v is None or k == "scale" else v.requires_grad_() for k, v in inputs.items()}
    branch_bias = leaves.pop("branch_bias")
    assert torch.autograd.gradcheck(lambda *args: ops.add_layer_norm(*args, EPS), tuple(leaves.values()))
    if branch_bias is not None:  # its values change nothing
        by_op = learn(ops.add_layer_norm, inputs)[-1]
        torch.testing.assert_close(by_op, learn(by_equations, inputs)[-1], rtol=1e-9, atol=1e-9)


@needs_triton
@forms
def test_opcheck(form: str) -> None:
    from muse_fast.kernels.fused import add_layer_norm as fused

    inputs = make_case(5, 7, form).to(branch=torch.bfloat16, rest=torch.float32)
    order = ("x", "branch", "scale", "branch_bias", "weight", "bias")
    leaves = [inputs[k] if inputs[k] is None or k == "scale" else inputs[k].requires_grad_() for k in order]
    torch.library.opcheck(fused.add_layer_norm_fwd, (*leaves, EPS, torch.bfloat16))
    total, _, stats = fused.add_layer_norm_fwd(*(None if v is None else v.detach() for v in leaves), EPS, None)
    total = inputs["x"].detach() if form == "norm_only" else total
    strided = torch.ones(1, 7, device=DEVICE).expand(5, 7)
    saved = total, stats, inputs["weight"].detach(), inputs["scale"]
    of_branch = torch.bfloat16 if FORMS[form][0] else None
    for of_total in (None, strided):
        dtypes = torch.float32, of_branch, FORMS[form][2]
        torch.library.opcheck(fused.add_layer_norm_bwd, (of_total, strided, *saved, *dtypes))


@needs_triton
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@forms
def test_compiles_without_a_graph_break(form: str, dynamic: bool) -> None:
    torch.compiler.reset()  # other forms count towards the limit of recompilations
    compiled = torch.compile(ops.add_layer_norm, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 7):
        inputs = make_case(rows, 9, form).to(rest=torch.float32)
        expected = learn(ops.add_layer_norm, inputs, backend="triton")
        for first, second in zip(learn(compiled, inputs, backend="triton"), expected, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"expected x \[M, C\]"),
        ({"bias": torch.zeros(3)}, r"got \(2, 4\), \(4,\) and \(3,\)"),
        ({"branch": torch.zeros(2, 3)}, r"branch must be \(2, 4\) as x, got \(2, 3\)"),
        ({"scale": torch.zeros(2)}, r"scale must be \[M, 1\] = \(2, 1\) and scales a branch; got \(2,\)"),
        ({"branch": None}, "scales a branch; without a branch"),
        ({"branch_bias": torch.zeros(2, 4)}, r"branch_bias must be \[C\] = \(4,\) .*; got \(2, 4\)"),
        ({"branch": None, "scale": None, "branch_bias": torch.zeros(4)}, "belongs to a branch; without a branch"),
        ({"x": torch.zeros(2, 4).long()}, "x must be floating point, got torch.int64"),
        ({"weight": torch.zeros(4, device="meta")}, "x is on cpu, weight on meta"),
        ({"backend": "cpp"}, "no cpp implementation"),
        ({"backend": "fast"}, "unknown backend"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.zeros(2, 4) for name in ("x", "branch")}
    arguments |= {"scale": torch.ones(2, 1), "weight": torch.ones(4), "bias": torch.zeros(4), "eps": EPS}
    with pytest.raises(ValueError, match=f"add_layer_norm: .*{message}"):
        ops.add_layer_norm(**(arguments | change))


@needs_triton
def test_triton_rejects_rows_that_are_too_wide() -> None:
    inputs = make_case(1, 4097, "add").to(rest=torch.float32)
    with pytest.raises(ValueError, match="add_layer_norm: triton takes at most 4096 columns, got 4097"):
        ops.add_layer_norm(**inputs, eps=EPS, backend="triton")
