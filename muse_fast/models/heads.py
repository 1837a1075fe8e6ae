"""Projection head of DINO (Caron et al., 2021), used for images and for nuclei."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast.models.norm import RowBatchNorm


class HeadOutput(NamedTuple):
    """The two factors of a head's logits, with rows of length 1."""

    z: Tensor  # [N, d]
    prototypes: Tensor  # [K, d]

    def logits(self) -> Tensor:
        """Cosines between rows and prototypes, ``[N, K]``."""
        return F.linear(self.z, self.prototypes)


class DINOHead(nn.Module):
    """MLP to a bottleneck on the unit sphere, then cosine similarity to K prototypes.

    The prototypes are weight-normalised with their length frozen at 1, so only the direction of each row of
    ``prototypes_v`` counts. `forward` does not compute the logits: a loss may use the two factors without storing the
    ``[N, K]`` product.

    Args:
        in_dim, hidden_dim, bottleneck_dim, num_prototypes: widths; the paper's are C, 2048, 256 and 65536.
        input_norm: LayerNorm and BatchNorm (no affine) before the MLP, which keeps small runs from collapsing.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int, input_norm: bool = False
    ) -> None:
        super().__init__()
        self.input_norm = nn.Sequential(nn.LayerNorm(in_dim), RowBatchNorm(in_dim)) if input_norm else nn.Identity()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes_v = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # Rows of length about 0.6. Adam moves every entry by about lr, so rows of unit variance would barely turn.
        bound = bottleneck_dim**-0.5
        nn.init.uniform_(self.prototypes_v, -bound, bound)

    def forward(self, x: Tensor) -> HeadOutput:
        """``[N, in_dim]`` -> ``z`` and the prototypes, in at least float32; N may be 0."""
        z = self.mlp(self.input_norm(x))
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
        return HeadOutput(z, self.prototypes())

    def prototypes(self) -> Tensor:
        """``[K, d]``, rows of length 1."""
        v = self.prototypes_v
        return torch._weight_norm(v, v.new_ones(len(v), 1), 0)  # F.normalize is four times slower on this matrix
