"""The networks of MUSE for the two baselines of `bench step`, in plain eager PyTorch.

Nothing here comes from the engine, so that a change of the engine never changes its baselines; only the names of the
parameters are the engine's, so that one state dict fits all. Shapes as in :mod:`muse_fast.batch`, and

    I  images of one resolution    R  their side in pixels    T  patch tokens    C  width of the encoder
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast.config import PretrainConfig
from muse_fast.errors import UserError

PATCH, DEPTH, TAPPED_LAYERS = 16, 12, (2, 5, 8, 11)
VIT_DIM_AND_HEADS = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}
RESNET_WIDTHS = (256, 512, 1024, 2048)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def stored_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that stores its ``[I, heads, T, T]`` weights."""
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [I, 1 + T, C] -> [I, 1 + T, C]
        images, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(images, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(images, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, drop_path: float, attend: Attend) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads, attend), Mlp(dim)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropped(self.attn(self.norm1(x)))
        return x + self.dropped(self.mlp(self.norm2(x)))

    def dropped(self, x: Tensor) -> Tensor:
        """Stochastic depth: a branch of an image is skipped, or scaled up to compensate."""
        if not self.drop_path:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * (kept.to(x.dtype) / (1 - self.drop_path))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:  # [I, 3, R, R] -> [I, T, C]
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(self, dim: int, heads: int, drop_path: float, image_size: int, attend: Attend) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // PATCH) ** 2, dim))
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / (DEPTH - 1), attend) for i in range(DEPTH))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def position(self, grid: int) -> Tensor:
        """Return the position embedding for ``grid x grid`` tokens, resized as in DINO if it has another size."""
        stored = math.isqrt(self.pos_embed.shape[1] - 1)
        if stored == grid:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (stored, stored))
        patches = F.interpolate(patches, scale_factor=(grid + 0.1) / stored, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the tokens ``[I, 1 + T, C]`` after every tapped layer, each through the final norm."""
        cls = self.cls_token.expand(len(images), -1, -1)
        x = torch.cat([cls, self.patch_embed(images)], dim=1) + self.position(images.shape[-1] // PATCH)
        taps = []
        for layer, block in enumerate(self.blocks):
            x = block(x)
            if layer in TAPPED_LAYERS:
                taps.append(self.norm(x))
        return taps


class ViTEncoder(nn.Module):
    def __init__(self, dim: int, heads: int, drop_path: float, image_size: int, attend: Attend) -> None:
        super().__init__()
        self.encoder = VisionTransformer(dim, heads, drop_path, image_size, attend)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:  # image features, four maps [I, C, g, g]
        taps, grid = self.encoder(images), images.shape[-1] // PATCH
        return taps[-1][:, 0], [tap[:, 1:].transpose(1, 2).unflatten(2, (grid, grid)) for tap in taps]


class ResNetEncoder(nn.Module):
    def __init__(self, drop_path: float) -> None:
        super().__init__()
        import timm

        self.encoder = timm.create_model(
            "resnet50", features_only=True, out_indices=(1, 2, 3, 4), drop_path_rate=drop_path
        )

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:  # image features, four maps
        maps = self.encoder(images)
        return maps[-1].mean((2, 3)), maps


class ConvBN(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, relu: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.layer = nn.Sequential(conv, nn.BatchNorm2d(outputs), *[nn.ReLU(inplace=True)] * relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBN(width, width, 3, relu=True), ConvBN(width, width, 3, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.conv1(x)) + x)


class UpBlock(nn.Module):
    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__()
        self.first_block, self.last_block = ConvBN(coarse + fine, fine, 3, relu=True), ResidualBlock(fine)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return self.last_block(self.first_block(torch.cat([resize(coarse, fine.shape[-1]), fine], dim=1)))


class HyperFeats(nn.Module):
    def __init__(self, widths: Sequence[int], level_dim: int) -> None:
        super().__init__()
        self.conv_list = nn.ModuleList(ConvBN(width, level_dim, 1, relu=False) for width in widths)


class Decoder(nn.Module):
    """Four encoder maps -> four projected levels at strides 4, 8, 16, 32; those of a ViT become a pyramid first."""

    def __init__(self, widths: Sequence[int], level_dim: int, token_dim: int = 0) -> None:
        super().__init__()
        w1, w2, w3, w4 = widths
        self.decoder3, self.decoder2, self.decoder1 = UpBlock(w4, w3), UpBlock(w3, w2), UpBlock(w2, w1)
        self.hyper_feats = HyperFeats(widths, level_dim)
        if token_dim:
            self.dim_map_layers = nn.ModuleList(nn.Conv2d(token_dim, width, 1, bias=False) for width in widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if hasattr(self, "dim_map_layers"):
            grid = maps[0].shape[-1]
            sides = 4 * grid, 2 * grid, grid, grid // 2
            layers = zip(self.dim_map_layers, maps, sides, strict=True)
            maps = [resize(layer(tokens), side) for layer, tokens, side in layers]
        e1, e2, e3, e4 = maps
        d3 = self.decoder3(e4, e3)
        d2 = self.decoder2(d3, e2)
        d1 = self.decoder1(d2, e1)
        return [project(x) for project, x in zip(self.hyper_feats.conv_list, (d1, d2, d3, e4), strict=True)]


def resize(x: Tensor, side: int) -> Tensor:
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="bilinear", align_corners=True)


class Head(nn.Module):
    """MLP to the unit sphere, then cosines to K prototypes: ``[N, in_dim]`` -> logits ``[N, K]``."""

    def __init__(self, in_dim: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes_v = nn.Parameter(torch.empty(prototypes, bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.mlp(x).float(), dim=-1)
        return F.linear(z, F.normalize(self.prototypes_v, dim=-1))


class Backbone(nn.Module):
    """Encoder and decoder: images -> image features ``[I, image_dim]`` and four levels ``[I, dense_dim / 4, h, h]``."""

    def __init__(self, arch: str, drop_path: float, image_size: int, attend: Attend) -> None:
        super().__init__()
        self.encoder: nn.Module
        if arch == "resnet50":
            self.image_dim, self.dense_dim = RESNET_WIDTHS[-1], RESNET_WIDTHS[-1] // 2
            self.encoder = ResNetEncoder(drop_path)
            self.decoder = Decoder(RESNET_WIDTHS, self.dense_dim // 4)
        elif arch not in VIT_DIM_AND_HEADS:
            raise UserError(f"there is no baseline for {arch}")
        else:
            dim, heads = VIT_DIM_AND_HEADS[arch]
            self.image_dim = self.dense_dim = dim
            self.encoder = ViTEncoder(dim, heads, drop_path, image_size, attend)
            self.decoder = Decoder((dim // 4, dim // 2, dim, 2 * dim), dim // 4, token_dim=dim)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        cls, maps = self.encoder(images)
        return cls, self.decoder(maps)


class Network(nn.Module):
    """A backbone and the two heads."""

    def __init__(self, config: PretrainConfig, drop_path: float, attend: Attend) -> None:
        super().__init__()
        self.backbone = Backbone(config.model.arch, drop_path, config.views.global_size, attend)
        widths = config.head.hidden_dim, config.head.bottleneck_dim, config.head.prototypes
        self.image_head = Head(self.backbone.image_dim, *widths)
        self.nucleus_head = Head(self.backbone.dense_dim, *widths)


def student_and_teacher(
    config: PretrainConfig, state: dict[str, Tensor], device: torch.device, attend: Attend
) -> tuple[Network, Network]:
    """Build both with the weights of ``state``; the teacher does not drop paths and requires no gradient."""
    with torch.device(device):
        student, teacher = Network(config, config.model.drop_path, attend), Network(config, 0.0, attend)
    for network in (student, teacher):
        network.load_state_dict(state)
    return student, teacher.requires_grad_(False)
