"""Run the cross-entropies of an installed DINOv2 (https://github.com/facebookresearch/dinov2) on these kernels.

DINOv2's results stay the same up to rounding; its training code, centring and checkpoints do not change.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .functional import soft_cross_entropy


def patch_dinov2(dino: bool = True, ibot: bool = True) -> Callable[[], None]:
    """Make DINOv2's losses call :func:`soft_cross_entropy`, in existing and in new loss objects.

    Replaces ``DINOLoss.forward``, ``iBOTPatchLoss.forward`` and the ``lossfunc`` that ``iBOTPatchLoss.forward_masked``
    calls. Signatures, signs and the teacher's centring (running mean or Sinkhorn-Knopp) do not change.

    Args:
        dino: patch the loss on class tokens.
        ibot: patch the loss on masked patches.

    Returns:
        A function that restores DINOv2's own code. Undo several patches in reverse order.

    Raises:
        ImportError: ``dinov2.loss`` cannot be imported, or lacks an expected class or function.
    """
    replacements: list[tuple[Any, str, Callable[..., Any]]] = []
    if dino:
        module = _import("dinov2.loss.dino_clstoken_loss")
        replacements.append((_member(module, "DINOLoss"), "forward", _dino_forward))
    if ibot:
        module = _import("dinov2.loss.ibot_patch_loss")
        replacements.append((_member(module, "iBOTPatchLoss"), "forward", _ibot_forward))
        replacements.append((module, "lossfunc", _ibot_lossfunc))
    originals = [(owner, name, _member(owner, name)) for owner, name, _ in replacements]
    _assign(replacements)
    return lambda: _assign(originals)


def _dino_forward(
    self: Any, student_output_list: Sequence[Tensor], teacher_out_softmaxed_centered_list: Sequence[Tensor]
) -> Tensor | int:
    """Return the sum over all (student, teacher) of the mean cross-entropy, which is linear in its target."""
    target = functools.reduce(torch.add, teacher_out_softmaxed_centered_list)
    target = target.contiguous()  # once for all crops: Sinkhorn-Knopp returns it transposed
    return sum(soft_cross_entropy(student, target, self.student_temp).mean() for student in student_output_list)


def _ibot_forward(
    self: Any, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor
) -> Tensor:
    """Return the mean over images of the mean over their masked patches, of ``[B, N, K]`` tokens, ``[B, N]`` masks."""
    loss = soft_cross_entropy(student_patch_tokens, teacher_patch_tokens, self.student_temp)
    mask = student_masks_flat.float()
    return ((loss * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1.0)).mean()


def _ibot_lossfunc(t: Tensor, s: Tensor, temp: float) -> Tensor:
    """Return the negative cross-entropy of each patch ``[..., K]``, as ``iBOTPatchLoss.forward_masked`` expects."""
    return -soft_cross_entropy(s, t, temp)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"patch_dinov2: cannot import {name} ({error}); put a checkout of "
            "https://github.com/facebookresearch/dinov2 on PYTHONPATH"
        ) from error


def _member(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise ImportError(f"patch_dinov2: {owner.__name__} of the installed dinov2 has no {name}") from error


def _assign(members: list[tuple[Any, str, Callable[..., Any]]]) -> None:
    for owner, name, member in members:
        setattr(owner, name, member)
