"""Losses for DINO-style training: Triton kernels on CUDA, plain PyTorch elsewhere. See README.md.

The folder needs torch, triton for its kernels, and nothing from muse_fast: it can be copied and imported on its own.
"""

from .functional import dino_loss, linear_dino_loss, soft_cross_entropy
from .modules import DINOLoss, iBOTPatchLoss
from .patches import patch_dino, patch_dinov2, patch_dinov3
from .sinkhorn import sinkhorn_knopp

__all__ = [
    "DINOLoss",
    "dino_loss",
    "iBOTPatchLoss",
    "linear_dino_loss",
    "patch_dino",
    "patch_dinov2",
    "patch_dinov3",
    "sinkhorn_knopp",
    "soft_cross_entropy",
]
