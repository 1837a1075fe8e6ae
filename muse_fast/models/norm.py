"""BatchNorm with statistics over all ranks; one collective serves several groups of values.

A group is rows ``[N, C]`` or maps ``[N, C, h, w]``; its moments are mean, biased variance and number of values per
channel. Ranks gather each other's moments and merge them. All-reducing sums would take two collectives, since squares
must be summed about a mean that is itself a sum over ranks: ``E[y^2] - E[y]^2`` loses its digits if the mean is large.

A batch statistic needs two values. With fewer over all ranks, the running statistics are used and stay unchanged. Only
the device knows how many values other ranks have, hence ``torch.where`` instead of a branch.

What follows a norm in residual networks, an addition and ReLU, is done in the same pass where `ops.batch_norm` has
kernels for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast import ops
from muse_fast.errors import UserError
from muse_fast.ops import backends
from muse_fast.runtime.distributed import gather_over_ranks, sum_over_ranks, world_size

Norm = nn.BatchNorm1d | nn.BatchNorm2d


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm of maps over all ranks, and ReLU where ``relu`` is set."""

    relu = False

    def forward(self, x: Tensor) -> Tensor:  # [N, C, h, w] -> [N, C, h, w]
        return batch_norms([x], [self], relu=self.relu)[0]


class BatchNormAct2d(BatchNorm2d):
    """The layer of timm that ends with an activation, over all ranks."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:  # [N, C, h, w] -> [N, C, h, w]
        if type(self.drop) is nn.Identity and type(self.act) is nn.ReLU:
            return batch_norms([x], [self], relu=True)[0]
        return self.act(self.drop(super().forward(x)))


class RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm of rows over all ranks, without parameters; ranks may have different numbers of rows."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, affine=False)

    def forward(self, x: Tensor) -> Tensor:  # [N, dim] -> [N, dim]
        return batch_norms([x], [self])[0]


def over_ranks(network: nn.Module) -> None:
    """Turn every BatchNorm layer of ``network`` in place into one whose statistics are those of all ranks.

    Raises:
        UserError: the network has a kind of BatchNorm for which there is none.
    """
    from timm.layers import BatchNormAct2d as TimmBatchNormAct2d

    kinds = {nn.BatchNorm2d: BatchNorm2d, TimmBatchNormAct2d: BatchNormAct2d}
    for name, module in network.named_modules():
        kind = type(module)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or kind in kinds.values():
            continue
        if kind not in kinds or module.momentum is None or not module.track_running_stats:
            raise UserError(
                f"{type(network).__name__}: {name} is a {kind.__name__} that cannot use the statistics of all ranks; "
                "use nn.BatchNorm2d with running statistics and a momentum"
            )
        module.__class__ = kinds[kind]  # keeps weights, statistics, settings and activation


def batch_norms(
    xs: Sequence[Tensor],
    norms: Sequence[Norm],
    residuals: Sequence[Tensor] | None = None,
    relu: bool = False,
) -> list[Tensor]:
    """``[norm(x) for x, norm in zip(xs, norms)]`` with the statistics of each ``x`` over all ranks.

    Running statistics are updated group by group, so a norm may occur several times. In training on several ranks,
    forward and backward each use one collective, which ranks without values join. Gradients of weight and bias are
    those of this rank's values; data parallelism sums them.

    Args:
        xs: groups ``[N, C]`` or ``[N, C, h, w]``, floating point; N may differ between ranks and be 0.
        norms: with running statistics and momentum not None; all in training mode, or all in evaluation mode.
        residuals: added to the normalised values, as ``xs``.
        relu: whether ReLU follows.
    """
    added: Sequence[Tensor | None] = residuals or [None] * len(xs)
    groups = list(zip(xs, norms, added, strict=True))
    if world_size() == 1 or not any(norm.training for norm in norms):
        return [_batch_norm(x, norm, residual, relu) for x, norm, residual in groups]
    tensors = chain(*((x, residual, norm.weight, norm.bias) for x, norm, residual in groups))
    return list(_BatchNormsOverRanks.apply(norms, relu, *tensors))


def synced_moments(
    means: Sequence[Tensor], variances: Sequence[Tensor], counts: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor | int]]:
    """Moments of each group on this rank -> mean, biased variance and count over all ranks, with one collective.

    Args:
        means, variances: ``[C]`` per group; their gradients use one collective for all groups.
        counts: values per channel of each group on this rank; mean and variance must be finite even if it is 0.

    Returns:
        ``(mean [C], variance [C], count)`` per group; the count is a 0-dim tensor on several ranks.
    """
    if world_size() == 1:
        return list(zip(means, variances, counts, strict=True))
    rows = [torch.full_like(mean, count) for mean, count in zip(means, counts, strict=True)]
    merged = _MomentsOverRanks.apply(torch.stack([torch.cat(list(part)) for part in (means, variances, rows)]))
    groups = merged.split([mean.numel() for mean in means], dim=1)
    return [(mean, var, count[0]) for mean, var, count in groups]


def normalising_moments(norm: Norm, mean: Tensor, var: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """``mean`` and ``var`` of ``count`` values per channel, or the running statistics if there are fewer than two.

    Args:
        count: a number, or a tensor that is not copied to the host.
    """
    running: Any = norm  # torch declares the running statistics optional
    if isinstance(count, Tensor):
        return torch.where(count > 1, mean, running.running_mean), torch.where(count > 1, var, running.running_var)
    return (mean, var) if count > 1 else (running.running_mean.clone(), running.running_var.clone())


@torch.no_grad()
def update_running_stats(norm: Norm, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
    """Update the running statistics of ``norm`` as torch does; fewer than two values leave them unchanged.

    Args:
        mean, var: ``[C]``, the variance biased.
        count: values per channel, a number, or a 0-dim tensor that is not copied to the host.
    """
    running: Any = norm
    if isinstance(count, int) and count < 2:
        return
    enough = count > 1
    var = var * (count / (count - 1))
    if isinstance(enough, Tensor):
        mean = torch.where(enough, mean, running.running_mean)
        var = torch.where(enough, var, running.running_var)
    running.num_batches_tracked.add_(enough)
    running.running_mean.lerp_(mean, running.momentum)
    running.running_var.lerp_(var, running.momentum)


def _batch_norm(x: Tensor, norm: Any, residual: Tensor | None, relu: bool) -> Tensor:
    affine, running = (norm.weight, norm.bias), (norm.running_mean, norm.running_var)
    if norm.training and x.numel() >= 2 * x.shape[1]:
        return ops.batch_norm(x, residual, *affine, *running, norm.num_batches_tracked, norm.momentum, norm.eps, relu)
    return _add_relu(F.batch_norm(x, *running, *affine, eps=norm.eps), residual, relu)


def _add_relu(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """The residual added to ``y``, which is overwritten, and cut at 0."""
    if residual is not None:
        y = y + residual
    return y.relu_() if relu else y


class _MomentsOverRanks(torch.autograd.Function):
    """Mean, variance and count ``[3, C]`` of this rank -> those over all ranks; the count has no gradient."""

    @staticmethod
    def forward(ctx: Any, moments: Tensor) -> Tensor:
        merged = _merge(gather_over_ranks(moments))
        ctx.save_for_backward(moments, merged)
        return merged

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        moments, (mean, _, count) = ctx.saved_tensors
        grad_mean, grad_var, _ = sum_over_ranks(grad.clone())
        share = moments[2] / count.clamp(min=1)
        return torch.stack(
            [share * (grad_mean + 2 * (moments[0] - mean) * grad_var), share * grad_var, torch.zeros_like(share)]
        )


class _Group(NamedTuple):
    """What the backward needs of a group."""

    x: Tensor
    y: Tensor | None  # where it is 0, ReLU cut; None if x tells, or without ReLU
    moments: Tensor  # [3, C]: mean and variance that normalised x, and number of values over all ranks
    weight: Tensor | None
    bias: Tensor | None


class _BatchNormsOverRanks(torch.autograd.Function):
    """Training of `batch_norms`; the inputs are x, residual, weight and bias of every group in turn."""

    @staticmethod
    def forward(ctx: Any, norms: Sequence[Norm], relu: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        xs = [x.contiguous(memory_format=_memory_format(x)) for x in tensors[::4]]
        merged = _merge(gather_over_ranks(torch.cat([_moments(x) for x in xs], dim=1)))
        outputs, groups = [], []
        for x, residual, norm, (mean, var, count) in zip(
            xs, tensors[1::4], norms, merged.split([x.shape[1] for x in xs], dim=1), strict=True
        ):
            mean, var = normalising_moments(norm, mean, var, count)
            update_running_stats(norm, mean, var, count[0])
            group = _Group(x, None, torch.stack([mean, var, count]), norm.weight, norm.bias)
            y = _normalised(group, residual, norm.eps, relu)
            outputs.append(y)
            is_kept = relu and (residual is not None or not _has_kernels(x))
            groups.append(group._replace(y=y if is_kept else None))
        ctx.how = [(norm.eps, relu) for norm in norms]
        ctx.save_for_backward(*chain(*groups))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, size = ctx.saved_tensors, len(_Group._fields)
        groups = [_Group(*saved[place : place + size]) for place in range(0, len(saved), size)]
        grads = tuple(
            grad.contiguous(memory_format=_memory_format(group.x)) for grad, group in zip(grads, groups, strict=True)
        )
        grads, sums = zip(*(_sums(*each) for each in zip(grads, groups, ctx.how, strict=True)), strict=True)
        x_grads: Sequence[Tensor | None] = [None] * len(groups)
        if any(ctx.needs_input_grad[2::4]):
            total = sum_over_ranks(torch.cat([some[:2] for some in sums], dim=1))
            totals = total.split([group.x.shape[1] for group in groups], dim=1)
            x_grads = [_input_grad(*each) for each in zip(grads, groups, totals, ctx.how, strict=True)]
        result: list[Tensor | None] = [None, None]
        for needed, grad, x_grad, group, (sum_dy, _, along) in zip(
            ctx.needs_input_grad[3::4], grads, x_grads, groups, sums, strict=True
        ):
            affine = (None, None) if group.weight is None else (along, sum_dy)
            result += [x_grad, grad if needed else None, *affine]
        return tuple(result)


# The passes over the values: kernels of `ops.batch_norm` where it has them, else torch. Neither accepts empty input.


def _has_kernels(x: Tensor) -> bool:
    return backends.choose("batch_norm", x.device.type, None, x.dtype) == "triton"


def _moments(x: Tensor) -> Tensor:
    """Mean, biased variance and count ``[3, C]`` of this rank's values, float32 (float64 for float64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        return x.new_zeros(3, x.shape[1], dtype=dtype)
    if _has_kernels(x):
        from muse_fast.kernels.fused.batch_norm import batch_moments

        return batch_moments(x, None, None, None, 0.0)
    var, mean = torch.var_mean(x.to(dtype), dim=_all_but_channels(x), correction=0)
    return torch.stack([mean, var, torch.full_like(mean, x.numel() // x.shape[1])])


def _normalised(group: _Group, residual: Tensor | None, eps: float, relu: bool) -> Tensor:
    x, _, moments, weight, bias = group
    if _has_kernels(x):
        from muse_fast.kernels.fused.batch_norm import batch_norm_fwd

        return batch_norm_fwd(x, residual, moments, weight, bias, eps, relu)
    return _add_relu(F.batch_norm(x, moments[0], moments[1], weight, bias, eps=eps), residual, relu)


def _merge(moments: Tensor) -> Tensor:
    """Mean, biased variance and count of each rank ``[ranks, 3, C]`` -> those of all values ``[3, C]``."""
    means, variances, counts = moments.unbind(1)
    count = counts.sum(dim=0)
    share = counts / count.clamp(min=1)
    mean = means[0] + (share * (means - means[0])).sum(dim=0)  # differences keep their digits
    var = (share * (variances + (means - mean).square())).sum(dim=0)
    return torch.stack([mean, var, count])


def _sums(grad: Tensor, group: _Group, how: tuple[float, bool]) -> tuple[Tensor, Tensor]:
    """The gradient before ReLU (or that after it, if only x tells where it cut), and over this rank's values the sums
    of the former: by itself, times ``x - mean``, and the latter divided by the deviation, ``[3, C]``."""
    x, y, (mean, var, _), weight, bias = group
    if x.numel() == 0:
        return grad, mean.new_zeros(3, x.shape[1])
    eps, relu = how
    if _has_kernels(x):
        from muse_fast.kernels.fused.batch_norm import gradient_sums

        grad, _, sums = gradient_sums(grad, x, y, group.moments, weight, bias, eps, relu)
        return grad, sums
    if y is not None:
        grad = grad.masked_fill(y <= 0, 0)
    dy = grad.to(mean.dtype)
    sum_dy, sum_dy_xmu = (part.sum(dim=_all_but_channels(x)) for part in (dy, dy * (x - _broadcast(mean, x))))
    return grad, torch.stack([sum_dy, sum_dy_xmu, sum_dy_xmu * torch.rsqrt(var + eps)])


def _input_grad(grad: Tensor, group: _Group, sums: Tensor, how: tuple[float, bool]) -> Tensor:
    """Gradient of this rank's values, given the first two ``sums`` of `_sums` over all ranks."""
    x, y, (mean, var, count), weight, bias = group
    if x.numel() == 0:
        return torch.zeros_like(x)
    eps, relu = how
    if _has_kernels(x):
        from muse_fast.kernels.fused.batch_norm import input_gradient

        return input_gradient(grad, x, group.moments, weight, bias, sums.contiguous(), eps, relu and y is None)
    sum_dy, sum_dy_xmu = torch.where(count > 1, sums, 0)  # the running statistics do not depend on x
    weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    invstd = torch.rsqrt(var + eps)
    slope = _broadcast(invstd.square() * sum_dy_xmu / count, x)
    centred = grad - _broadcast(sum_dy / count, x) - (x - _broadcast(mean, x)) * slope
    return (centred * _broadcast(invstd * weight, x)).to(x.dtype)


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Reshape ``[C]`` so that it broadcasts over ``x``."""
    return values.view(-1, *[1] * (x.dim() - 2))


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last if ``x`` is, else contiguous."""
    last = torch.channels_last
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format
