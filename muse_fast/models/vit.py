"""Vision Transformer (Dosovitskiy et al., 2020) with the parameter names and shapes of timm.

timm's ``vit_{tiny,small,base}_patch16_224`` state dicts (``num_classes=0``) load by name. Shapes in this file:

    I  images    R  image side in pixels    g  tokens per side = R / 16    T  patch tokens = g * g    C  width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast.errors import UserError

PATCH = 16
DEPTH = 12
TAPPED_LAYERS = (2, 5, 8, 11)
MIN_SIDE, MAX_SIDE = 32, 1024


def check_images(images: Tensor) -> None:
    """Raise UserError unless ``images`` is ``[I, 3, R, R]`` with R a multiple of 16 from 32 to 1024."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise UserError(f"images must be square, [I, 3, R, R]; got {list(images.shape)}. Crop or pad them first.")
    check_image_size(images.shape[-1])


def check_image_size(side: int) -> None:
    """Raise UserError unless ``side`` is a multiple of 16 from 32 to 1024 pixels."""
    if side % PATCH or not MIN_SIDE <= side <= MAX_SIDE:
        raise UserError(
            f"an image side of {side} px does not fit: it must be a multiple of {PATCH} "
            f"from {MIN_SIDE} to {MAX_SIDE}. Resize or pad the images, or cut larger ones into tiles."
        )


def resize_pos_embed(pos_embed: Tensor, grid: int) -> Tensor:
    """Resize a position embedding ``[1, 1 + h * h, C]`` to ``[1, 1 + grid * grid, C]``; CLS is kept as it is.

    Bicubic without antialiasing, as DINO and MUSE do; a table of the right size is returned untouched.
    """
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old == grid:
        return pos_embed
    # The resize is linear and separable: one small matrix, read off the identity, serves both axes. Its backward is a
    # matmul, deterministic on a GPU, where that of F.interpolate(mode="bicubic") is not.
    identity = torch.eye(old, dtype=torch.float64, device=pos_embed.device)
    axis = F.interpolate(identity[None, None], size=(grid, old), mode="bicubic", align_corners=False)[0, 0]
    axis = axis.to(pos_embed.dtype)  # [grid, h]
    patches = pos_embed[0, 1:].unflatten(0, (old, old))  # [h, h, C]
    with torch.autocast(pos_embed.device.type, enabled=False):
        patches = torch.einsum("yi,ijc->yjc", axis, patches)
        patches = torch.einsum("xj,yjc->yxc", axis, patches)
    return torch.cat([pos_embed[:, :1], patches.flatten(0, 1)[None]], dim=1)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (Huang et al., 2016): zero whole samples of ``x [I, ...]``, scale the rest by 1 / (1 - rate)."""
    if rate == 0.0 or not training:
        return x
    kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - rate)
    return x * (kept / (1 - rate))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:  # [I, 3, R, R] -> [I, T, C]
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [I, 1 + T, C] -> [I, 1 + T, C]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [I, heads, 1 + T, C / heads]
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


class VisionTransformer(nn.Module):
    """ViT with 16 px patches and 12 layers.

    Args:
        dim: width C.
        heads: attention heads per layer.
        drop_path: stochastic depth of the last layer; it grows linearly from 0 at the first.
        image_size: side in pixels that the position embedding is stored for; other sides resize it on the fly.
    """

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0, image_size: int = 224) -> None:
        super().__init__()
        check_image_size(image_size)
        self.dim = dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // PATCH) ** 2, dim))
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / (DEPTH - 1)) for i in range(DEPTH))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):  # the patch convolution is a linear layer on patches
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_taps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Tokens after layers 2, 5, 8 and 11, each through the final norm.

        Args:
            images: ``[I, 3, R, R]``, R a multiple of 16 from 32 to 1024 (UserError otherwise).

        Returns:
            four tensors ``[I, 1 + T, C]``, CLS first.
        """
        check_images(images)
        patches = self.patch_embed(images)
        cls = self.cls_token.expand(images.shape[0], -1, -1)
        x = torch.cat([cls, patches], dim=1) + resize_pos_embed(self.pos_embed, images.shape[-1] // PATCH)
        taps = []
        for layer, block in enumerate(self.blocks):
            x = block(x)
            if layer in TAPPED_LAYERS:
                taps.append(self.norm(x))
        return tuple(taps)


class ViTEncoder(nn.Module):
    """The transformer and the way its tokens leave it: an image feature and four maps."""

    def __init__(self, dim: int, heads: int, drop_path: float, image_size: int) -> None:
        super().__init__()
        self.encoder = VisionTransformer(dim, heads, drop_path, image_size)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``[I, 3, R, R]`` -> CLS of the last tapped layer ``[I, C]``, four patch maps ``[I, C, g, g]``."""
        grid = images.shape[-1] // PATCH
        taps = self.encoder.forward_taps(images)
        maps = tuple(tap[:, 1:].transpose(1, 2).unflatten(2, (grid, grid)) for tap in taps)
        return taps[-1][:, 0], maps
