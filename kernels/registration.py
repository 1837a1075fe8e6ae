"""The fake kernels and the autograd of every differentiable op, shared by all of its implementations.

An implementation of NAME registers two ops, ``NAME_fwd`` and ``NAME_bwd``, and passes them to ``register_NAME``, which
registers the fakes of both and makes the second the gradient of the first. Fakes return the tensors that kernels fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import DinoLoss, LinearDinoLoss, schema

# --- dino_loss


def register_dino_loss(forward: Any, backward: Any) -> None:
    """``forward``: ``DinoLoss -> (loss [P], student_stats [Ns, 2], teacher_stats [Nt, 2])``, all float32.
    ``backward``: ``(loss_gradient, student_logits, teacher_logits, center, student_stats, teacher_stats, teacher_rows,
    student_rows, student_temp, teacher_temp) -> gradient of student_logits``, contiguous.
    """

    def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher, _, rows, *_ = DinoLoss(*arguments)
        shapes = (rows.shape[0],), (student.shape[0], 2), (teacher.shape[0], 2)
        loss, student_stats, teacher_stats = (student.new_empty(shape, dtype=torch.float32) for shape in shapes)
        return loss, student_stats, teacher_stats

    def fake_backward(loss_gradient: Tensor, student_logits: Tensor, *_: Any) -> Tensor:
        return student_logits.new_empty(student_logits.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student_logits, teacher_logits, center, teacher_rows, student_rows, *ctx.temperatures = inputs
        _, *stats = output
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)  # of the statistics
        ctx.save_for_backward(student_logits, teacher_logits, center, *stats, teacher_rows, student_rows)

    def gradients(ctx: Any, loss_gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        gradient = None
        if ctx.needs_input_grad[0] and loss_gradient is not None:
            gradient = backward(loss_gradient, *ctx.saved_tensors, *ctx.temperatures)
        return gradient, *[None] * 6

    torch.library.register_fake(forward, fake_forward)
    torch.library.register_fake(backward, fake_backward)
    torch.library.register_autograd(forward, gradients, setup_context=setup_context)


# --- linear_dino_loss

LINEAR_DINO_LOSS_FWD = (
    f"({schema(LinearDinoLoss)}) -> "
    "(Tensor loss, Tensor student_stats, Tensor student_mean, Tensor teacher_stats, Tensor teacher_mean)"
)
LINEAR_DINO_LOSS_BWD = (
    "(Tensor loss_gradient, Tensor student_stats, Tensor student_mean, Tensor teacher_stats, Tensor teacher_mean, "
    f"{schema(LinearDinoLoss)}) -> (Tensor z_gradient, Tensor W_gradient)"
)


def register_linear_dino_loss(forward: Any, backward: Any) -> None:
    """``forward``: an op of the schema ``LINEAR_DINO_LOSS_FWD``, returning tensors as ``empty_linear_outputs`` does.
    ``backward``: an op of the schema ``LINEAR_DINO_LOSS_BWD``, returning the gradients of ``student_z`` and
    ``student_W``, contiguous, in their dtypes.
    """

    def fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
        return empty_linear_outputs(LinearDinoLoss(*arguments))

    def fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
        z, W, *_ = LinearDinoLoss(*arguments[5:])
        return z.new_empty(z.shape), W.new_empty(W.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, student_temp, teacher_temp = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # of what is saved
        ctx.save_for_backward(*saved, *tensors)
        ctx.temperatures = student_temp, teacher_temp

    def gradients(ctx: Any, loss_gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if loss_gradient is None:
            return (None,) * 9
        return *backward(loss_gradient, *ctx.saved_tensors, *ctx.temperatures), *[None] * 7

    torch.library.register_fake(forward, fake_forward)
    torch.library.register_fake(backward, fake_backward)
    torch.library.register_autograd(forward, gradients, setup_context=setup_context)


def empty_linear_outputs(arguments: LinearDinoLoss) -> tuple[Tensor, ...]:
    """Return the loss ``[P]``, then stats ``[N, 2]`` and mean prototype ``[N, d]`` of the students and the teachers."""
    z, _, teacher_z, *_ = arguments
    dtype = torch.promote_types(z.dtype, torch.float32)
    (num_students, width), num_teachers, num_pairs = z.shape, teacher_z.shape[0], arguments.teacher_rows.shape[0]
    shapes = (num_pairs,), (num_students, 2), (num_students, width), (num_teachers, 2), (num_teachers, width)
    return tuple(z.new_empty(shape, dtype=dtype) for shape in shapes)


# --- soft_cross_entropy


def register_soft_cross_entropy(forward: Any, backward: Any) -> None:
    """``forward``: ``(student_logits, target, temp) -> (loss [N], stats [N, 3])``, float32.
    ``backward``: ``(loss_gradient, student_logits, target, stats, temp) -> gradient of student_logits``, contiguous.
    """

    def fake_backward(
        loss_gradient: Tensor, student_logits: Tensor, target: Tensor, stats: Tensor, temp: float
    ) -> Tensor:
        return student_logits.new_empty(student_logits.shape)

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        student, target, ctx.temp = inputs
        _, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(student, target, stats)

    def gradients(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, None, None]:
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = backward(loss_gradient, *ctx.saved_tensors, ctx.temp)
        return gradient, None, None

    torch.library.register_fake(forward, empty_loss_and_stats)
    torch.library.register_fake(backward, fake_backward)
    torch.library.register_autograd(forward, gradients, setup_context=setup_context)


def empty_loss_and_stats(student_logits: Tensor, target: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    loss = student_logits.new_empty(student_logits.shape[0], dtype=torch.float32)
    return loss, loss.new_empty(student_logits.shape[0], 3)


# --- add_layer_norm


def register_add_layer_norm(forward: Any, backward: Any) -> None:
    """``forward``: ``(x, branch, scale, branch_bias, weight, bias, eps, dtype) -> (total, normed, stats)``, see
    :func:`empty_norms`. ``backward``: ``(total_gradient, normed_gradient, total, stats, weight, scale, x_dtype,
    branch_dtype, biased) -> gradients``, see :func:`empty_norm_gradients`.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, branch, scale, branch_bias, weight, *_ = inputs
        total, _, stats = output
        ctx.mark_non_differentiable(*((total, stats) if branch is None else (stats,)))
        ctx.set_materialize_grads(False)  # the sum after the last layer of a network is not used
        ctx.save_for_backward(x if branch is None else total, stats, weight, scale)
        ctx.dtypes = [None if given is None else given.dtype for given in (x, branch, branch_bias)]

    def gradients(
        ctx: Any, total_gradient: Tensor | None, normed_gradient: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        total, stats, weight, scale = ctx.saved_tensors
        if normed_gradient is None:
            normed_gradient = torch.zeros_like(total)
        x_dtype, branch_dtype, bias_dtype = ctx.dtypes
        biased = bias_dtype is not None
        x, branch, sums = backward(
            total_gradient, normed_gradient, total, stats, weight, scale, x_dtype, branch_dtype, biased
        )
        of_branch, of_bias = None if branch_dtype is None else branch, sums[2].to(bias_dtype) if biased else None
        return x, of_branch, None, of_bias, *sums[:2].to(weight.dtype).unbind(), None, None

    torch.library.register_fake(forward, empty_norms)
    torch.library.register_fake(backward, empty_norm_gradients)
    torch.library.register_autograd(forward, gradients, setup_context=setup_context)


def empty_norms(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum ``[M, C]``, empty without a branch; its norm ``[M, C]``; and statistics of rows ``[2, M]``."""
    total_dtype = x.dtype
    for added in (branch, scale):
        total_dtype = total_dtype if added is None else torch.promote_types(total_dtype, added.dtype)
    total = x.new_empty((0,) if branch is None else x.shape, dtype=total_dtype)
    return total, x.new_empty(x.shape, dtype=dtype or total_dtype), x.new_empty(2, x.shape[0], dtype=torch.float32)


def empty_norm_gradients(
    total_gradient: Tensor | None,
    normed_gradient: Tensor,
    total: Tensor,
    stats: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of x and branch ``[M, C]`` (empty without one), and of weight, bias and, if ``biased``, the bias
    in the branch, ``[2, C]`` or ``[3, C]`` float32."""
    branch = total.new_empty((0,) if branch_dtype is None else total.shape, dtype=branch_dtype or x_dtype)
    return total.new_empty(total.shape, dtype=x_dtype), branch, stats.new_empty(2 + biased, weight.shape[0])


# --- gelu


def register_gelu(forward: Any, backward: Any) -> None:
    """``forward``: ``(hidden, bias) -> result``. ``backward``: ``(gradient, hidden) -> gradients of hidden and bias``,
    see :func:`empty_gelu_gradients`.
    """

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        hidden, bias = inputs
        ctx.save_for_backward(hidden)
        ctx.dtype = bias.dtype

    def gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        of_hidden, of_bias = backward(gradient, *ctx.saved_tensors)
        return of_hidden, of_bias.to(ctx.dtype)

    torch.library.register_fake(forward, lambda hidden, bias: hidden.new_empty(hidden.shape))
    torch.library.register_fake(backward, empty_gelu_gradients)
    torch.library.register_autograd(forward, gradients, setup_context=setup_context)


def empty_gelu_gradients(gradient: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return that of the layer's output ``[M, C]``, and of its bias ``[C]`` float32."""
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[1], dtype=torch.float32)


# --- join_heads


def empty_joined(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the rows of all resolutions ``[M, 3 * heads * d]``, and their sums over columns in float32."""
    rows = sum(part.shape[0] * part.shape[1] for part in parts[::3])
    width = 3 * parts[0].shape[2] * parts[0].shape[3]
    return parts[0].new_empty(rows, width), parts[0].new_empty(width, dtype=torch.float32)


# --- batch_norm


def register_batch_norm(forward: Any, backward: Any) -> None:
    """``forward``: ``(x, residual, moments [3, C], weight, bias, eps, relu) -> y``, see :func:`empty_batch_norm`. The
    moments are taken for those of x, and have no gradient of their own.
    ``backward``: ``(gradient, x, y, moments, weight, bias, eps, relu) -> gradients``, see
    :func:`empty_batch_gradients`; y is given only if a residual was added before ReLU.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, residual, moments, weight, bias, *ctx.how = inputs
        _, relu = ctx.how
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.save_for_backward(x, output if relu and residual is not None else None, moments, weight, bias)

    def gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, moments, weight, bias = ctx.saved_tensors
        of_x, masked, (of_bias, _, of_weight) = backward(gradient, x, y, moments, weight, bias, *ctx.how)
        of_residual = None
        if ctx.residual_dtype is not None:
            of_residual = (gradient if y is None else masked).to(ctx.residual_dtype)
        affine = (None, None) if weight is None else (of_weight.to(weight.dtype), of_bias.to(bias.dtype))
        return of_x, of_residual, None, *affine, None, None

    torch.library.register_fake(forward, empty_batch_norm)
    torch.library.register_fake(backward, empty_batch_gradients)
    torch.library.register_autograd(forward, gradients, setup_context=setup_context)


def empty_batch_norm(
    x: Tensor,
    residual: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return torch.empty_like(dense(x), dtype=dtype)


def empty_batch_gradients(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of x; the gradient before ReLU, empty without y; and its three sums ``[3, C]``."""
    like_x = torch.empty_like(dense(x))
    masked = x.new_empty(0) if y is None else torch.empty_like(like_x, dtype=gradient.dtype)
    return like_x, masked, moments.new_empty(moments.shape)


# --- resize_concat


def register_resize_concat(forward: Any, backward: Any) -> None:
    """``forward``: ``(maps, side) -> concatenation``, see :func:`empty_concatenation`.
    ``backward``: ``(gradient, height, width) -> gradient of one map``, given that of its part of the concatenation; see
    :func:`empty_map_gradient`. Maps that keep their size get their part itself.
    """

    def setup_context(ctx: Any, inputs: tuple[Sequence[Tensor], int], output: Tensor) -> None:
        maps, _ = inputs
        ctx.maps = [(x.shape[1:], x.dtype) for x in maps]

    def gradients(ctx: Any, gradient: Tensor) -> tuple[list[Tensor], None]:
        of_maps = []
        parts = gradient.split([shape[0] for shape, _ in ctx.maps], dim=1)
        for part, ((_, *size), dtype) in zip(parts, ctx.maps, strict=True):
            kept = list(part.shape[2:]) == size
            of_maps.append((part if kept else backward(part, *size)).to(dtype))
        return of_maps, None

    torch.library.register_fake(forward, empty_concatenation)
    torch.library.register_fake(backward, empty_map_gradient)
    torch.library.register_autograd(forward, gradients, setup_context=setup_context)


def empty_concatenation(maps: Sequence[Tensor], side: int) -> Tensor:
    dtype = maps[0].dtype
    for x in maps[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    shape = (maps[0].shape[0], sum(x.shape[1] for x in maps), side, side)
    return torch.empty(shape, dtype=dtype, device=maps[0].device, memory_format=_order_of(maps[0]))


def empty_map_gradient(gradient: Tensor, height: int, width: int) -> Tensor:
    shape = (*gradient.shape[:2], height, width)
    return torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=_order_of(gradient))


def _order_of(x: Tensor) -> torch.memory_format:
    """Channels-last if the channels of a pixel are next to each other."""
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


# --- sample_nuclei


def register_sample_nuclei(forward: Any, backward: Any) -> None:
    """``forward``: ``(levels, xy, image_index, view_size) -> rows``.
    ``backward``: ``(gradient, xy, image_index, view_size, num_images, shapes, channels_last) -> gradients``, see
    :func:`empty_gradients`.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        levels, xy, image_index, ctx.view_size = inputs
        ctx.save_for_backward(xy, image_index)
        shapes = [size for level in levels for size in level.shape[1:]]
        channels_last = all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)
        ctx.layout = levels[0].shape[0], shapes, channels_last

    def gradients(ctx: Any, gradient: Tensor) -> tuple[list[Tensor], None, None, None]:
        return backward(gradient, *ctx.saved_tensors, ctx.view_size, *ctx.layout), None, None, None

    torch.library.register_fake(forward, empty_rows)
    torch.library.register_fake(backward, empty_gradients)
    torch.library.register_autograd(forward, gradients, setup_context=setup_context)


def empty_rows(levels: Sequence[Tensor], xy: Tensor, image_index: Tensor, view_size: int) -> Tensor:
    return levels[0].new_empty(xy.shape[0], sum(level.shape[1] for level in levels))


def empty_gradients(
    gradient: Tensor,
    xy: Tensor,
    image_index: Tensor,
    view_size: int,
    num_images: int,
    shapes: Sequence[int],
    channels_last: bool,
) -> list[Tensor]:
    """Return ``[num_images, c, h, w]`` per level, contiguous or channels-last; ``shapes`` is c_0, h_0, w_0, c_1, ..."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.empty(
            (num_images, *shapes[first : first + 3]),
            dtype=gradient.dtype,
            device=gradient.device,
            memory_format=memory_format,
        )
        for first in range(0, len(shapes), 3)
    ]


# --- projection_stats


def register_projection_stats(forward: Any, backward: Any) -> None:
    """``forward``: ``(x, weight) -> (mean [o], var [o])``, see :func:`empty_statistics`.
    ``backward``: ``(mean_gradient, var_gradient, x, weight, mean) -> gradients of x, in its layout, and of weight``.
    """

    def fake_backward(
        mean_gradient: Tensor, var_gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(dense(x)), weight.new_empty(weight.shape)

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[0])

    def gradients(ctx: Any, mean_gradient: Tensor, var_gradient: Tensor) -> tuple[Tensor, Tensor]:
        return backward(mean_gradient, var_gradient, *ctx.saved_tensors)

    torch.library.register_fake(forward, empty_statistics)
    torch.library.register_fake(backward, fake_backward)
    torch.library.register_autograd(forward, gradients, setup_context=setup_context)


def empty_statistics(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    precision = torch.promote_types(x.dtype, torch.float32)
    return weight.new_empty(weight.shape[0], dtype=precision), weight.new_empty(weight.shape[0], dtype=precision)


def dense(x: Tensor) -> Tensor:
    """Return ``x`` itself if it is NCHW or channels-last without gaps, else an NCHW copy."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
