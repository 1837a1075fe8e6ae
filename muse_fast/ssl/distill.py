"""Student and teacher: one architecture, two sets of weights (figure 4 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muse_fast import ops
from muse_fast.batch import PackedNuclei
from muse_fast.config import HeadConfig, ModelConfig, PretrainConfig
from muse_fast.models.backbone import build_backbone
from muse_fast.models.heads import DINOHead


@dataclass(frozen=True, slots=True)
class Outputs:
    """Bottleneck features (L2-normalised) and logits of the two heads."""

    image_z: Tensor  # [images, d]
    image_logits: Tensor  # [images, K]
    nucleus_z: Tensor  # [N, d]
    nucleus_logits: Tensor  # [N, K]


class Network(nn.Module):
    """Backbone and the two heads: one on CLS features, one on nucleus features."""

    def __init__(self, model: ModelConfig, head: HeadConfig, *, image_size: int, drop_path: float) -> None:
        super().__init__()
        # The backbone is built first: its initial weights then depend on the seed and the architecture alone, and
        # an untrained twin of a run is `torch.manual_seed(seed); build_backbone(arch)`.
        self.backbone = build_backbone(model.arch, drop_path=drop_path, image_size=image_size)
        widths = (head.hidden_dim, head.bottleneck_dim, head.prototypes)
        self.image_head = DINOHead(self.backbone.image_dim, *widths, input_norm=head.input_norm)
        self.nucleus_head = DINOHead(self.backbone.dense_dim, *widths, input_norm=head.input_norm)

    def forward(self, groups: Sequence[Tensor], nuclei: PackedNuclei) -> Outputs:
        """Encode views and the nuclei in them.

        Args:
            groups: views of one resolution each, ``[images_i, 3, R_i, R_i]``. BatchNorm takes its statistics per
                group, as multi-crop training does.
            nuclei: of all images of all groups, in that order.
        """
        cls, rows = encode(self.backbone, groups, nuclei)
        image_z, nucleus_z = self.image_head(cls), self.nucleus_head(rows)
        return Outputs(image_z, self.image_head.logits(image_z), nucleus_z, self.nucleus_head.logits(nucleus_z))


def encode(backbone: nn.Module, groups: Sequence[Tensor], nuclei: PackedNuclei) -> tuple[Tensor, Tensor]:
    """CLS features ``[images, C]`` and nucleus features ``[N, D]`` of several groups of views."""
    cls, rows, first = [], [], 0
    for images in groups:
        features = backbone(images)
        part = nuclei.images(first, first + len(images))
        cls.append(features.cls)
        rows.append(ops.sample_nuclei(features.levels, part.xy, part.image_index(), images.shape[-1]))
        first += len(images)
    return torch.cat(cls), torch.cat(rows)


def build_student_and_teacher(config: PretrainConfig) -> tuple[Network, Network]:
    """A student and a teacher that starts as its copy. The teacher drops no paths and takes no gradient."""
    torch.manual_seed(config.seed)
    size = config.views.global_size
    student = Network(config.model, config.head, image_size=size, drop_path=config.model.drop_path)
    teacher = Network(config.model, config.head, image_size=size, drop_path=0.0)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """``teacher = momentum * teacher + (1 - momentum) * student``, parameters alone.

    The teacher's BatchNorm keeps running statistics of its own, from its own forward passes.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
