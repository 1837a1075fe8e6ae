"""batch_norm against its equations in float64, torch's own operators, and hand-computed values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_fast import ops
from muse_fast.ops import backends
from tests.support.agreement import FLOOR, GRADIENT_CAP, assert_as_exact_as_eager

pytestmark = pytest.mark.usefixtures("deterministic")

needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels; on the CPU they are interpreted
triton = pytest.param("triton", marks=needs_triton)
ALL = ["reference", triton]
MOMENTUM, EPS = 0.1, 1e-5

SHAPES = {
    "one_channel": (5, 1, 3, 3),
    "one_pixel": (40, 3, 1, 1),
    "rows": (70, 5),
    "not_square": (2, 48, 3, 7),
    "blocks_of_channels": (2, 96, 5, 5),
    "wide_blocks": (2, 128, 4, 4),
    "odd": (2, 193, 3, 3),
}
FORMS = {"norm": (False, False), "relu": (False, True), "add": (True, False), "add_relu": (True, True)}
forms = pytest.mark.parametrize("form", FORMS)
LAYOUTS = [torch.channels_last, torch.contiguous_format]


class Inputs(dict[str, Any]):
    """The tensors by name, as the op takes them; the first four get gradients."""

    def to(self, dtype: torch.dtype, others: torch.dtype | None = None) -> Inputs:
        """Maps in ``dtype``, parameters and statistics in ``others``; a copy, since statistics change."""
        return Inputs(
            {
                k: v
                if v is None
                else v.detach().to(DEVICE, dtype if k in ("x", "residual") else others or dtype).clone()
                for k, v in self.items()
                if k != "num_batches"
            }
            | {"num_batches": torch.tensor(3, device=DEVICE)}
        )


def make_case(shape: tuple[int, ...], form: str) -> Inputs:
    """Channels of different means and deviations; float64 values exact in bfloat16."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).bfloat16().double()

    channels = shape[1]
    scale = torch.linspace(0.5, 3, channels, dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    return Inputs(
        x=(draw(*shape) * scale + 2 * scale).bfloat16().double(),
        residual=draw(*shape) if FORMS[form][0] else None,
        weight=draw(channels) / 2 + 1,
        bias=draw(channels),
        running_mean=draw(channels),
        running_var=draw(channels).abs() + 0.5,
    )


def by_equations(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """In the dtype of x, from sums alone."""
    rows = x.movedim(1, -1).flatten(0, -2)
    mean = rows.sum(0) / len(rows)
    squares = ((rows - mean) ** 2).sum(0)
    with torch.no_grad():
        running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
        running_var.copy_((1 - momentum) * running_var + momentum * squares / (len(rows) - 1))
    y = (x.movedim(1, -1) - mean) / (squares / len(rows) + eps).sqrt() * weight + bias
    y = y.movedim(-1, 1) if residual is None else y.movedim(-1, 1) + residual
    return y.clamp(min=0) if relu else y


def learn(op: Callable[..., Tensor], inputs: Inputs, form: str, **options: Any) -> list[Tensor]:
    """Return the result, the gradients of a weighted sum of it, and the running statistics."""
    inputs = Inputs({k: v if v is None else v.clone() for k, v in inputs.items()})
    for name in ("x", "residual", "weight", "bias"):
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    out = op(**inputs, momentum=MOMENTUM, eps=EPS, relu=FORMS[form][1], **options)
    pull = torch.linspace(-1, 1.5, out.numel(), dtype=torch.float64, device=out.device).sin().bfloat16()
    out.backward(pull.view(out.shape).to(out.dtype))
    leaves = [v for v in inputs.values() if v is not None and v.requires_grad]
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves)
    return [out.detach(), *gradients, inputs["running_mean"], inputs["running_var"]]


@pytest.mark.parametrize("backend", ALL)
def test_equals_hand_computed_values(backend: str) -> None:
    """x = (1, 3) has mean 2 and deviation 1, so y = relu(3 (-1, 1) + 1 + (1, 2)) = relu(-1, 6).

    Its unbiased variance is 2, half of which is added to half of the old one.
    """
    x, residual, weight, bias = (
        torch.tensor(values, device=DEVICE).view(-1, 1).requires_grad_()
        for values in ([1.0, 3.0], [1.0, 2.0], [3.0], [1.0])
    )
    weight, bias = weight.detach()[0].requires_grad_(), bias.detach()[0].requires_grad_()
    running = [torch.tensor([value], device=DEVICE) for value in (0.0, 5.0)]
    count = torch.tensor(6, device=DEVICE)
    y = ops.batch_norm(x, residual, weight, bias, *running, count, 0.5, 1e-12, True, backend=backend)
    assert y.tolist() == [[0.0], [6.0]]
    assert [tensor.item() for tensor in (*running, count)] == [1.0, 3.5, 7]
    (y * torch.tensor([[100.0], [7.0]], device=DEVICE)).sum().backward()
    gradients = [leaf.grad.flatten().tolist() for leaf in (x, residual, weight, bias) if leaf.grad is not None]
    assert gradients == [[0.0, 0.0], [0.0, 7.0], [7.0], [7.0]]


@pytest.mark.parametrize("shape", SHAPES)
@forms
def test_float64_equals_the_equations(form: str, shape: str) -> None:
    inputs = make_case(SHAPES[shape], form).to(torch.float64)
    expected, got = learn(by_equations, inputs, form), learn(ops.batch_norm, inputs, form)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@forms
def test_is_as_exact_as_eager(form: str, shape: str) -> None:
    inputs = make_case(SHAPES[shape], form)
    truth = learn(by_equations, inputs.to(torch.float64), form)
    eager, got = (
        learn(ops.batch_norm, inputs.to(torch.float32), form, backend=backend) for backend in ("reference", "triton")
    )
    caps = [GRADIENT_CAP[torch.float32]] * len(got)
    assert_as_exact_as_eager(got, eager, truth, caps, FLOOR[torch.float32])


@needs_triton
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", ["one_pixel", "blocks_of_channels"])
@forms
def test_16_bits_are_rounded_once(form: str, shape: str, dtype: torch.dtype, unit: float) -> None:
    """With parameters in float32. Triton's interpreter truncates to bf16 where a GPU rounds."""
    inputs = make_case(SHAPES[shape], form)
    truth = learn(by_equations, inputs.to(torch.float64), form)
    got = learn(ops.batch_norm, inputs.to(dtype, torch.float32), form, backend="triton")
    maps = 3 if FORMS[form][0] else 2
    assert [one.dtype for one in got] == [dtype] * maps + [torch.float32] * 4
    for place, (ours, exact) in enumerate(zip(got, truth, strict=True)):
        allowed = (unit if place < maps else 2e-6) * exact.abs() + 1e-6 * (1 + exact.abs().max())
        assert ((ours.double() - exact).abs() <= allowed).all(), f"tensor {place}"


@needs_triton
@forms
def test_layouts_and_two_runs(form: str) -> None:
    """Each layout is kept, forward and backward; all give the same bits, as do maps and gradients with gaps."""
    inputs, results = make_case((3, 33, 4, 5), form).to(torch.float32), []
    for layout in [*LAYOUTS, *LAYOUTS]:
        given = Inputs(inputs)
        for name in ("x", "residual"):
            given[name] = inputs[name] if inputs[name] is None else inputs[name].to(memory_format=layout)
        results.append(learn(ops.batch_norm, given, form, backend="triton"))
        assert all(one.is_contiguous(memory_format=layout) for one in results[-1] if one.dim() == 4)
    wide = torch.cat([inputs["x"], inputs["x"]], dim=1)
    given = Inputs(inputs, x=wide[:, :33])

    def apart(**arguments: Any) -> Tensor:
        return ops.batch_norm(**arguments).transpose(2, 3)

    for one in results[1:]:
        assert all(map(torch.equal, one, results[0]))
    transposed = learn(apart, inputs, form, backend="triton")
    assert all(map(torch.equal, learn(apart, given, form, backend="triton"), transposed))
    assert torch.equal(transposed[0], results[0][0].transpose(2, 3))


@needs_triton
@pytest.mark.parametrize("programs", [1, 7])
@forms
def test_runs_of_several_tiles(form: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are more tiles than programs; the last run is not full."""
    from muse_fast.kernels.fused import batch_norm as fused

    inputs = make_case((7, 35, 7, 7), form)
    truth = learn(by_equations, inputs.to(torch.float64), form)
    monkeypatch.setattr(fused, "PROGRAMS", programs)
    for block_runs in (2, 128):
        monkeypatch.setattr(fused, "BLOCK_RUNS", block_runs)
        got = learn(ops.batch_norm, inputs.to(torch.float32), form, backend="triton")
        for ours, exact in zip(got, truth, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-6 * (1 + exact.abs().max().item()))


@needs_triton
@pytest.mark.parametrize("kind", ["one_mean", "runs_apart"])
def test_a_mean_far_above_the_deviation_costs_no_digits(kind: str) -> None:
    """Values on a grid around 1000, or of which the first run is around -1000: E[x^2] - E[x]^2 loses 6 digits."""
    x = (torch.randn(400, 3, dtype=torch.float64) * 64).round() / 64 + 1000
    if kind == "runs_apart":
        x[:64] -= 2000
    inputs = Inputs(make_case((400, 3), "norm"), x=x)
    exact, got = (
        learn(by_equations, inputs.to(torch.float64), "norm"),
        learn(ops.batch_norm, inputs.to(torch.float32), "norm", backend="triton"),
    )
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    torch.testing.assert_close(got[-1].double(), exact[-1], rtol=1e-6, atol=0)


@needs_triton
@forms
def test_a_residual_in_float32_beside_bf16(form: str) -> None:
    """The sum is float32, as torch's; gradients arrive in the dtypes of the inputs."""
    inputs = make_case((4, 6, 3, 3), form)
    truth = learn(by_equations, inputs.to(torch.float64), form)[0]
    given = inputs.to(torch.float32)
    given["x"] = given["x"].bfloat16()
    got = learn(ops.batch_norm, given, form, backend="triton")
    assert got[0].dtype == (torch.float32 if FORMS[form][0] else torch.bfloat16)
    assert [one.dtype for one in got[1:-4]] == [torch.bfloat16, torch.float32][: len(got) - 5]
    if FORMS[form][0]:
        torch.testing.assert_close(got[0].double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_without_parameters_and_statistics(backend: str) -> None:
    inputs = make_case((9, 4), "relu").to(torch.float32)
    x = inputs["x"].requires_grad_()
    y = ops.batch_norm(x, *[None] * 6, MOMENTUM, EPS, True, backend=backend)
    (y * y).sum().backward()
    twin = inputs["x"].detach().double().requires_grad_()
    exact = ((twin - twin.mean(0)) / (twin.var(0, correction=0) + EPS).sqrt()).relu()
    (exact * exact).sum().backward()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(x.grad.double(), twin.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ALL)
@forms
def test_nan_stays_nan(form: str, backend: str) -> None:
    """In every value of its channel; ReLU does not hide it."""
    inputs = make_case((6, 3), form).to(torch.float32)
    inputs["x"][2, 1] = torch.nan
    y = ops.batch_norm(**inputs, momentum=MOMENTUM, eps=EPS, relu=FORMS[form][1], backend=backend)
    assert y.isnan().all(0).tolist() == y.isnan().any(0).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", ALL)
@forms
def test_inference_mode_updates_the_statistics(form: str, backend: str) -> None:
    """As for a teacher."""
    inputs = make_case((6, 3), form).to(torch.float32)
    expected = learn(ops.batch_norm, inputs, form, backend=backend)
    with torch.inference_mode():
        y = ops.batch_norm(**inputs, momentum=MOMENTUM, eps=EPS, relu=FORMS[form][1], backend=backend)
    assert torch.equal(y, expected[0])
    assert torch.equal(inputs["running_var"], expected[-1])
    assert inputs["num_batches"].item() == 4


@pytest.mark.parametrize("backend", ALL)
def test_autocast_changes_nothing(backend: str) -> None:
    inputs = make_case((9, 4, 2, 2), "add_relu").to(torch.bfloat16, torch.float32)
    expected = learn(ops.batch_norm, inputs, "add_relu", backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = learn(ops.batch_norm, inputs, "add_relu", backend=backend)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@forms
def test_gradcheck(form: str) -> None:
    inputs = make_case((3, 2, 2, 2), form)
    leaves = [v if v is None else v.requires_grad_() for v in list(inputs.values())[:4]]
    rest = *[None] * 3, MOMENTUM, EPS, FORMS[form][1]
    assert torch.autograd.gradcheck(lambda *args: ops.batch_norm(*args, *rest), tuple(leaves))


@needs_triton
@pytest.mark.parametrize(
    ("form", "layout"),
    [("norm", LAYOUTS[1]), ("relu", LAYOUTS[0]), ("add_relu", LAYOUTS[0])],
    ids=["norm-nchw", "relu-nhwc", "add_relu-nhwc"],
)
def test_opcheck(form: str, layout: torch.memory_format) -> None:
    from muse_fast.kernels.fused import batch_norm as fused

    inputs = make_case((3, 5, 2, 3), form).to(torch.bfloat16, torch.float32)
    x, residual = (v if v is None else v.to(memory_format=layout) for v in (inputs["x"], inputs["residual"]))
    running = inputs["running_mean"], inputs["running_var"], inputs["num_batches"]
    torch.library.opcheck(fused.batch_moments, (x, *running, MOMENTUM))
    torch.library.opcheck(fused.batch_moments, (x[:0], None, None, None, MOMENTUM))
    moments = fused.batch_moments(x, None, None, None, MOMENTUM)
    has_residual, relu = FORMS[form]
    leaves = [v if v is None else v.requires_grad_() for v in (x, residual, inputs["weight"], inputs["bias"])]
    torch.library.opcheck(fused.batch_norm_fwd, (*leaves[:2], moments, *leaves[2:], EPS, relu))
    saved = [v.detach() for v in (x, inputs["weight"], inputs["bias"])]
    y = fused.batch_norm_fwd(saved[0], None, moments, *saved[1:], EPS, relu) if has_residual and relu else None
    strided = torch.ones(1, 1, 1, 3, dtype=torch.bfloat16, device=DEVICE).expand(x.shape)
    torch.library.opcheck(fused.batch_norm_bwd, (strided, saved[0], y, moments, *saved[1:], EPS, relu))


@needs_triton
@pytest.mark.parametrize(
    ("form", "dynamic"), [("norm", False), ("add_relu", True)], ids=["norm-static", "add_relu-dynamic"]
)
def test_compiles_without_a_graph_break(form: str, dynamic: bool) -> None:
    torch.compiler.reset()  # other forms count towards the limit of recompilations
    compiled = torch.compile(ops.batch_norm, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for images in (2, 3):
        inputs = make_case((images, 9, 3, 3), form).to(torch.float32)
        expected = learn(ops.batch_norm, inputs, form, backend="triton")
        for first, second in zip(learn(compiled, inputs, form, backend="triton"), expected, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (1, 4, 1, 1), (0, 4, 3, 3), (3, 4, 0, 2), (3, 0)], ids=str)
def test_a_variance_needs_two_values(shape: tuple[int, ...], backend: str) -> None:
    inputs = make_case(shape, "norm").to(torch.float32)
    with pytest.raises(ValueError, match="expected at least two values per channel"):
        ops.batch_norm(**inputs, momentum=MOMENTUM, eps=EPS, relu=False, backend=backend)
    assert inputs["num_batches"].item() == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 3)}, r"expected x \[N, C\] or \[N, C, h, w\] floating point, got \[2, 4, 3\]"),
        ({"x": torch.zeros(2, 4).long()}, r"got \[2, 4\] torch.int64"),
        ({"residual": torch.zeros(2, 1)}, r"residual must be \[2, 4\] floating point, got \[2, 1\]"),
        ({"bias": torch.zeros(3)}, r"bias must be \[4\] floating point, got \[3\]"),
        ({"bias": None}, "give both weight and bias, or None for both"),
        ({"running_var": None}, "give running_mean, running_var, num_batches, or None for all"),
        ({"num_batches": torch.tensor(1.0)}, r"num_batches must be \[\] int64, got \[\] torch.float32"),
        ({"weight": torch.ones(4, device="meta")}, "x is on cpu, weight on meta"),
        ({"backend": "cpp"}, "no cpp implementation"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.ones(4) for name in ("weight", "bias", "running_mean", "running_var")}
    arguments |= {"x": torch.zeros(2, 4), "residual": None, "num_batches": torch.tensor(0)}
    with pytest.raises(ValueError, match=f"batch_norm: .*{message}"):
        ops.batch_norm(**(arguments | change), momentum=MOMENTUM, eps=EPS, relu=True)
