"""projection_stats against moments of a stored map in float64, hand-computed values, and statistics of BatchNorm2d."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muse_fast import ops
from muse_fast.kernels.blocked import projection_stats as blocked
from muse_fast.ops import backends
from tests.support.agreement import FLOOR, GRADIENT_CAP, LOSS_CAP, assert_as_exact_as_eager

pytestmark = pytest.mark.usefixtures("deterministic")

needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels; on the CPU they are interpreted
triton = pytest.param("triton", marks=needs_triton)
ALL = ["reference", "blocked", triton]
FAST = ["blocked", triton]

SIZES = {  # images, channels, height, width, outputs
    "one_position": (1, 3, 1, 1, 2),
    "one_channel": (2, 1, 5, 3, 1),
    "odd": (3, 5, 7, 11, 6),
    "two_blocks_of_outputs": (2, 33, 6, 5, 70),
    "many_small_images": (7, 4, 3, 3, 17),
    "many_channels": (2, 150, 3, 5, 9),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


def make_case(
    images: int, channels: int, height: int, width: int, outputs: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Make a map with a nonzero mean, as after a ReLU, and a weight."""
    x = torch.randn(images, channels, height, width, dtype=torch.float64) + 0.5
    weight = torch.randn(outputs, channels, dtype=torch.float64) / channels**0.5
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def learn(op: Callable[..., tuple[Tensor, Tensor]], x: Tensor, weight: Tensor, **options: Any) -> list[Tensor]:
    """Return mean, variance, and the gradients for x and weight of a weighted sum of both."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    mean, var = op(x, weight, **options)
    pull = torch.linspace(0.5, 1.5, len(mean), dtype=mean.dtype, device=mean.device)
    (mean * pull - var * pull.flip(0)).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return [mean.detach(), var.detach(), x.grad, weight.grad]


def by_moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Store y in float64, take its mean, then the mean square of the residual."""
    y = torch.einsum("ichw,oc->oihw", x.double(), weight.double()).flatten(1)
    mean = y.mean(1)
    return mean, (y - mean.unsqueeze(1)).square().mean(1)


@pytest.mark.parametrize("backend", ALL)
@layouts
def test_equals_hand_computed_values(layout: torch.memory_format, backend: str) -> None:
    """y = x0 + 2 x1 = 1, 3, 5, 7: mean 4, variance 5; dy = (1 + 2 (y - 4)) / 4 with gradients 1 and 1."""
    x = torch.tensor([[[[1.0, 1.0, 5.0, 1.0]], [[0.0, 1.0, 0.0, 3.0]]]], device=DEVICE).to(memory_format=layout)
    x, weight = x.requires_grad_(), torch.tensor([[1.0, 2.0]], device=DEVICE, requires_grad=True)
    mean, var = ops.projection_stats(x, weight, backend=backend)
    assert (mean.tolist(), var.tolist()) == ([4.0], [5.0])
    (mean + var).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.flatten().tolist() == [-1.25, -0.25, 0.75, 1.75, -2.5, -0.5, 1.5, 3.5]
    assert weight.grad.flatten().tolist() == [-1.25 - 0.25 + 0.75 * 5 + 1.75, -0.25 + 1.75 * 3]


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("size", SIZES)
@layouts
def test_float64_equals_the_moments_of_the_stored_map(layout: torch.memory_format, size: str, backend: str) -> None:
    x, weight = make_case(*SIZES[size])
    expected = learn(by_moments, x, weight)
    got = learn(ops.projection_stats, x.to(memory_format=layout), weight, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ALL)
def test_equals_the_running_statistics_of_batch_norm(backend: str) -> None:
    x, weight = make_case(3, 5, 7, 11, 6, dtype=torch.float32)
    norm = nn.BatchNorm2d(6, momentum=1.0, device=DEVICE, dtype=torch.float64)
    norm(nn.functional.conv2d(x.double(), weight.double()[:, :, None, None]))
    mean, var = ops.projection_stats(x, weight, backend=backend)
    count = x.numel() // x.shape[1]
    unbiased = var * count / (count - 1)
    torch.testing.assert_close(
        [mean.double(), unbiased.double()], [norm.running_mean, norm.running_var], rtol=1e-6, atol=1e-7
    )


def rounded_like(gradient: Tensor, backend: str) -> Tensor:
    """Truncate to bfloat16 on Triton's interpreter, as it does where a GPU rounds."""
    if backend != "triton" or DEVICE == "cuda":
        return gradient
    return (gradient.float().view(torch.int32) & -0x10000).view(torch.float32).double()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", [size for size in SIZES if size != "one_position"])
@layouts
def test_is_as_exact_as_eager(layout: torch.memory_format, size: str, dtype: torch.dtype, backend: str) -> None:
    x, weight = make_case(*SIZES[size], dtype)
    truth = learn(by_moments, x.double(), weight.double())
    if dtype == torch.bfloat16:
        truth[2] = rounded_like(truth[2], backend)
    eager = learn(ops.projection_stats, x, weight, backend="reference")
    got = learn(ops.projection_stats, x.to(memory_format=layout), weight, backend=backend)
    caps = [LOSS_CAP[torch.float32]] * 2 + [GRADIENT_CAP[dtype]] * 2
    assert_as_exact_as_eager(got, eager, truth, caps, FLOOR[dtype])


@pytest.mark.parametrize("backend", FAST)
@layouts
def test_a_mean_far_above_the_deviation_costs_no_digits(layout: torch.memory_format, backend: str) -> None:
    """The mean is 1000 deviations, on a grid with exact float32 products: sums of squares would lose 6 digits."""
    x, _ = make_case(3, 4, 9, 31, 1)
    x = ((x * 64).round() / 64 + 1000).float()
    weight = torch.eye(4, device=DEVICE)
    exact = learn(by_moments, x.double(), weight.double())
    got = learn(ops.projection_stats, x.to(memory_format=layout), weight, backend=backend)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=2e-6, atol=0)
    assert (got[2] - exact[2]).norm() <= 2e-4 * exact[2].norm()
    naive = (x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()).double()
    assert ((naive - exact[1]).abs() > 1e-3 * exact[1]).any()


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs_and_two_runs(backend: str) -> None:
    """A channel slice, swapped sides and a transposed weight: bit-identical to contiguous copies, and repeatable."""
    x, weight = make_case(3, 12, 9, 10, 6, dtype=torch.float32)
    packed = learn(ops.projection_stats, x[:, 4:9].contiguous(), weight[:, :5].contiguous(), backend=backend)
    strided = learn(ops.projection_stats, x[:, 4:9], weight.T.contiguous().T[:, :5], backend=backend)
    for first, second in zip(packed, strided, strict=True):
        assert torch.equal(first, second)
    swapped = learn(ops.projection_stats, x.mT.contiguous().mT, weight, backend=backend)
    for first, second in zip(learn(ops.projection_stats, x, weight, backend=backend), swapped, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", FAST)
@layouts
def test_gradient_has_the_layout_of_the_map(layout: torch.memory_format, backend: str) -> None:
    x, weight = make_case(3, 5, 4, 6, 2, dtype=torch.float32)
    gradient = learn(ops.projection_stats, x.to(memory_format=layout), weight, backend=backend)[2]
    assert gradient.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", FAST)
@layouts
def test_65536_images_of_4_positions(layout: torch.memory_format, backend: str) -> None:
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("too large for Triton's interpreter")
    x, weight = make_case(65536, 16, 2, 2, 16, dtype=torch.float32)
    truth = learn(by_moments, x.double(), weight.double())
    eager = learn(ops.projection_stats, x, weight, backend="reference")
    got = learn(ops.projection_stats, x.to(memory_format=layout), weight, backend=backend)
    caps = [LOSS_CAP[torch.float32]] * 2 + [GRADIENT_CAP[torch.float32]] * 2
    assert_as_exact_as_eager(got, eager, truth, caps, FLOOR[torch.float32])


def test_blocks_split_and_join_images() -> None:
    x = torch.zeros(5, 2, 3, 4)
    assert [tuple(block.shape) for block in blocked.blocks(blocked.positions_of(x))] == [(5, 12, 2)]
    large = torch.zeros(2, 2, 1, 5000)
    assert [block.shape[1] for block in blocked.blocks(blocked.positions_of(large))] == [4096, 904, 4096, 904]


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradcheck(backend: str) -> None:
    x, weight = (tensor.cpu().requires_grad_() for tensor in make_case(2, 3, 2, 3, 4))
    assert torch.autograd.gradcheck(lambda *arguments: ops.projection_stats(*arguments, backend=backend), (x, weight))


@pytest.mark.parametrize("backend", ALL)
def test_autocast_rounds_only_the_inputs(backend: str) -> None:
    x, weight = make_case(2, 5, 4, 6, 3, dtype=torch.float32)
    expected = ops.projection_stats(x.bfloat16(), weight.bfloat16(), backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = ops.projection_stats(x, weight, backend=backend)
        exact = ops.projection_stats(x.double(), weight.double())
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(exact, by_moments(x, weight), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@layouts
def test_opcheck(layout: torch.memory_format, backend: str) -> None:
    home = {
        "blocked": "muse_fast.kernels.blocked.projection_stats",
        "triton": "muse_fast.kernels.fused.projection_stats",
    }
    implementation = importlib.import_module(home[backend])
    x, weight = make_case(2, 5, 4, 6, 3, dtype=torch.float32)
    x = x.to(memory_format=layout)
    inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.library.opcheck(implementation.projection_stats_fwd, inputs)
    torch.library.opcheck(implementation.projection_stats_fwd, (x[:, :, ::2], weight.T.contiguous().T))
    strided_gradient = torch.ones(1, device=DEVICE).expand(3)
    mean, var = implementation.projection_stats(x, weight)
    torch.library.opcheck(implementation.projection_stats_bwd, (strided_gradient, var, x, weight, mean))
    torch.library.opcheck(implementation.projection_stats_bwd, (mean, strided_gradient, x[:, :, ::2], weight, mean))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool, backend: str) -> None:
    compiled = torch.compile(ops.projection_stats, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for height in (4, 7):
        x, weight = make_case(2, 5, height, 6, 3, dtype=torch.float32)
        expected = learn(ops.projection_stats, x, weight, backend=backend)
        for first, second in zip(learn(compiled, x, weight, backend=backend), expected, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, r"expected x \[I, c, h, w\]"),
        ({"weight": torch.zeros(2, 4)}, r"\(1, 3, 4, 4\) and \(2, 4\)"),
        ({"weight": torch.zeros(2, 3).double()}, "the same floating point dtype, got torch.float32 and torch.float64"),
        ({"x": torch.zeros(1, 3, 4, 4).long(), "weight": torch.zeros(2, 3).long()}, "got torch.int64"),
        ({"weight": torch.zeros(2, 3, device="meta")}, "x is on cpu, weight on meta"),
        ({"x": torch.zeros(0, 3, 4, 4)}, r"must not be empty, got \(0, 3, 4, 4\)"),
        ({"backend": "cpp"}, "no cpp implementation"),
        ({"backend": "fast"}, "unknown backend"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(1, 3, 4, 4), "weight": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=f"projection_stats: .*{message}"):
        ops.projection_stats(**(arguments | change))


@needs_triton
def test_triton_passes_too_many_outputs_on() -> None:
    x, weight = make_case(1, 3, 2, 2, 257, dtype=torch.float32)
    ours, expected = (ops.projection_stats(x, weight, backend=backend) for backend in ("triton", "blocked"))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
