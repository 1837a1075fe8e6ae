"""The references' values and gradients against independent formulas, with checks that are themselves tested.

Each ``check_*`` must pass for the reference and fail for every mutant: a gradient off by 1 %, a lost pair, swapped
coordinates, a forgotten centre.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_fast.ops import reference

pytestmark = pytest.mark.usefixtures("deterministic")

Op = Callable[..., Any]
TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04


class ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.01


def scaled_gradient(op: Op) -> Op:
    return lambda *arguments: ScaledGradient.apply(op(*arguments))


def central_differences(function: Callable[[Tensor], Tensor], point: Tensor, step: float = 1e-5) -> Tensor:
    """Return the gradient of a scalar function, entry by entry."""
    gradient = torch.empty_like(point)
    for entry in range(point.numel()):
        shift = torch.zeros_like(point).view(-1)
        shift[entry] = step
        shift = shift.view_as(point)
        gradient.view(-1)[entry] = (function(point + shift) - function(point - shift)) / (2 * step)
    return gradient


def check_match_nuclei(op: Op) -> None:
    """Pairs found by hand. Views of two ROIs: {1, 2, 5} {3}, {2, 5} {3, 4}, {5} {4}; the first two are global."""
    index = torch.tensor([1, 2, 5, 3, 2, 5, 3, 4, 5, 4], dtype=torch.int32)
    offsets = torch.tensor([0, 3, 4, 6, 8, 9, 10], dtype=torch.int32)
    teacher, student = op(index, offsets, 2, 2)
    assert teacher.tolist() == [1, 2, 3, 2, 4, 5, 6, 5, 7]
    assert student.tolist() == [4, 5, 6, 8, 1, 2, 3, 8, 9]


def hat(position: Tensor, count: int) -> Tensor:
    """[N, count]: the weight of every pixel at a point between pixels."""
    return (1 - (position.unsqueeze(1) - torch.arange(count)).abs()).clamp(min=0)


def resize(count: int, fine: int) -> Tensor:
    """[fine, count]: the weight of every coarse pixel in every fine one, corners aligned."""
    return hat(torch.arange(fine, dtype=torch.float64) * (count - 1) / (fine - 1), count)


def check_resize_concat(op: Op) -> None:
    """Products of two matrices of hat functions, enlarging, reducing and keeping; the gradient is their transpose."""
    torch.manual_seed(0)
    maps = [torch.randn(2, c, h, w, dtype=torch.float64) for c, h, w in [(2, 3, 4), (3, 7, 9), (1, 5, 5), (2, 1, 1)]]
    weights = [(resize(x.shape[2], 5), resize(x.shape[3], 5)) for x in maps]
    leaves = [x.clone().requires_grad_() for x in maps]
    out = op(leaves, 5)
    parts = [torch.einsum("qi,pj,ncij->ncqp", *each, x) for each, x in zip(weights, maps, strict=True)]
    torch.testing.assert_close(out, torch.cat(parts, dim=1), **TOLERANCE)
    pull = torch.randn_like(out)
    (out * pull).sum().backward()
    pulls = pull.split([x.shape[1] for x in maps], dim=1)
    for leaf, each, part in zip(leaves, weights, pulls, strict=True):
        torch.testing.assert_close(leaf.grad, torch.einsum("qi,pj,ncqp->ncij", *each, part), **TOLERANCE)


def check_batch_norm(op: Op) -> None:
    """Columns of two channels and three values, whose norms are solved by hand; gradients by central differences."""
    torch.manual_seed(0)
    x = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 2.0]], dtype=torch.float64)  # means 2 and 4, variances 2/3 and 2
    residual, pull = torch.randn(2, 3, 2, dtype=torch.float64)
    weight, bias = torch.tensor([[2.0, -3.0], [0.5, 1.0]], dtype=torch.float64)
    running = torch.tensor([[10.0, 20.0], [30.0, 40.0]], dtype=torch.float64)
    y = op(x, residual, weight, bias, *running, torch.tensor(0), 0.25, 1e-9, False)
    rows = torch.tensor([[-(1.5**0.5), 0.5**0.5], [0.0, 0.5**0.5], [1.5**0.5, -(2**0.5)]], dtype=torch.float64)
    torch.testing.assert_close(y, rows * weight + bias + residual, **TOLERANCE)
    # The unbiased variances are 1 and 3.
    expected = torch.tensor([[8.0, 16.0], [22.75, 30.75]], dtype=torch.float64)
    torch.testing.assert_close(running, expected, **TOLERANCE)

    leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight, bias)]
    (op(*leaves, None, None, None, 0.25, 0.1, True) * pull).sum().backward()
    for position, leaf in enumerate(leaves):

        def weighted_sum(moved: Tensor, position: int = position) -> Tensor:
            inputs = [moved if i == position else other.detach() for i, other in enumerate(leaves)]
            return (reference.batch_norm(*inputs, None, None, None, 0.25, 0.1, True) * pull).sum()

        expected = central_differences(weighted_sum, leaf.detach())
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-7)


def check_sample_nuclei(op: Op) -> None:
    """Rows against the product of two hat functions on the upsampled map; gradients against central differences."""
    torch.manual_seed(0)
    sizes = [(5, 7), (3, 4), (2, 2), (1, 1)]
    levels = [torch.randn(2, 2, *size, dtype=torch.float64) for size in sizes]
    xy = torch.rand(6, 2) * 32
    image_index = torch.tensor([0, 1, 1, 0, 1, 0])
    weights = torch.randn(6, 8, dtype=torch.float64)

    across, down = hat(xy[:, 0].double() / 32 * 6, 7), hat(xy[:, 1].double() / 32 * 4, 5)
    expected = torch.cat(
        [
            torch.einsum("nchw,nh,nw->nc", level[image_index], down @ resize(h, 5), across @ resize(w, 7))
            for level, (h, w) in zip(levels, sizes, strict=True)
        ],
        dim=1,
    )
    leaves = [level.clone().requires_grad_() for level in levels]
    rows = op(leaves, xy, image_index, 32)
    torch.testing.assert_close(rows, expected, **TOLERANCE)
    (rows * weights).sum().backward()
    for position, leaf in enumerate(leaves):

        def weighted_sum(moved: Tensor, position: int = position) -> Tensor:
            inputs = [*levels[:position], moved, *levels[position + 1 :]]
            return (op(inputs, xy, image_index, 32) * weights).sum()

        torch.testing.assert_close(leaf.grad, central_differences(weighted_sum, levels[position]), **TOLERANCE)


def check_gelu(op: Op) -> None:
    """By the error function, one value at a time. The bias is already added: its gradient is that of adding it."""
    torch.manual_seed(0)
    hidden, pull = torch.randn(4, 5, dtype=torch.float64) * 2, torch.randn(4, 5, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)
    leaves = [hidden.clone().requires_grad_(), bias.clone().requires_grad_()]
    result = op(*leaves)
    expected = [[h * (1 + math.erf(h / math.sqrt(2))) / 2 for h in row] for row in hidden.tolist()]
    torch.testing.assert_close(result.detach(), torch.tensor(expected, dtype=torch.float64), **TOLERANCE)
    (result * pull).sum().backward()

    def weighted_sum(hidden: Tensor) -> Tensor:
        return (hidden * (1 + (hidden / math.sqrt(2)).erf()) / 2 * pull).sum()

    points = [(weighted_sum, hidden), (lambda shift: weighted_sum(hidden + shift), torch.zeros_like(bias))]
    for leaf, (function, point) in zip(leaves, points, strict=True):
        torch.testing.assert_close(leaf.grad, central_differences(function, point), **TOLERANCE)


def check_join_heads(op: Op) -> None:
    """Written out value by value."""
    torch.manual_seed(0)
    shapes = [(2, 3, 2, 4), (1, 2, 2, 4)]
    parts = [torch.randn(shape, dtype=torch.float64) for shape in shapes for _ in range(3)]
    joined, sums = op(parts, True)
    rows = [
        [float(value) for part in parts[first : first + 3] for head in part[image, token] for value in head]
        for first in (0, 3)
        for image in range(len(parts[first]))
        for token in range(parts[first].shape[1])
    ]
    torch.testing.assert_close(joined, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=0)
    totals = torch.tensor([math.fsum(column) for column in zip(*rows, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(sums, totals, **TOLERANCE)


def check_add_layer_norm(op: Op) -> None:
    """Both results against sums, all gradients against central differences; one row is dropped, one doubled."""
    torch.manual_seed(0)
    x, branch, pull, other = (torch.randn(4, 5, dtype=torch.float64) for _ in range(4))
    scale = torch.tensor([[1.0], [0.0], [2.0], [1.0]], dtype=torch.float64)
    weight, bias = torch.rand(5, dtype=torch.float64) + 0.5, torch.randn(5, dtype=torch.float64)
    total, normed = op(x, branch, scale, weight, bias, 1e-3)
    expected = torch.stack([a + s * b for a, b, s in zip(x, branch, scale, strict=True)])
    deviation = ((expected**2).mean(1) - expected.mean(1) ** 2 + 1e-3).sqrt()
    torch.testing.assert_close(total, expected, **TOLERANCE)
    rows = ((expected.T - expected.mean(1)) / deviation).T
    torch.testing.assert_close(normed, rows * weight + bias, **TOLERANCE)

    points = [x, branch, weight, bias]
    leaves = [point.clone().requires_grad_() for point in points]

    def weighted_sum(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total, normed = op(x, branch, scale, weight, bias, 1e-3)
        return (total * pull + normed * other).sum()

    weighted_sum(*leaves).backward()
    for place, leaf in enumerate(leaves):
        numeric = central_differences(
            lambda moved, place=place: weighted_sum(*points[:place], moved, *points[place + 1 :]), points[place]
        )
        torch.testing.assert_close(leaf.grad, numeric, **TOLERANCE)
    leaf, branch_bias = branch.clone().requires_grad_(), torch.randn(5, dtype=torch.float64, requires_grad=True)
    op(x, leaf, scale, weight, bias, 1e-3, branch_bias)[1].square().sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(branch_bias.grad, leaf.grad.sum(0), **TOLERANCE)


def loss_inputs() -> tuple[Tensor, ...]:
    """Return student and teacher features, prototypes, centre, pairs (a row in none, a row in two), pair weights."""
    torch.manual_seed(0)
    z, teacher_z = (torch.nn.functional.normalize(torch.randn(n, 5, dtype=torch.float64), dim=1) for n in (4, 3))
    weight, teacher_weight = (torch.randn(11, 5, dtype=torch.float64) / 5**0.5 for _ in range(2))
    center = torch.randn(11, dtype=torch.float64) * 0.1
    teacher_rows, student_rows = torch.tensor([0, 2, 1, 0, 2]), torch.tensor([1, 1, 0, 3, 3])
    pair_weights = torch.rand(5, dtype=torch.float64) + 0.5
    return z, weight, teacher_z, teacher_weight, center, teacher_rows, student_rows, pair_weights


def check_dino_loss(op: Op) -> None:
    """Closed form: loss = LSE_i - p_j . s_i / ts, d loss / d s_i = (softmax(s_i / ts) - p_j) / ts."""
    z, weight, teacher_z, teacher_weight, center, teacher_rows, student_rows, pair_weights = loss_inputs()
    student, teacher = z @ weight.T, teacher_z @ teacher_weight.T
    exponent = ((teacher - center) / TEACHER_TEMP).exp()
    target = (exponent / exponent.sum(1, keepdim=True))[teacher_rows]
    scaled = student / STUDENT_TEMP
    log_sum = scaled.exp().sum(1).log()
    expected = log_sum[student_rows] - (target * scaled[student_rows]).sum(1)
    expected_gradient = torch.zeros_like(student)
    for pair, row in enumerate(student_rows.tolist()):
        prediction = (scaled[row] - log_sum[row]).exp()
        expected_gradient[row] += pair_weights[pair] * (prediction - target[pair]) / STUDENT_TEMP

    leaf = student.clone().requires_grad_()
    loss = op(leaf, teacher, center, teacher_rows, student_rows, STUDENT_TEMP, TEACHER_TEMP)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    (loss * pair_weights).sum().backward()
    torch.testing.assert_close(leaf.grad, expected_gradient, **TOLERANCE)


def check_linear_dino_loss(op: Op) -> None:
    """Both gradients against central differences, and d z against its closed form (w_i o_i - sum_j w_ij m_j) / ts."""
    z, weight, teacher_z, teacher_weight, center, teacher_rows, student_rows, pair_weights = loss_inputs()

    def weighted_sum(z: Tensor, weight: Tensor) -> Tensor:
        loss = op(z, weight, teacher_z, teacher_weight, center, teacher_rows, student_rows, STUDENT_TEMP, TEACHER_TEMP)
        return (loss * pair_weights).sum()

    z_leaf, weight_leaf = z.clone().requires_grad_(), weight.clone().requires_grad_()
    weighted_sum(z_leaf, weight_leaf).backward()
    torch.testing.assert_close(
        z_leaf.grad, central_differences(lambda moved: weighted_sum(moved, weight), z), **TOLERANCE
    )
    torch.testing.assert_close(
        weight_leaf.grad, central_differences(lambda moved: weighted_sum(z, moved), weight), **TOLERANCE
    )

    predicted = ((z @ weight.T) / STUDENT_TEMP).softmax(1) @ weight  # o_i
    target = ((teacher_z @ teacher_weight.T - center) / TEACHER_TEMP).softmax(1) @ weight  # m_j
    closed = torch.zeros_like(z)
    closed.index_add_(
        0, student_rows, pair_weights.unsqueeze(1) * (predicted[student_rows] - target[teacher_rows]) / STUDENT_TEMP
    )
    torch.testing.assert_close(z_leaf.grad, closed, **TOLERANCE)


def drop_last_pair(*arguments: Any) -> tuple[Tensor, Tensor]:
    teacher, student = reference.match_nuclei(*arguments)
    return teacher[:-1], student[:-1]


def swap_roles(*arguments: Any) -> tuple[Tensor, Tensor]:
    return reference.match_nuclei(*arguments)[::-1]


def swap_coordinates(levels: Any, xy: Tensor, *rest: Any) -> Tensor:
    return reference.sample_nuclei(levels, xy.flip(1), *rest)


def forget_center(student: Tensor, teacher: Tensor, center: Tensor, *rest: Any) -> Tensor:
    return reference.dino_loss(student, teacher, center * 0, *rest)


def swap_weights(z: Tensor, weight: Tensor, teacher_z: Tensor, teacher_weight: Tensor, *rest: Any) -> Tensor:
    return reference.linear_dino_loss(z, teacher_weight, teacher_z, weight, *rest)


def forget_scale(x: Tensor, branch: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return reference.add_layer_norm(x, branch, None, *rest)


def scale_the_gradient_of_the_norm(*arguments: Any) -> tuple[Tensor, Tensor]:
    total, normed = reference.add_layer_norm(*arguments)
    return total, ScaledGradient.apply(normed)


def forget_residual(x: Tensor, residual: Tensor, *rest: Any) -> Tensor:
    return reference.batch_norm(x, residual * 0, *rest)


def concatenate_in_reverse(maps: Any, side: int) -> Tensor:
    return reference.resize_concat(maps[::-1], side)


def swap_keys_and_values(parts: Any, with_sums: bool) -> Any:
    return reference.join_heads([parts[number // 3 * 3 + (0, 2, 1)[number % 3]] for number in range(6)], with_sums)


def sum_one_resolution(parts: Any, with_sums: bool) -> Any:
    return reference.join_heads(parts, with_sums)[0], reference.join_heads(parts[:3], with_sums)[1]


CHECKS = {
    "gelu": check_gelu,
    "join_heads": check_join_heads,
    "add_layer_norm": check_add_layer_norm,
    "batch_norm": check_batch_norm,
    "match_nuclei": check_match_nuclei,
    "resize_concat": check_resize_concat,
    "sample_nuclei": check_sample_nuclei,
    "dino_loss": check_dino_loss,
    "linear_dino_loss": check_linear_dino_loss,
}
MUTANTS = {
    "gelu-gradient_1_percent": scaled_gradient(reference.gelu),
    "gelu-tanh": lambda hidden, bias: torch.nn.functional.gelu(hidden + bias - bias.detach(), approximate="tanh"),
    "join_heads-swapped_keys_and_values": swap_keys_and_values,
    "join_heads-sums_of_one_resolution": sum_one_resolution,
    "resize_concat-gradient_1_percent": scaled_gradient(reference.resize_concat),
    "resize_concat-reversed": concatenate_in_reverse,
    "add_layer_norm-forgotten_scale": forget_scale,
    "add_layer_norm-gradient_1_percent": scale_the_gradient_of_the_norm,
    "batch_norm-forgotten_residual": forget_residual,
    "batch_norm-gradient_1_percent": scaled_gradient(reference.batch_norm),
    "match_nuclei-dropped_pair": drop_last_pair,
    "match_nuclei-swapped_roles": swap_roles,
    "sample_nuclei-gradient_1_percent": scaled_gradient(reference.sample_nuclei),
    "sample_nuclei-swapped_x_y": swap_coordinates,
    "dino_loss-gradient_1_percent": scaled_gradient(reference.dino_loss),
    "dino_loss-forgotten_center": forget_center,
    "linear_dino_loss-gradient_1_percent": scaled_gradient(reference.linear_dino_loss),
    "linear_dino_loss-swapped_prototypes": swap_weights,
}


@pytest.mark.parametrize("name", CHECKS)
def test_reference_passes(name: str) -> None:
    CHECKS[name](getattr(reference, name))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_fails(mutant: str) -> None:
    with pytest.raises(AssertionError):
        CHECKS[mutant.split("-")[0]](MUTANTS[mutant])
