"""Losses for DINO-style training: Triton kernels on CUDA, plain PyTorch elsewhere. See README.md.

The folder needs torch, triton for its kernels, and nothing from muse_fast: it can be copied and imported on its own.
"""

from .dinov2 import patch_dinov2
from .functional import dino_loss, linear_dino_loss, soft_cross_entropy
from .modules import DINOLoss, IBOTPatchLoss

__all__ = ["DINOLoss", "IBOTPatchLoss", "dino_loss", "linear_dino_loss", "patch_dinov2", "soft_cross_entropy"]
