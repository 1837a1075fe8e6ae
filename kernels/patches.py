"""Run the cross-entropies of an installed DINO, DINOv2 or DINOv3 on these kernels.

Results stay the same up to rounding; training code, centring, Sinkhorn-Knopp and checkpoints do not change. Every patch
applies to existing and to new loss objects, and returns a function that restores the original code. Undo several
patches in reverse order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .functional import soft_cross_entropy
from .modules import multi_crop_loss, sum_over_crops, sum_over_lists

Patch = tuple[str, str, Callable[..., Any]]  # the module, the dotted name in it, what takes its place


def patch_dino(module: str = "main_dino") -> Callable[[], None]:
    """Make the loss of DINO (https://github.com/facebookresearch/dino) call these kernels.

    Replaces ``DINOLoss.forward``, with its signature ``(student_output, teacher_output, epoch)``, temperature schedule
    and update of the centre.

    Args:
        module: the module that defines ``DINOLoss``; ``"__main__"`` if the training script itself does, and calls this.

    Returns:
        A function that restores DINO's own code.

    Raises:
        ImportError: the module cannot be imported, or lacks the class or its method.
    """
    return _patch("patch_dino", "dino", [(module, "DINOLoss.forward", _dino_forward)])


def patch_dinov2(dino: bool = True, ibot: bool = True) -> Callable[[], None]:
    """Make the losses of DINOv2 (https://github.com/facebookresearch/dinov2) call :func:`soft_cross_entropy`.

    Replaces ``DINOLoss.forward``, ``iBOTPatchLoss.forward`` and the ``lossfunc`` that ``iBOTPatchLoss.forward_masked``
    calls. Signatures, signs and the teacher's centring (running mean or Sinkhorn-Knopp) do not change.

    Args:
        dino: patch the loss on class tokens.
        ibot: patch the loss on masked patches.

    Returns:
        A function that restores DINOv2's own code.

    Raises:
        ImportError: ``dinov2.loss`` cannot be imported, or lacks an expected class or function.
    """
    of_dino: list[Patch] = [("dinov2.loss.dino_clstoken_loss", "DINOLoss.forward", _dinov2_forward)]
    of_ibot: list[Patch] = [
        ("dinov2.loss.ibot_patch_loss", "iBOTPatchLoss.forward", _ibot_forward),
        ("dinov2.loss.ibot_patch_loss", "lossfunc", _ibot_lossfunc),
    ]
    return _patch("patch_dinov2", "dinov2", of_dino * dino + of_ibot * ibot)


def patch_dinov3(dino: bool = True, ibot: bool = True) -> Callable[[], None]:
    """Make the losses of DINOv3 (https://github.com/facebookresearch/dinov3) call :func:`soft_cross_entropy`.

    Replaces ``DINOLoss.forward``, and the ``lossfunc`` that both methods of ``iBOTPatchLoss`` call. Under autocast,
    ``DINOLoss`` then sums in float32 instead of the type of autocast.

    Args:
        dino: patch the loss on class tokens.
        ibot: patch the loss on masked patches.

    Returns:
        A function that restores DINOv3's own code.

    Raises:
        ImportError: ``dinov3.loss`` cannot be imported, or lacks an expected class or function.
    """
    of_dino: list[Patch] = [("dinov3.loss.dino_clstoken_loss", "DINOLoss.forward", _dinov3_forward)]
    of_ibot: list[Patch] = [("dinov3.loss.ibot_patch_loss", "lossfunc", _ibot_lossfunc)]
    return _patch("patch_dinov3", "dinov3", of_dino * dino + of_ibot * ibot)


def _dino_forward(self: Any, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
    """Return the mean over all pairs of different crops, then update the centre."""
    temps = (self.student_temp, float(self.teacher_temp_schedule[epoch]))
    loss = multi_crop_loss(student_output, teacher_output, self.center, self.ncrops, *temps)
    self.update_center(teacher_output)
    return loss


def _dinov2_forward(
    self: Any, student_output_list: Sequence[Tensor], teacher_out_softmaxed_centered_list: Sequence[Tensor]
) -> Tensor | int:
    """Return the sum over all (student, teacher) of the mean cross-entropy."""
    return sum_over_lists(student_output_list, teacher_out_softmaxed_centered_list, self.student_temp)


def _dinov3_forward(self: Any, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False) -> Tensor:
    """Return the mean over all pairs of crops, of ``[S, B, K]`` logits and ``[T, B, K]`` probabilities.

    With ``ignore_diagonal``, student s is not compared with teacher s.
    """
    diagonal = min(len(student_logits), len(teacher_probs)) if ignore_diagonal else 0
    num_pairs = len(student_logits) * len(teacher_probs) - diagonal
    total = sum_over_crops(student_logits, teacher_probs, self.student_temp, skip_own=ignore_diagonal)
    return total / (num_pairs * student_logits.shape[1])


def _ibot_forward(
    self: Any, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor
) -> Tensor:
    """Return the mean over images of the mean over their masked patches, of ``[B, N, K]`` tokens, ``[B, N]`` masks."""
    loss = -_ibot_lossfunc(teacher_patch_tokens, student_patch_tokens, self.student_temp)
    mask = student_masks_flat.float()
    return ((loss * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1.0)).mean()


def _ibot_lossfunc(t: Tensor, s: Tensor, temp: float) -> Tensor:
    """Return the negative cross-entropy of each patch ``[..., K]``, as ``iBOTPatchLoss.forward_masked`` expects."""
    student, target = torch.broadcast_tensors(s, t)
    return -soft_cross_entropy(student, target, temp)


def _patch(patch: str, repository: str, patches: list[Patch]) -> Callable[[], None]:
    """Apply all or, if one cannot be applied, none."""
    replacements = []
    for module, dotted_name, replacement in patches:
        owner = _import(patch, repository, module)
        *classes, name = dotted_name.split(".")
        for class_name in classes:
            owner = _member(patch, owner, class_name)
        replacements.append((owner, name, _member(patch, owner, name), replacement))

    def undo() -> None:
        for owner, name, original, _ in replacements:
            setattr(owner, name, original)

    for owner, name, _, replacement in replacements:
        setattr(owner, name, replacement)
    return undo


def _import(patch: str, repository: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{patch}: cannot import {module} ({error}); put a checkout of "
            f"https://github.com/facebookresearch/{repository} on PYTHONPATH"
        ) from error


def _member(patch: str, owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise ImportError(f"{patch}: {owner.__name__} has no {name}") from error
