"""Vision Transformer (Dosovitskiy et al., 2020) with the parameter names and shapes of timm.

timm's ``vit_{tiny,small,base}_patch16_224`` state dicts (``num_classes=0``) load by name. Shapes in this file:

    I  images    R  image side in pixels    g  tokens per side = R / 16    T  patch tokens = g * g    C  width

Images of several resolutions run together: their tokens are packed into one matrix of M rows, over which every linear
layer, norm and MLP runs once. Only attention needs to know which rows form an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from muse_fast import ops
from muse_fast.config import POS_EMBED_RESIZE
from muse_fast.errors import require
from muse_fast.models.attention import Layout, attend
from muse_fast.models.encoder import Encoder, check_image_size, check_images, conv_flops
from muse_fast.models.linear import Linear, linears
from muse_fast.ops.reference import bias_gradient

PATCH = 16
DEPTH = 12
TAPPED_LAYERS = (2, 5, 8, 11)


def resize_pos_embed(pos_embed: Tensor, grid: int, rule: str) -> Tensor:
    """Resize a position embedding ``[1, 1 + h * h, C]`` to ``[1, 1 + grid * grid, C]``; CLS does not change.

    Bicubic without antialiasing, see `resampling` for ``rule``; an embedding of the right size is returned as is.
    """
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old == grid:
        return pos_embed
    # The resize is linear and separable, so one small matrix serves both axes. Its backward is a matmul, deterministic
    # on a GPU, unlike that of F.interpolate(mode="bicubic").
    axis = resampling(old, grid, rule, pos_embed.device).to(pos_embed.dtype)
    patches = pos_embed[0, 1:].unflatten(0, (old, old))  # [h, h, C]
    with torch.autocast(pos_embed.device.type, enabled=False):
        patches = torch.einsum("yi,ijc->yjc", axis, patches)
        patches = torch.einsum("xj,yjc->yxc", axis, patches)
    return torch.cat([pos_embed[:, :1], patches.flatten(0, 1)[None]], dim=1)


def resampling(old: int, new: int, rule: str, device: torch.device | None = None) -> Tensor:
    """The weights ``[new, old]``, float64, by which an axis of ``old`` cells is resized bicubically to ``new``.

    The middle of new cell i lies at ``(i + 1/2) / s - 1/2`` old cells. The scale s is, by ``rule``,

        scale_factor    ``(new + 0.1) / old``, as in DINO, MUSE and the default of DINOv2: the new cells leave
                        out the last 0.1 of a new cell
        size            ``new / old``: the new cells cover the old ones exactly
    """
    identity = torch.eye(old, dtype=torch.float64, device=device)[None, None]
    target: dict[str, Any] = {"size": (new, old)} if rule == "size" else {"scale_factor": ((new + 0.1) / old, 1.0)}
    return F.interpolate(identity, **target, mode="bicubic", align_corners=False)[0, 0]


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:  # [I, 3, R, R] -> [I, T, C]
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout, qkv: Linear, proj: Linear) -> Tensor:  # [M, C] -> [M, C]
        return proj(attend(qkv(x), self.heads, layout, self.backend, qkv.bias))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, fc1: Linear, fc2: Linear) -> Tensor:  # [M, C] -> [M, C]
        return fc2(fc1.gelu(x) if self._is_target(x) else ops.gelu(fc1(x), fc1.bias))

    def _is_target(self, x: Tensor) -> bool:
        """Whether the result is a target of training in 16 bits on a GPU: their rounding changes features more than the
        tanh form of GELU does (bench/README.md).
        """
        return self.training and not torch.is_grad_enabled() and x.is_cuda and x.itemsize == 2


class Stream(NamedTuple):
    """The residual stream ``x + scale * branch``. Its last branch is added where the sum is normalised, in one pass."""

    x: Tensor  # [M, C]
    branch: Tensor | None = None  # [M, C]
    scale: Tensor | None = None  # [M, 1]; None is 1
    bias: Tensor | None = None  # [C], in the branch; gets its gradient where the branch is added

    def added(self) -> Tensor:
        """The sum ``[M, C]``."""
        if self.branch is None:
            return self.x
        branch = bias_gradient(self.branch, self.bias)
        return self.x + (branch if self.scale is None else branch * self.scale)

    def normalised(self, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The sum and ``norm`` of it, both ``[M, C]``; LayerNorm has the dtype of autocast."""
        if isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None:
            x, branch, scale, bias = self
            return ops.add_layer_norm(x, branch, scale, norm.weight, norm.bias, norm.eps, branch_bias=bias)
        x = self.added()
        return x, norm(x)


class StreamNorm(nn.LayerNorm):
    """LayerNorm of a stream whose last branch is added first."""

    def forward(self, stream: Any) -> Any:  # Stream -> the sum and its norm, both [M, C]
        x, branch, scale, bias = stream
        return ops.add_layer_norm(x, branch, scale, self.weight, self.bias, self.eps, branch_bias=bias)


class Layer(nn.Module):
    """Base of transformer layers. ``recompute`` selects activations that the backward recomputes instead of storing."""

    def __init__(self, recompute: str) -> None:
        super().__init__()
        self.recompute = recompute

    def forward(self, *inputs: Any) -> Stream:
        """``layer(*inputs)``."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.layer(*inputs)
        # Nothing in a layer draws random numbers, so there is no random state to restore.
        how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.recompute == "selective":
            return checkpoint(self.layer, *inputs, **how, context_fn=_keep_matmuls)
        # The backward of the next layer starts from the sum: one matrix to store instead of two.
        return Stream(checkpoint(lambda *inputs: self.layer(*inputs).added(), *inputs, **how))

    def layer(self, *inputs: Any) -> Stream:
        raise NotImplementedError


class Block(Layer):
    def __init__(self, dim: int, heads: int, attention: str, recompute: str) -> None:
        super().__init__(recompute)
        self.norm1 = StreamNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, attention)
        self.norm2 = StreamNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def layer(self, stream: Stream, layout: Layout, scales: Tensor | None) -> Stream:
        """Append two branches to the stream, with scales ``[2, M, 1]``."""
        first, second = (None, None) if scales is None else scales.unbind()
        qkv, proj, fc1, fc2 = linears(self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2)
        x, normed = self.norm1(stream)
        x, normed = self.norm2(Stream(x, self.attn(normed, layout, qkv, proj), first, proj.bias))
        # A view, as FSDP hooks every tensor that a layer returns, and a parameter would keep the hooks of all steps.
        bias = fc2.bias.view_as(fc2.bias) if torch.is_grad_enabled() else None
        return Stream(x, self.mlp(normed, fc1, fc2), second, bias)


def _keep_matmuls() -> Any:
    """Selective recomputation: store matmuls and attention; norms, GELU and sums are cheap to recompute."""
    return create_selective_checkpoint_contexts(kept())


def kept() -> list[Any]:
    """The operations whose results selective recomputation stores."""
    varlen = getattr(torch.ops.torch_attn, "_varlen_attn", None)  # exists once its module has been imported
    return _MATMULS if varlen is None else [*_MATMULS, varlen.default]


_MATMULS: list[Any] = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


class PackedTokens(NamedTuple):
    """Tokens of images of several resolutions, one matrix per tapped layer."""

    taps: tuple[Tensor, ...]  # four [M, C]; image after image, prefix tokens (CLS, registers) first
    layout: Layout
    prefix: int = 1  # prefix tokens per image; the others form a square grid

    def split(self, x: Tensor) -> list[Tensor]:
        """Packed rows ``[M, c]`` -> one ``[I, 1 + T, c]`` per resolution."""
        parts = x.split([images * tokens for images, tokens in self.layout])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.layout, strict=True)]


def scales_of_layers(scales: Tensor | None, layout: Layout, depth: int) -> Sequence[Tensor | None]:
    """Scales of residual branches per image ``[2 * depth, images]`` -> per layer and row, ``[2, M, 1]`` each."""
    if scales is None:
        return [None] * depth
    parts = zip(scales.split([images for images, _ in layout], dim=1), layout, strict=True)
    of_rows = torch.cat([part.repeat_interleave(count, dim=1) for part, (_, count) in parts], dim=1)
    return of_rows.view(depth, 2, -1, 1).unbind()


class VisionTransformer(nn.Module):
    """ViT with 16 px patches and 12 layers.

    Args:
        dim: width C.
        heads: attention heads per layer.
        image_size: side in pixels that the position embedding is stored for; it is resized on the fly for other sides.
        attention: backend of `muse_fast.models.attention.attend`.
        recompute: activations that the backward of a layer recomputes: ``none``, ``selective`` or ``full``.
        pos_embed_resize: rule of `resize_pos_embed` for these sides; UserError if there is no such rule.
    """

    def __init__(
        self, dim: int, heads: int, image_size: int, attention: str, recompute: str, pos_embed_resize: str
    ) -> None:
        super().__init__()
        check_image_size(image_size)
        require(
            pos_embed_resize in POS_EMBED_RESIZE, "pos_embed_resize", pos_embed_resize, " or ".join(POS_EMBED_RESIZE)
        )
        self.dim = dim
        self.pos_embed_resize = pos_embed_resize
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // PATCH) ** 2, dim))
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, attention, recompute) for _ in range(DEPTH))
        self.norm = StreamNorm(dim, eps=1e-6)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):  # the patch convolution is a linear layer on patches
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, groups: Sequence[Tensor], scales: Tensor | None = None) -> PackedTokens:
        """Tokens after layers 2, 5, 8 and 11, each through the final norm.

        Args:
            groups: images of one resolution each, ``[I, 3, R, R]``, R a multiple of 16 from 32 to 1024 (otherwise
                UserError).
            scales: of the residual branches per image, ``[2 * DEPTH, images of all groups]``, for stochastic depth.
        """
        tokens = [self.embed(images) for images in groups]
        layout = tuple((x.shape[0], x.shape[1]) for x in tokens)
        layer_scales = scales_of_layers(scales, layout, DEPTH)
        stream = Stream(torch.cat([x.flatten(0, 1) for x in tokens]))
        taps = []
        for layer, block in enumerate(self.blocks):
            stream = block(stream, layout, layer_scales[layer])
            if layer in TAPPED_LAYERS:
                x, tap = self.norm(stream)
                stream = Stream(x)
                taps.append(tap)
        return PackedTokens(tuple(taps), layout)

    def embed(self, images: Tensor) -> Tensor:
        """``[I, 3, R, R]`` -> CLS and patch tokens with their positions, ``[I, 1 + T, C]``."""
        check_images(images)
        cls = self.cls_token.expand(images.shape[0], -1, -1)
        positions = resize_pos_embed(self.pos_embed, images.shape[-1] // PATCH, self.pos_embed_resize)
        return torch.cat([cls, self.patch_embed(images)], dim=1) + positions


class ViTEncoder(Encoder):
    """The transformer as an encoder, which returns an image feature and tokens for the decoder.

    Stochastic depth rises linearly from 0 at the first layer to ``drop_path`` at the last.
    """

    begins_with_convolution = True

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        drop_path: float = 0.0,
        image_size: int = 224,
        attention: str = "sdpa",
        recompute: str = "none",
        pos_embed_resize: str = "scale_factor",
    ) -> None:
        super().__init__()
        self.encoder = VisionTransformer(dim, heads, image_size, attention, recompute, pos_embed_resize)
        self.drop_rates = [drop_path * layer / (DEPTH - 1) for layer in range(DEPTH) for _ in range(2)]

    @property
    def layers(self) -> nn.ModuleList:
        return self.encoder.blocks

    def layer_patterns(self) -> dict[str, Any]:
        norm = (r"^norm", (99_999,))  # timm's number for what belongs to the layer before it
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None), norm]}

    def forward(self, groups: Sequence[Tensor], scales: Tensor | None = None) -> tuple[Tensor, PackedTokens]:
        """Groups of images -> CLS of the last tapped layer ``[images, C]``, and the tapped tokens."""
        tokens = self.encoder(groups, scales)
        cls = torch.cat([part[:, 0] for part in tokens.split(tokens.taps[-1])])
        return cls.to(self.encoder.cls_token.dtype), tokens  # tokens have the dtype of autocast


def vit_flops(dim: int, size: int) -> int:
    """FLOPs of one forward over an image of ``size`` pixels."""
    grid = size // PATCH
    tokens = grid**2 + 1
    linear = 2 * tokens * 12 * dim**2  # qkv 3, output 1, MLP 4 + 4
    attention = 2 * 2 * tokens**2 * dim  # scores, and the mean of the values
    return conv_flops(grid, 3, dim, PATCH) + DEPTH * (linear + attention)
