"""DINO's and iBOT's losses as modules: a centre, a student temperature, and the functions of :mod:`.functional`.

The loss only reads the centre. Call ``update_center`` once per step, after the loss.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .functional import dino_loss


class CenteredLoss(nn.Module):
    """A student temperature, and the running mean of the teacher's logits, which prevents collapse to one prototype.

    Attributes:
        center: float32 buffer whose last dimension is K.
    """

    center: Tensor

    def __init__(self, center: Tensor, student_temp: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", center)

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor) -> None:
        r"""Move the centre towards the mean of the logits over all rows on all processes.

        .. math:: c \leftarrow m c + (1 - m) \frac{1}{N} \sum_i t_i

        (Caron et al. 2021, equation 4.) If ``torch.distributed`` is initialised, every process of the default group
        must call it, with any number of rows; if no process has any, the centre does not change.

        Args:
            teacher_logits: ``[..., K]``.
        """
        rows = teacher_logits.flatten(0, -2)
        total = rows.sum(dim=0, dtype=torch.float32)
        total = torch.cat([total, total.new_full((1,), rows.shape[0])])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        sum_of_logits, count = total[:-1], total[-1]
        step = (1 - self.center_momentum) * (count > 0)
        mean = sum_of_logits / count.clamp(min=1)
        self.center = torch.lerp(self.center, mean, step)  # a tensor of its own: a backward may still need the old one


class DINOLoss(CenteredLoss):
    r"""DINO's loss of B images, each with G global and V - G local crops.

    .. math:: L = \frac{1}{G (V - 1)} \sum_{g < G} \sum_{v \ne g} \frac{1}{B} \sum_b
              H\Big(\mathrm{softmax}\frac{t_{gb} - c}{\tau_t}, \; \mathrm{softmax}\frac{s_{vb}}{\tau_s}\Big)

    with H the cross-entropy: every global crop of the teacher is compared with every other crop of the student
    (Caron et al. 2021, *Emerging Properties in Self-Supervised Vision Transformers*, equation 3).

    Args:
        out_dim: K, the number of prototypes.
        ncrops: V, the crops of an image that the student sees, the global ones first.
        student_temp: tau_s.
        center_momentum: m of :meth:`update_center`.

    Attributes:
        center: ``[1, K]`` float32, as in DINO's checkpoints.
    """

    def __init__(self, out_dim: int, ncrops: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__(torch.zeros(1, out_dim), student_temp, center_momentum)
        self.ncrops = ncrops

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Return the loss, a float32 scalar with a gradient for the student.

        Args:
            student_logits: ``[V * B, K]``, all images of crop 0, then all of crop 1, and so on.
            teacher_logits: ``[G * B, K]``, in the same order; G is 2 in DINO.
            teacher_temp: tau_t.

        Raises:
            ValueError: the numbers of rows do not match V crops and at most V global crops of the same images.
        """
        num_images, rest = divmod(student_logits.shape[0], self.ncrops)
        num_globals = teacher_logits.shape[0] // max(1, num_images)
        if rest or teacher_logits.shape[0] != num_globals * num_images or num_globals > self.ncrops:
            raise ValueError(
                f"DINOLoss: expected student_logits [{self.ncrops} * B, K] and teacher_logits [G * B, K] with "
                f"G <= {self.ncrops}, got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
            )
        teacher_rows, student_rows = crop_pairs(num_images, num_globals, self.ncrops, student_logits.device)
        center = self.center.flatten()
        temps = (self.student_temp, teacher_temp)
        loss = dino_loss(student_logits, teacher_logits, center, teacher_rows, student_rows, *temps)
        return loss.sum() / max(1, loss.numel())


class IBOTPatchLoss(CenteredLoss):
    r"""iBOT's loss of the masked patches of B images.

    .. math:: L = \frac{1}{B} \sum_b \frac{1}{|M_b|} \sum_{i \in M_b}
              H\Big(\mathrm{softmax}\frac{t_{bi} - c}{\tau_t}, \; \mathrm{softmax}\frac{s_{bi}}{\tau_s}\Big)

    with H the cross-entropy and M_b the masked patches of image b: the student, which does not see them, predicts the
    output of the teacher, which does (Zhou et al. 2022, *iBOT: Image BERT Pre-Training with Online Tokenizer*;
    computed only on masked patches as in Oquab et al. 2023, *DINOv2*).

    Args:
        out_dim: K, the number of prototypes.
        student_temp: tau_s.
        center_momentum: m of :meth:`update_center`.

    Attributes:
        center: ``[1, 1, K]`` float32, as in iBOT's checkpoints.
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__(torch.zeros(1, 1, out_dim), student_temp, center_momentum)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        masks: Tensor,
        teacher_temp: float,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a float32 scalar with a gradient for the student; images without masked patches count as 0.

        Args:
            student_logits: ``[M, K]``, the masked patches: all of image 0, then all of image 1, and so on, as in
                ``tokens[masks]``.
            teacher_logits: ``[M, K]``, of the same patches.
            masks: ``[B, N]`` bool, True for the M masked patches.
            teacher_temp: tau_t.
            masks_weight: ``[M]``, the weight of each patch, in place of 1 / |M_b|.
        """
        patches = torch.arange(student_logits.shape[0], device=student_logits.device)
        center = self.center.flatten()
        temps = (self.student_temp, teacher_temp)
        loss = dino_loss(student_logits, teacher_logits, center, patches, patches, *temps)
        if masks_weight is None:
            counts = masks.sum(dim=1)
            masks_weight = torch.repeat_interleave(1 / counts, counts, output_size=len(patches))
        return (loss * masks_weight).sum() / max(1, masks.shape[0])


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
