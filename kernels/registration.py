"""The fakes and the autograd of ``dino_loss_fwd`` and ``dino_loss_bwd``, the same for Triton and C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def register_dino_loss(forward: Any, backward: Any) -> None:
    """Registers the fakes of both ops, and the backward one as the gradient of the forward one.

    Args:
        forward: ``(student_logits, teacher_logits, center, teacher_rows, student_rows, student_temp, teacher_temp) ->
            (loss, student_stats, teacher_stats)``.
        backward: ``(loss_gradient, student_logits, teacher_logits, center, student_stats, teacher_stats, teacher_rows,
            student_rows, student_temp, teacher_temp) -> gradient of student_logits``.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        student_logits, teacher_logits, center, teacher_rows, student_rows, *ctx.temperatures = inputs
        _, *stats = output
        ctx.mark_non_differentiable(*stats)
        ctx.save_for_backward(student_logits, teacher_logits, center, *stats, teacher_rows, student_rows)

    def gradients(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = backward(loss_gradient, *ctx.saved_tensors, *ctx.temperatures)
        return gradient, None, None, None, None, None, None

    torch.library.register_fake(forward, fake_forward)
    torch.library.register_fake(backward, fake_backward)
    torch.library.register_autograd(forward, gradients, setup_context=setup_context)


def fake_forward(
    student_logits: Tensor, teacher_logits: Tensor, center: Tensor, teacher_rows: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss ``[P]``, and of every row two numbers: ``[Ns, 2]``, ``[Nt, 2]``."""
    shapes = (teacher_rows.shape[0],), (student_logits.shape[0], 2), (teacher_logits.shape[0], 2)
    loss, student_stats, teacher_stats = (student_logits.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return loss, student_stats, teacher_stats


def fake_backward(loss_gradient: Tensor, student_logits: Tensor, *_: Any) -> Tensor:
    """The gradient of the student logits, contiguous."""
    return student_logits.new_empty(student_logits.shape)
