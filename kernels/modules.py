"""The losses of DINO and DINOv2 as modules: a centre, a student temperature, and the functions of :mod:`.functional`.

Temperatures are keyword arguments, and must be above 0 and at most 1: where DINO's own loss takes the epoch, these take
a temperature. The centre stays float32 whatever the module is cast to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import check_temperature
from .functional import dino_loss, runs_triton, soft_cross_entropy
from .reference import sharpen
from .sinkhorn import is_distributed, sinkhorn_knopp


class CenteredLoss(nn.Module):
    """A student temperature, and the running mean of the teacher's logits, which prevents collapse to one prototype.

    Attributes:
        center: float32 buffer whose last dimension is K.
    """

    center: Tensor

    def __init__(
        self, center: Tensor, student_temp: float, center_momentum: float, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        check_temperature(type(self).__name__, "student_temp", student_temp)
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.group = group
        self.register_buffer("center", center)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the centre to another device, but keep it float32 in ``half()``, ``bfloat16()`` and ``to(dtype)``."""
        center = self.center
        super()._apply(fn, recurse)
        if self.center.dtype != torch.float32:
            self.center = center.to(self.center.device)
        return self

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        r"""Move the centre towards the mean of the logits over all rows on all processes.

        .. math:: c \leftarrow m c + (1 - m) \frac{1}{N} \sum_i t_i

        (Caron et al. 2021, equation 4.) If ``torch.distributed`` is initialised, every process of the group must call
        it, with any number of rows; if no process has any, the centre does not change. The ``DINOLoss`` of DINO
        and DINOv2 divides by this process's rows times the number of processes instead, which is the same only if all
        have as many rows.

        Args:
            teacher_output: ``[..., K]`` logits, in any dtype; the mean is float32.

        Raises:
            ValueError: the last dimension is not K.
        """
        if teacher_output.dim() < 2 or teacher_output.shape[-1] != self.center.shape[-1]:
            raise ValueError(
                f"{type(self).__name__}: expected logits [..., {self.center.shape[-1]}] to update the centre with, got "
                f"{tuple(teacher_output.shape)}"
            )
        rows = teacher_output.flatten(0, -2)
        total = rows.sum(dim=0, dtype=torch.float32)
        total = torch.cat([total, total.new_full((1,), rows.shape[0])])
        if is_distributed():
            dist.all_reduce(total, group=self.group)
        sum_of_logits, count = total[:-1], total[-1]
        step = (1 - self.center_momentum) * (count > 0)
        mean = sum_of_logits / count.clamp(min=1)
        self.center = torch.lerp(self.center, mean, step)  # a tensor of its own: a backward may still need the old one

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output: Tensor, *, teacher_temp: float) -> Tensor:
        """Return ``softmax((teacher_output - center) / teacher_temp)``, float32, of the same shape ``[..., K]``.

        ``update_center`` takes effect at once; DINOv2's takes effect in the next ``softmax_center_teacher``.
        """
        check_temperature(type(self).__name__, "teacher_temp", teacher_temp)
        return centered_softmax(teacher_output, self.center, teacher_temp)

    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        *,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
    ) -> Tensor:
        """Return the targets of :func:`sinkhorn_knopp` for logits ``[N, K]``; they take the place of centring.

        ``n_masked_patches_tensor``, of one element, is the number of rows that are not padding; it does not change.
        """
        check_temperature(type(self).__name__, "teacher_temp", teacher_temp)
        options = {"num_rows": n_masked_patches_tensor, "group": self.group}
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations, **options)


class DINOLoss(CenteredLoss):
    r"""DINO's loss, which updates the centre only if called with ``update_center=True``; DINO's own always does.

    For B images, each with G global and V - G local crops:

    .. math:: L = \frac{1}{G (V - 1)} \sum_{g < G} \sum_{v \ne g} \frac{1}{B} \sum_b
              H\Big(\mathrm{softmax}\frac{t_{gb} - c}{\tau_t}, \; \mathrm{softmax}\frac{s_{vb}}{\tau_s}\Big)

    with H the cross-entropy: every global crop of the teacher is compared with every other crop of the student
    (Caron et al. 2021, *Emerging Properties in Self-Supervised Vision Transformers*, equation 3).

    Args:
        out_dim: K, the number of prototypes.
        ncrops: V, the crops of an image that the student sees, the global ones first.
        student_temp: tau_s.
        center_momentum: m of :meth:`update_center`.
        group: the processes that share the centre; by default all.

    Attributes:
        center: ``[1, K]`` float32, as in the checkpoints of DINO and DINOv2.

    Raises:
        ValueError: ``student_temp`` is not above 0 and at most 1.
    """

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        *,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(torch.zeros(1, out_dim), student_temp, center_momentum, group)
        self.ncrops = ncrops

    def forward(
        self, student_output: Tensor, teacher_output: Tensor, *, teacher_temp: float, update_center: bool = False
    ) -> Tensor:
        """Return the loss, a float32 scalar with a gradient for the student.

        Args:
            student_output: ``[V * B, K]`` logits, all images of crop 0, then all of crop 1, and so on.
            teacher_output: ``[G * B, K]`` logits, in the same order; G is 2 in DINO.
            teacher_temp: tau_t.
            update_center: call :meth:`update_center` with the teacher's logits after the loss, as DINO does.

        Raises:
            ValueError: the numbers of rows do not match V crops and at most V global crops of the same images, the
                numbers of prototypes differ, or ``teacher_temp`` is not above 0 and at most 1.
        """
        check_temperature("DINOLoss", "teacher_temp", teacher_temp)
        temps = (self.student_temp, teacher_temp)
        loss = multi_crop_loss(student_output, teacher_output, self.center, self.ncrops, *temps)
        if update_center:
            self.update_center(teacher_output)
        return loss

    def forward_list(
        self, student_output_list: Sequence[Tensor], teacher_out_softmaxed_centered_list: Sequence[Tensor]
    ) -> Tensor | int:
        """Return DINOv2's loss: the sum over all (student, teacher) of the mean cross-entropy; 0 if a list is empty.

        Args:
            student_output_list: logits ``[B, K]`` of one or several crops each.
            teacher_out_softmaxed_centered_list: probabilities that broadcast to ``[B, K]``, of
                :meth:`softmax_center_teacher` or :meth:`sinkhorn_knopp_teacher`.

        Raises:
            ValueError: wrong shapes.
        """
        return sum_over_lists(student_output_list, teacher_out_softmaxed_centered_list, self.student_temp)


class iBOTPatchLoss(CenteredLoss):  # noqa: N801 (its name in DINOv2)
    r"""DINOv2's loss of the masked patches of B images; as there, only ``update_center`` updates the centre.

    .. math:: L = \frac{1}{B} \sum_b \frac{1}{|M_b|} \sum_{i \in M_b} H\Big(q_{bi}, \;
              \mathrm{softmax}\frac{s_{bi}}{\tau_s}\Big)

    with H the cross-entropy, q the teacher's targets and M_b the masked patches of image b: the student, which does not
    see them, predicts the output of the teacher, which does (Zhou et al. 2022, *iBOT: Image BERT Pre-Training with
    Online Tokenizer*; computed only on masked patches as in Oquab et al. 2023, *DINOv2*).

    The targets are probabilities, of ``softmax_center_teacher`` or ``sinkhorn_knopp_teacher``. With ``teacher_temp``,
    they are logits instead, centred and sharpened in the same pass without being stored.

    Args:
        patch_out_dim: K, the number of prototypes.
        student_temp: tau_s.
        center_momentum: m of :meth:`update_center`.
        group: the processes that share the centre; by default all.

    Attributes:
        center: ``[1, 1, K]`` float32, as in the checkpoints of iBOT and DINOv2.

    Raises:
        ValueError: ``student_temp`` is not above 0 and at most 1.
    """

    def __init__(
        self,
        patch_out_dim: int,
        *,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(torch.zeros(1, 1, patch_out_dim), student_temp, center_momentum, group)

    def forward(
        self,
        student_patch_tokens: Tensor,
        teacher_patch_tokens: Tensor,
        student_masks_flat: Tensor,
        *,
        teacher_temp: float | None = None,
    ) -> Tensor:
        """Return the loss, a float32 scalar with a gradient for the student; images without masked patches count as 0.

        Args:
            student_patch_tokens: ``[B, N, K]`` logits of all patches.
            teacher_patch_tokens: ``[B, N, K]``, or what broadcasts to it.
            student_masks_flat: ``[B, N]`` bool, True for masked patches.
            teacher_temp: tau_t, if the teacher's patch tokens are logits.

        Raises:
            ValueError: wrong shapes, or a temperature that is not above 0 and at most 1.
        """
        masks = student_masks_flat
        if student_patch_tokens.dim() != 3 or masks.shape != student_patch_tokens.shape[:2]:
            raise ValueError(
                "iBOTPatchLoss: expected student_patch_tokens [B, N, K] and student_masks_flat [B, N], got "
                f"{tuple(student_patch_tokens.shape)} and {tuple(masks.shape)}"
            )
        loss = self._cross_entropies(student_patch_tokens, teacher_patch_tokens, teacher_temp)
        means = loss.masked_fill(~masks.bool(), 0).sum(dim=1) / masks.sum(dim=1).clamp(min=1)
        return means.sum() / max(1, masks.shape[0])

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
        *,
        teacher_temp: float | None = None,
    ) -> Tensor:
        """Return the same loss from the masked patches alone.

        Args:
            student_patch_tokens_masked: ``[M, K]`` logits: the masked patches of image 0, then of image 1, and so on,
                as in ``tokens[masks]``; then rows of padding, if any. Further leading dimensions are flattened.
            teacher_patch_tokens_masked: ``[M, K]``, of the same patches, or what broadcasts to them.
            student_masks_flat: ``[B, N]`` bool, True for masked patches.
            n_masked_patches: how many rows to use; the others are padding.
            masks_weight: one weight per used row, in place of 1 / ``|M_b|``.
            teacher_temp: tau_t, if the teacher's patch tokens are logits.

        Raises:
            ValueError: wrong shapes, or a temperature that is not above 0 and at most 1. On CUDA, fewer rows than
                masked patches are not noticed.
        """
        student, teacher = (
            tokens.flatten(0, -2)[:n_masked_patches] if tokens.dim() > 1 else tokens
            for tokens in (student_patch_tokens_masked, teacher_patch_tokens_masked)
        )
        if student.dim() != 2 or student_masks_flat.dim() != 2:
            raise ValueError(
                "iBOTPatchLoss: expected student_patch_tokens_masked [M, K] and student_masks_flat [B, N], got "
                f"{tuple(student_patch_tokens_masked.shape)} and {tuple(student_masks_flat.shape)}"
            )
        loss = self._cross_entropies(student, teacher, teacher_temp)
        if masks_weight is None:
            masks_weight = patch_weights(student_masks_flat, len(loss))
        elif masks_weight.shape != loss.shape:
            raise ValueError(
                f"iBOTPatchLoss: expected masks_weight [{len(loss)}], one weight per masked patch, got "
                f"{tuple(masks_weight.shape)}"
            )
        return (loss * masks_weight).sum() / max(1, student_masks_flat.shape[0])

    def _cross_entropies(self, student: Tensor, teacher: Tensor, teacher_temp: float | None) -> Tensor:
        """Return one value per row of ``student`` ``[..., K]``."""
        teacher = expand_target("iBOTPatchLoss", teacher, student)
        if teacher_temp is None:
            return soft_cross_entropy(student, teacher, self.student_temp)
        check_temperature("iBOTPatchLoss", "teacher_temp", teacher_temp)
        student_rows, teacher_rows = student.flatten(0, -2), teacher.flatten(0, -2)
        rows = torch.arange(len(student_rows), device=student.device)
        temps = (self.student_temp, teacher_temp)
        return dino_loss(student_rows, teacher_rows, self.center, rows, rows, *temps).view(student.shape[:-1])


def multi_crop_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    num_crops: int,
    student_temp: float,
    teacher_temp: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute the loss of :class:`DINOLoss`, whose arguments these are.

    In plain PyTorch, the loss is summed over the student's crops: the cross-entropy is linear in its target, so each
    crop needs one log-softmax and the sum of its targets, not one of each per pair.
    """
    num_images, rest = divmod(student_logits.shape[0], num_crops)
    num_globals = teacher_logits.shape[0] // max(1, num_images)
    if rest or teacher_logits.shape[0] != num_globals * num_images or num_globals > num_crops:
        raise ValueError(
            f"DINOLoss: expected student_output [{num_crops} * B, K] and teacher_output [G * B, K] with "
            f"G <= {num_crops}, got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if student_logits.dim() != 2 or not student_logits.shape[1:] == teacher_logits.shape[1:] == center.shape[-1:]:
        raise ValueError(
            f"DINOLoss: expected student_output and teacher_output with {center.shape[-1]} prototypes, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    num_pairs = max(1, num_globals * (num_crops - 1) * num_images)
    if runs_triton("dino_loss", backend, student_logits, teacher_logits, center):
        pairs = crop_pairs(num_images, num_globals, num_crops, student_logits.device)
        return dino_loss(student_logits, teacher_logits, center, *pairs, student_temp, teacher_temp).sum() / num_pairs
    targets = centered_softmax(teacher_logits, center, teacher_temp).unflatten(0, (num_globals, num_images))
    students = student_logits.unflatten(0, (num_crops, num_images))
    return sum_over_crops(students, targets, student_temp, skip_own=True, backend="torch") / num_pairs


def sum_over_crops(
    student_logits: Tensor, targets: Tensor, student_temp: float, *, skip_own: bool, backend: str | None = None
) -> Tensor:
    """Return the sum of the cross-entropies of all pairs of crops, which is linear in the target.

    Args:
        student_logits: ``[S, B, K]``.
        targets: ``[T, B, K]`` probabilities.
        skip_own: do not compare crop s of the student with crop s of the teacher.
    """
    of_all = targets.sum(dim=0)
    total = of_all.new_zeros(())
    for crop, logits in enumerate(student_logits):
        skips = skip_own and crop < len(targets)
        target = targets[:crop].sum(dim=0) + targets[crop + 1 :].sum(dim=0) if skips else of_all
        total = total + soft_cross_entropy(logits, target, student_temp, backend=backend).sum()
    return total


@torch.no_grad()
def centered_softmax(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Return ``softmax((logits - center) / temp)`` in at least float32, of the shape of ``logits`` ``[..., K]``."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.softmax(sharpen(logits - center.flatten(), temp), dim=-1)


def sum_over_lists(students: Sequence[Tensor], teachers: Sequence[Tensor], student_temp: float) -> Tensor | int:
    """Return the sum over all (student, teacher) of the mean cross-entropy, which is linear in its target."""
    if len(teachers) == 0:
        return 0
    target = sum(teachers[1:], start=teachers[0]).contiguous()  # once: DINOv2's Sinkhorn-Knopp returns it transposed
    return sum(
        soft_cross_entropy(student, expand_target("DINOLoss", target, student), student_temp).mean()
        for student in students
    )


def expand_target(op: str, target: Tensor, student: Tensor) -> Tensor:
    """Return the target as ``[..., K]`` of the student; dimensions of size 1 are repeated, or dropped at the front."""
    try:
        shape = torch.broadcast_shapes(target.shape, student.shape)
    except RuntimeError:
        shape = torch.Size()
    if shape.numel() != student.numel() or target.shape[-1:] != student.shape[-1:]:
        raise ValueError(
            f"{op}: expected a teacher whose shape broadcasts to that of the student, {tuple(student.shape)}, got "
            f"{tuple(target.shape)}"
        )
    return target.expand(shape).reshape(student.shape)


def patch_weights(masks: Tensor, num_rows: int) -> Tensor:
    """Return 1 / ``|M_b|`` for each masked patch in the order of ``tokens[masks]``, then 0 for padding: ``[num_rows]``.

    Raises:
        ValueError: there are more masked patches than rows (not checked on CUDA, where the host would wait).
    """
    counts = masks.sum(dim=1)
    if masks.device.type == "cpu" and not torch.compiler.is_compiling() and counts.sum() > num_rows:
        raise ValueError(f"iBOTPatchLoss: {int(counts.sum())} patches are masked, but there are only {num_rows} rows")
    rows = torch.arange(num_rows, device=masks.device)
    image = torch.searchsorted(counts.cumsum(dim=0), rows, right=True)  # the number of images for padding
    return F.pad(1 / counts.clamp(min=1), (0, 1))[image]


def crop_pairs(num_images: int, num_globals: int, num_crops: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows to compare: every global crop of the teacher with every other crop of the student, by image."""
    teacher, other, image = torch.meshgrid(
        torch.arange(num_globals, device=device),
        torch.arange(1, num_crops, device=device),
        torch.arange(num_images, device=device),
        indexing="ij",
    )
    student = (teacher + other) % num_crops
    return (teacher * num_images + image).flatten(), (student * num_images + image).flatten()
