"""Projection head of DINO (Caron et al., 2021), one for images and one for nuclei."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm over rows whose number varies, without parameters.

    A batch statistic needs two rows. With fewer, the running statistics normalise and are left as they are. A
    conversion to SyncBatchNorm replaces this class, whose branch on one rank's rows would leave the others waiting.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, affine=False)

    def forward(self, x: Tensor) -> Tensor:  # [N, dim] -> [N, dim]
        if self.training and x.shape[0] < 2:
            return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)
        return super().forward(x)


class DINOHead(nn.Module):
    """MLP to a bottleneck on the unit sphere, then cosine similarity to K prototypes.

    The prototypes are weight-normalised with their length frozen at 1, so only the direction of each row of
    ``prototypes_v`` counts. `forward` stops at the bottleneck: a loss may take ``z`` and ``prototypes()`` and never
    store the ``[N, K]`` logits.

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
        # Rows of length about 0.6. Adam moves every entry by about lr, so rows of unit variance would hardly turn.
        bound = bottleneck_dim**-0.5
        nn.init.uniform_(self.prototypes_v, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_dim]`` -> ``z [N, d]`` float32 with rows of length 1; N may be 0."""
        return F.normalize(self.mlp(self.input_norm(x)).float(), dim=-1)

    def prototypes(self) -> Tensor:
        """``[K, d]`` float32, rows of length 1."""
        return F.normalize(self.prototypes_v.float(), dim=-1)

    def logits(self, z: Tensor) -> Tensor:
        """``z [N, d]`` -> cosines to the prototypes, ``[N, K]``."""
        return F.linear(z, self.prototypes())
