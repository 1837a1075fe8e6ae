"""Student and teacher: one architecture, two sets of weights (figure 4 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muse_fast.batch import PackedNuclei
from muse_fast.config import OptimConfig, PretrainConfig
from muse_fast.images.imagenet import normalised
from muse_fast.models.backbone import Backbone, WithBackbone, build_backbone
from muse_fast.models.decoder import RowProjection
from muse_fast.models.encoder import Encoder, Maps
from muse_fast.models.heads import DINOHead, HeadOutput
from muse_fast.training.graphs import Graphed


class Outputs(NamedTuple):
    """The outputs that losses read, by head: ``image`` has a row per view, ``nucleus`` a row per nucleus."""

    features: dict[str, Tensor]  # inputs of the heads: CLS features [images, C] and nucleus features [N, D]
    heads: dict[str, HeadOutput]


def backbone_of(config: PretrainConfig, **how: Any) -> Backbone:
    """Build the backbone of a run with random weights from torch's global generator.

    Args:
        how: ``drop_path``, ``attention`` and ``recompute`` of `muse_fast.models.backbone.build_backbone`.
    """
    model = config.model
    return build_backbone(
        model.arch,
        image_size=config.views.global_size,
        pos_embed_resize=model.pos_embed_resize,
        decoder_dim=model.decoder_dim,
        taps=model.taps,
        **how,
    )


class Network(WithBackbone):
    """Backbone and the two heads: one on CLS features, one on nucleus features.

    Attributes:
        train_encoder: if false, the encoder is frozen: no gradients, and `train` leaves it in evaluation mode.
        graphed: `dense` as CUDA graphs, or None.
    """

    def __init__(self, config: PretrainConfig, drop_path: float) -> None:
        super().__init__()
        model, head = config.model, config.head
        # The backbone is built first, so that its initial weights depend only on seed and architecture: the untrained
        # backbone of a run is `torch.manual_seed(seed); build_backbone(arch)`.
        self.backbone = backbone_of(config, drop_path=drop_path, attention=model.attention, recompute=model.recompute)
        widths = (head.hidden_dim, head.bottleneck_dim, head.prototypes)
        self.image_head = DINOHead(self.backbone.image_dim, *widths, input_norm=head.input_norm)
        self.nucleus_head = DINOHead(self.backbone.dense_dim, *widths, input_norm=head.input_norm)
        self.train_encoder = True
        self.graphed: Graphed | None = None

    @property
    def heads(self) -> dict[str, DINOHead]:
        return {"image": self.image_head, "nucleus": self.nucleus_head}

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        if not self.train_encoder:
            self.backbone.encoder.eval()
        return self

    def forward(
        self, groups: Sequence[Tensor], nuclei: Sequence[PackedNuclei], scales: Tensor | None = None
    ) -> Outputs:
        """Encode views and the nuclei in them.

        Args:
            groups: views of one resolution each, ``[images_i, 3, R_i, R_i]``, uint8 or normalised floats. BatchNorm
                computes its statistics per group, as usual in multi-crop training.
            nuclei: those in the views of each group.
            scales: of the encoder's residual branches, ``[branches, images]``, or None to drop none.
        """
        if self.graphed is None:
            cls, rows = encode(self.backbone, self._floats(groups), nuclei, scales, self.train_encoder)
            done: dict[str, HeadOutput] = {}
        else:
            cls, image, maps, projections = self.graphed(list(groups), scales)
            rows = self.backbone.decoder.rows(maps, projections, *_places(groups, nuclei))
            done = {"image": image}
        features = {"image": cls, "nucleus": rows}
        heads = {name: done.get(name) or head(features[name]) for name, head in self.heads.items()}
        return Outputs(features, heads)

    def dense(
        self, groups: Sequence[Tensor], scales: Tensor | None
    ) -> tuple[Tensor, HeadOutput, list[Maps], list[RowProjection]]:
        """The part of `forward` that does not depend on the nuclei: CLS features, their head, and what is sampled."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_encoder):
            cls, encoded = self.backbone.encoder(self._floats(groups), scales)
        return cls, self.image_head(cls), *self.backbone.decoder.sampled(encoded)

    def _floats(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Images in the dtype of the weights, or already in that of autocast if the encoder begins with a cast."""
        dtype, device = self.image_head.prototypes_v.dtype, groups[0].device.type
        if self.backbone.encoder.begins_with_convolution and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return [normalised(images, dtype).to(dtype) for images in groups]


def encode(
    backbone: Backbone,
    groups: Sequence[Tensor],
    nuclei: Sequence[PackedNuclei],
    scales: Tensor | None = None,
    train_encoder: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the CLS features ``[images, C]`` and nucleus features ``[N, D]`` of groups of views, group after group."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and train_encoder):
        cls, encoded = backbone.encoder(groups, scales)
    return cls, backbone.decoder.nucleus_rows(encoded, *_places(groups, nuclei))


def _places(groups: Sequence[Tensor], nuclei: Sequence[PackedNuclei]) -> tuple[list[tuple[Tensor, Tensor]], list[int]]:
    """Points and view sizes as `muse_fast.models.decoder.Decoder.nucleus_rows` takes them."""
    return [(part.xy, part.image_index()) for part in nuclei], [images.shape[-1] for images in groups]


def encoder_rates(encoder: Encoder, optim: OptimConfig) -> dict[str, float]:
    """Factor of the learning rate of each parameter of a `Network`'s encoder, by the network's names.

    Layer l gets ``encoder_lr_scale * layer_decay^(L - l)``, where L is what follows the encoder, as in BEiT (Bao et
    al., 2022).
    """
    names = [name for name, _ in encoder.encoder.named_parameters()]
    number = encoder.layer_numbers() if optim.layer_decay < 1 else dict.fromkeys([*names, ""], 0)
    return {
        f"backbone.encoder.encoder.{name}": optim.encoder_lr_scale * optim.layer_decay ** (number[""] - number[name])
        for name in names
    }


def build_student_and_teacher(config: PretrainConfig) -> tuple[Network, Network]:
    """Build a student and a teacher that starts as its copy, without drop path and without gradients."""
    torch.manual_seed(config.seed)
    student = Network(config, config.model.drop_path)
    teacher = Network(config, 0.0)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float, found_inf: Tensor) -> None:
    """``teacher = teacher - (1 - momentum) * (teacher - student)``, in place, for parameters only.

    This running mean is gradient ascent with the student as the gradient, and weight decay 1. So torch's fused SGD
    updates all tensors in a few launches, and skips the update as it skips that of the student, without asking the
    device. For a momentum above 0.5, `torch.lerp` rounds in the same way.

    The teacher's BatchNorm keeps its own running statistics, from its own forward passes.

    Args:
        found_inf: 0-dim float32 on their device, `muse_fast.training.guard.Guard`'s: 1 leaves the teacher as it is.
    """
    torch._fused_sgd_(
        list(teacher),
        list(student),
        [],
        lr=1 - momentum,
        weight_decay=1.0,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=found_inf,
    )
