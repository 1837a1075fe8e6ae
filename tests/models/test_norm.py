"""BatchNorm over two ranks, compared with torch's BatchNorm of both batches on one rank in float64."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from muse_fast.models.norm import BatchNorm2d, RowBatchNorm, batch_norms, synced_moments, update_running_stats
from muse_fast.ops import backends
from tests.support.ranks import NoHostWait, Ranks, counted_collectives

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))


class Result(NamedTuple):
    outputs: list[Tensor]
    x_grads: list[Tensor]
    parameter_grads: list[Tensor]
    statistics: list[Tensor]
    collectives: list[list[str]]  # in forward, in backward


def make_norm(kind: type[nn.Module], channels: int) -> Any:
    """Create a norm whose parameters and running statistics differ from their initial values."""
    norm: Any = kind(channels)
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    return norm


def step(norms: Sequence[Any], xs: Sequence[Tensor], slopes: Sequence[Tensor], together: bool = True) -> Result:
    """One training step of the loss ``sum(slope * norm(x))``."""
    norms, xs, slopes = copy.deepcopy(norms), list(xs), list(slopes)  # a norm that occurs twice is copied once
    norms = [norm.to(DEVICE) for norm in norms]
    xs = [x.detach().to(DEVICE).requires_grad_() for x in xs]
    with counted_collectives() as forward, NoHostWait():
        outputs = batch_norms(xs, norms) if together else [norm(x) for x, norm in zip(xs, norms, strict=True)]
    with counted_collectives() as backward, NoHostWait():
        torch.autograd.backward(outputs, [slope.to(DEVICE) for slope in slopes])
    distinct = list(dict.fromkeys(norms))
    return Result(
        [y.detach().cpu() for y in outputs],
        [x.grad.cpu() for x in xs if x.grad is not None],
        [parameter.grad.cpu() for norm in distinct for parameter in norm.parameters()],
        [buffer.cpu() for norm in distinct for buffer in norm.buffers()],
        [forward, backward],
    )


def on_two_ranks(
    ranks: Ranks, norms: Sequence[Any], xs: Sequence[Tensor], slopes: Sequence[Tensor], cuts: Sequence[int]
) -> Result:
    """`step` with rows ``[:cut]`` of each group on rank 0 and the others on rank 1; results are concatenated."""
    first = [[tensor[:cut] for tensor, cut in zip(tensors, cuts, strict=True)] for tensors in (xs, slopes)]
    second = [[tensor[cut:] for tensor, cut in zip(tensors, cuts, strict=True)] for tensors in (xs, slopes)]
    a, b = ranks(step, [(norms, *first), (norms, *second)])
    for ours, theirs in zip(a.statistics, b.statistics, strict=True):
        assert torch.equal(ours, theirs)
    assert a.collectives == b.collectives
    return Result(
        [torch.cat(pair) for pair in zip(a.outputs, b.outputs, strict=True)],
        [torch.cat(pair) for pair in zip(a.x_grads, b.x_grads, strict=True)],
        [sum(pair) for pair in zip(a.parameter_grads, b.parameter_grads, strict=True)],
        a.statistics,
        a.collectives,
    )


def truth(norms: Sequence[Any], xs: Sequence[Tensor], slopes: Sequence[Tensor]) -> Result:
    """Result of torch's BatchNorm in float64, group by group."""
    own: dict[int, Any] = {}
    for norm in norms:
        if id(norm) not in own:
            kind = nn.BatchNorm1d if isinstance(norm, nn.BatchNorm1d) else nn.BatchNorm2d
            own[id(norm)] = kind(norm.num_features, affine=norm.affine)
            own[id(norm)].train(norm.training).load_state_dict(norm.state_dict())
    return step(
        [own[id(norm)].double() for norm in norms],
        [x.double() for x in xs],
        [s.double() for s in slopes],
        together=False,
    )


def assert_close(got: Result, expected: Result, **tolerance: float) -> None:
    for ours, theirs in zip(got[:4], expected[:4], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.double(), other.double(), **tolerance)


def parameter_grads(norm: Any, x: Tensor, slope: Tensor) -> tuple[list[Tensor], list[str]]:
    """Parameter gradients for values that need no gradient, and the collectives of the backward."""
    norm = norm.to(DEVICE)
    y = norm(x.to(DEVICE))
    with counted_collectives() as backward:
        y.backward(slope.to(DEVICE))
    return [parameter.grad.cpu() for parameter in norm.parameters()], backward


def three_groups(offset: float = 0.0) -> tuple[list[Any], list[Tensor]]:
    """Maps of two sizes through one norm, and rows through another."""
    shared = make_norm(BatchNorm2d, 5)
    xs = [torch.randn(5, 5, 4, 4), torch.randn(7, 5, 3, 3) * 2 + 1, torch.randn(9, 6)]
    return [shared, shared, make_norm(RowBatchNorm, 6)], [x + offset for x in xs]


@pytest.mark.parametrize("cuts", [(3, 2, 4), (5, 0, 9), (0, 6, 8)], ids=["uneven", "none-on-one", "none-on-other"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_two_ranks_equal_one(two_ranks: Ranks, dtype: torch.dtype, tolerance: float, cuts: tuple[int, ...]) -> None:
    norms, xs = three_groups()
    norms, xs = [norm.to(dtype) for norm in norms], [x.to(dtype) for x in xs]
    slopes = [torch.randn_like(x) for x in xs]
    got = on_two_ranks(two_ranks, norms, xs, slopes, cuts)
    assert all(y.dtype == dtype for y in got.outputs + got.x_grads)
    assert_close(got, truth(norms, xs, slopes), rtol=tolerance, atol=tolerance)


def test_a_large_mean_loses_no_more_precision_than_on_one_rank(two_ranks: Ranks) -> None:
    norms, xs = three_groups(offset=1000.0)
    slopes = [torch.randn_like(x) for x in xs]
    got, exact = on_two_ranks(two_ranks, norms, xs, slopes, (3, 2, 4)), truth(norms, xs, slopes)
    eager = step(norms, xs, slopes)
    for ours, theirs, expected in zip(got[:4], eager[:4], exact[:4], strict=True):
        for one, other, value in zip(ours, theirs, expected, strict=True):
            # float32 rounds such a mean by up to 3e-5; E[y^2] - E[y]^2 would be off by 5 %
            allowed = 1.5 * (other.double() - value).abs().max() + 1e-5 * value.abs().max()
            assert (one.double() - value).abs().max() <= allowed
    for ours, expected in zip(got.statistics, exact.statistics, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-6, atol=0)


def test_bfloat16_is_as_accurate_as_on_one_rank(two_ranks: Ranks) -> None:
    norms, xs = three_groups()
    xs = [x.bfloat16() for x in xs]
    slopes = [torch.randn_like(x) for x in xs]
    got, exact = on_two_ranks(two_ranks, norms, xs, slopes, (3, 2, 4)), truth(norms, xs, slopes)
    eager = step(norms, xs, slopes)
    for ours, theirs, expected in zip(got[:4], eager[:4], exact[:4], strict=True):
        for one, other, value in zip(ours, theirs, expected, strict=True):
            assert one.dtype == other.dtype
            distance = torch.linalg.vector_norm(one.double() - value)
            assert distance <= 1.5 * torch.linalg.vector_norm(other.double() - value) + 1e-6 * value.double().norm()


@pytest.mark.parametrize("groups", [1, 4])
def test_one_collective_each_way_for_any_number_of_groups(two_ranks: Ranks, groups: int) -> None:
    norms = [make_norm(BatchNorm2d, 3 + group) for group in range(groups)]
    xs = [torch.randn(4, 3 + group, 2, 2) for group in range(groups)]
    got = on_two_ranks(two_ranks, norms, xs, xs, [2] * groups)
    assert got.collectives == [["all_gather_into_tensor"], ["all_reduce"]]
    evaluated = on_two_ranks(two_ranks, [norm.eval() for norm in norms], xs, xs, [2] * groups)
    assert evaluated.collectives == [[], []]


def test_values_without_gradient_need_no_collective_in_backward(two_ranks: Ranks) -> None:
    norm, x = make_norm(BatchNorm2d, 5).double(), torch.randn(5, 5, 4, 4, dtype=torch.float64)
    slope = torch.randn_like(x)
    (ours, collectives), (theirs, _) = two_ranks(parameter_grads, [(norm, x[:2], slope[:2]), (norm, x[2:], slope[2:])])
    assert collectives == []
    expected = truth([norm], [x], [slope]).parameter_grads
    torch.testing.assert_close([a + b for a, b in zip(ours, theirs, strict=True)], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", [(1, 0), (0, 1), (0, 0), (1, 1)])
def test_a_statistic_needs_two_rows_over_all_ranks(two_ranks: Ranks, split: tuple[int, int]) -> None:
    norm = make_norm(RowBatchNorm, 6).double()
    x = torch.randn(sum(split), 6, dtype=torch.float64)
    slope = torch.randn_like(x)
    got = on_two_ranks(two_ranks, [norm], [x], [slope], split[:1])
    norm.train(sum(split) == 2)  # the reference
    assert_close(got, truth([norm], [x], [slope]), rtol=1e-12, atol=1e-12)
    if not norm.training:
        assert all(map(torch.equal, got.statistics, norm.buffers()))


def strides(norm: Any, x: Tensor, slope: Tensor) -> list[tuple[int, ...]]:
    result = step([norm], [x], [slope])
    return [result.outputs[0].stride(), result.x_grads[0].stride()]


class Added(NamedTuple):
    """Values, and what is added to them before ReLU."""

    xs: list[Tensor]
    residuals: list[Tensor]


def added_step(norms: Sequence[Any], given: Added, slopes: Sequence[Tensor], kernels: bool) -> Result:
    """`step` with residuals and ReLU; those of the second half of the norms are without a residual.

    Args:
        kernels: whether to run those of `ops.batch_norm`, which are interpreted on the CPU.
    """
    norms = [norm.to(DEVICE) for norm in copy.deepcopy(norms)]
    xs, residuals = ([x.detach().to(DEVICE).requires_grad_() for x in some] for some in given)
    half = len(norms) // 2
    environment = {backends.ENVIRONMENT: "batch_norm=triton"} if kernels else {}
    with mock.patch.dict(os.environ, environment), NoHostWait():
        with counted_collectives() as forward:
            outputs = batch_norms(xs[:half], norms[:half], residuals, relu=True)
            outputs += batch_norms(xs[half:], norms[half:], relu=True)
        with counted_collectives() as backward:
            torch.autograd.backward(outputs, [slope.to(DEVICE) for slope in slopes])
    distinct = list(dict.fromkeys(norms))
    return Result(
        [y.detach().cpu() for y in outputs],
        [x.grad.cpu() for x in (*xs, *residuals) if x.grad is not None],
        [parameter.grad.cpu() for norm in distinct for parameter in norm.parameters()],
        [buffer.cpu() for norm in distinct for buffer in norm.buffers()],
        [forward, backward],
    )


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("cut", [3, 5, 4], ids=["uneven", "none-on-one", "one-value-on-one"])
def test_residuals_and_relu_over_two_ranks(two_ranks: Ranks, cut: int, kernels: bool) -> None:
    """Compared with torch's layers on one rank in float64; on five maps of 4 x 4 and rows, with a mean of 100."""
    if kernels and backends.triton_error() is not None:
        pytest.skip(str(backends.triton_error()))
    norms: list[Any] = [make_norm(BatchNorm2d, 5), make_norm(RowBatchNorm, 6)]
    norms = [*norms, *copy.deepcopy(norms)]
    xs = [torch.randn(5, 5, 4, 4), torch.randn(5, 6)] * 2
    xs = [x + 100 for x in xs]
    residuals, slopes = [torch.randn_like(x) for x in xs[:2]], [torch.randn_like(x) for x in xs]

    def part(rows: slice) -> tuple[Any, ...]:
        given = Added([x[rows] for x in xs], [x[rows] for x in residuals])
        return norms, given, [slope[rows] for slope in slopes], kernels

    a, b = two_ranks(added_step, [part(slice(cut)), part(slice(cut, None))])
    assert a.collectives == b.collectives == [["all_gather_into_tensor"] * 2, ["all_reduce"] * 2]
    exact = added_step(
        [norm.double() for norm in copy.deepcopy(norms)],
        Added([x.double() for x in xs], [x.double() for x in residuals]),
        [slope.double() for slope in slopes],
        kernels=False,
    )
    got = Result(
        [torch.cat(pair) for pair in zip(a.outputs, b.outputs, strict=True)],
        [torch.cat(pair) for pair in zip(a.x_grads, b.x_grads, strict=True)],
        [sum(pair) for pair in zip(a.parameter_grads, b.parameter_grads, strict=True)],
        a.statistics,
        a.collectives,
    )
    assert_close(got, exact, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(a.statistics, b.statistics, strict=True))


@needs_triton
@pytest.mark.parametrize("split", [(1, 0), (0, 1), (1, 1)])
def test_kernels_need_two_rows_over_all_ranks(two_ranks: Ranks, split: tuple[int, int]) -> None:
    norm, x = make_norm(RowBatchNorm, 6), torch.randn(sum(split), 6)
    parts = [
        ([norm], Added([x[rows]], []), [torch.ones_like(x[rows])], True)
        for rows in (slice(split[0]), slice(split[0], None))
    ]
    results = two_ranks(added_step, parts)
    norm.train(sum(split) == 2)
    exact = truth([norm], [x], [torch.ones_like(x)])
    got = torch.cat([result.outputs[0] for result in results])
    torch.testing.assert_close(got.double(), exact.outputs[0].relu(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(results[0].statistics, exact.statistics, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_maps_keep_their_layout(two_ranks: Ranks, layout: torch.memory_format) -> None:
    norm = make_norm(BatchNorm2d, 5)
    x = torch.randn(3, 5, 4, 4).to(memory_format=layout)
    slope = torch.randn(5, 3, 4, 4).transpose(0, 1)  # in another layout
    assert strides(norm, x, slope)[0] == x.stride()
    assert two_ranks(strides, [(norm, x, slope)] * 2) == [[x.stride()] * 2] * 2


@pytest.mark.parametrize("training", [True, False])
def test_one_rank_equals_torch_bit_for_bit(training: bool) -> None:
    norms, xs = three_groups()
    own: list[Any] = [nn.BatchNorm2d(5), nn.BatchNorm1d(6, affine=False)]
    own[0].load_state_dict(norms[0].state_dict())
    own[1].load_state_dict(norms[2].state_dict())
    for norm in (*norms, *own):
        norm.train(training)
    slopes = [torch.randn_like(x) for x in xs]
    expected = step([own[0], own[0], own[1]], xs, slopes, together=False)
    for together in (True, False):
        got = step(norms, xs, slopes, together=together)
        assert got.collectives == [[], []]
        for ours, theirs in zip(got[:4], expected[:4], strict=True):
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_rows_on_one_rank(rows: int) -> None:
    norm = make_norm(RowBatchNorm, 6)
    x = torch.randn(rows, 6)
    got = step([norm], [x], [torch.ones_like(x)])
    expected = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(got.outputs[0], expected)
    assert all(map(torch.equal, got.statistics, norm.buffers()))


def infer(norm: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = norm.to(DEVICE)(x.to(DEVICE)).cpu()
    return torch.stack([y.clone(), norm.running_mean.expand(y.shape).cpu()])


def test_a_teacher_in_inference_mode_uses_the_statistics_of_all_ranks(two_ranks: Ranks) -> None:
    norm, x = make_norm(RowBatchNorm, 6), torch.randn(7, 6)
    y, mean = torch.cat(two_ranks(infer, [(norm, x[:3]), (norm, x[3:])]), dim=1)
    expected = truth([norm], [x], [x])
    torch.testing.assert_close(y.double(), expected.outputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean[0].double(), expected.statistics[0], rtol=1e-5, atol=1e-5)


def moments(xs: Sequence[Tensor], slopes: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Any], list[Tensor], list[Any]]:
    """Synced moments of rows ``[N, C]``, gradients of a loss linear in them, and the collectives."""
    xs = [x.detach().to(DEVICE).requires_grad_() for x in xs]
    local = [torch.var_mean(x, dim=0, correction=0) if len(x) else (x.sum(dim=0), x.sum(dim=0)) for x in xs]
    with counted_collectives() as forward, NoHostWait():
        merged = synced_moments([mean for _, mean in local], [var for var, _ in local], [len(x) for x in xs])
    loss = sum(
        (mean * a.to(DEVICE) + var * b.to(DEVICE)).sum() for (mean, var, _), (a, b) in zip(merged, slopes, strict=True)
    )
    with counted_collectives() as backward:
        loss.backward()
    values = [(mean.detach().cpu(), var.detach().cpu(), int(count)) for mean, var, count in merged]
    return values, [x.grad.cpu() for x in xs if x.grad is not None], [forward, backward]


@pytest.mark.parametrize("cuts", [(4, 1), (0, 5)], ids=["uneven", "none-on-one"])
def test_moments_over_two_ranks_equal_those_of_one(two_ranks: Ranks, cuts: tuple[int, int]) -> None:
    xs = [torch.randn(6, 3, dtype=torch.float64) + 100, torch.randn(5, 2, dtype=torch.float64)]
    slopes = [(torch.randn(x.shape[1], dtype=torch.float64), torch.randn(x.shape[1], dtype=torch.float64)) for x in xs]
    other = [(torch.randn_like(a), torch.randn_like(b)) for a, b in slopes]  # each rank has its own loss
    first = [x[:cut] for x, cut in zip(xs, cuts, strict=True)], slopes
    second = [x[cut:] for x, cut in zip(xs, cuts, strict=True)], other
    ours, theirs = two_ranks(moments, [first, second])
    both = [(a + c, b + d) for (a, b), (c, d) in zip(slopes, other, strict=True)]
    values, grads, collectives = moments(xs, both)
    assert collectives == [[], []]
    assert ours[2] == theirs[2] == [["all_gather_into_tensor"], ["all_reduce"]]
    torch.testing.assert_close(ours[0], values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(theirs[0], values, rtol=1e-12, atol=1e-12)
    joined = [torch.cat(pair) for pair in zip(ours[1], theirs[1], strict=True)]
    torch.testing.assert_close(joined, grads, rtol=1e-12, atol=1e-12)


def test_moments_of_one_rank_are_unchanged() -> None:
    mean, var = torch.randn(3), torch.rand(3)
    merged = synced_moments([mean], [var], [5])
    assert merged[0][0] is mean
    assert merged[0][1] is var
    assert merged[0][2] == 5


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_running_statistics_are_updated_as_in_torch(rows: int, as_tensor: bool) -> None:
    norm = make_norm(nn.BatchNorm1d, 4).double()
    own = copy.deepcopy(norm)
    x = torch.randn(rows, 4, dtype=torch.float64)
    if rows > 1:
        own(x)
    mean = x.mean(dim=0)
    var = (x - mean).square().mean(dim=0)
    update_running_stats(norm, mean, var, torch.tensor(float(rows)) if as_tensor else rows)
    torch.testing.assert_close(norm.state_dict(), own.state_dict(), rtol=1e-14, atol=0)
