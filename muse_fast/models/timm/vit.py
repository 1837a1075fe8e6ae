"""Plain ViTs of timm over packed tokens: images of several resolutions in one pass, as `muse_fast.models.vit` does it.

The parameters are those of timm's ``VisionTransformer`` and ``Eva`` (EVA-02, DINOv3) under their own names: any width,
depth and patch size, CLS and register tokens, absolute or rotary positions, layer scale, SwiGLU, norms of queries and
keys, norm before or after a branch. Norms, layer scale and MLPs are timm's modules, run over all rows at once;
attention is `muse_fast.models.attention`. Shapes as in `muse_fast.models.vit`, and P is the number of prefix tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_fast.models.attention import Layout, attend
from muse_fast.models.encoder import Encoder, check_images
from muse_fast.models.norm import over_ranks
from muse_fast.models.timm.networks import PixelStatistics
from muse_fast.models.vit import Layer, PackedTokens, Stream, scales_of_layers

POST_NORM = ("ResPostBlock", "EvaBlockPostNorm")
BLOCKS = ("Block", "EvaBlock", *POST_NORM)
ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")


def can_pack(network: Any) -> bool:
    """Whether `TimmViTEncoder` can run the network."""
    return type(network).__name__ in ("VisionTransformer", "Eva") and all(
        type(block).__name__ in BLOCKS and type(block.attn).__name__ in ATTENTIONS for block in network.blocks
    )


class TimmViTEncoder(Encoder):
    """Image features as the network pools them, and the tokens of four layers, each through the final norm.

    Stochastic depth rises linearly from 0 at the first layer to ``drop_path`` at the last.

    Args:
        network: as timm builds it with ``dynamic_img_size=True``; its blocks are replaced by `PackedBlock`.
        taps: numbers of the four layers.
        sides: allowed sides of an image.
        statistics: of the pixels that the network expects.
        attention: backend of `muse_fast.models.attention.attend`.
        recompute: see `muse_fast.models.vit.Layer`.
    """

    def __init__(
        self,
        network: Any,
        taps: Sequence[int],
        sides: range,
        statistics: PixelStatistics,
        *,
        drop_path: float,
        attention: str,
        recompute: str,
    ) -> None:
        super().__init__()
        self.taps, self.sides, self.statistics = tuple(taps), sides, statistics
        self.prefix = network.num_prefix_tokens
        depth = len(network.blocks)
        network.blocks = nn.ModuleList(PackedBlock(one, self.prefix, attention, recompute) for one in network.blocks)
        self.drop_rates = [drop_path * layer / max(1, depth - 1) for layer in range(depth) for _ in range(2)]
        self.encoder = network
        over_ranks(network)  # some have convolutions with BatchNorm before the patches
        self.rope = getattr(network, "rope", None)
        if self.rope is not None:
            # It would draw from torch's generator; the views are already of random scales.
            self.rope.aug_active = False
        self._rotations: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def layers(self) -> Any:
        return self.encoder.blocks

    def forward(self, groups: Sequence[Tensor], scales: Tensor | None = None) -> tuple[Tensor, PackedTokens]:
        """Groups of images -> image features ``[images, C]``, and the tapped tokens.

        Args:
            groups: images of one resolution each, ``[I, 3, R, R]``, R among ``sides`` (otherwise UserError).
            scales: of the residual branches per image, ``[2 * depth, images of all groups]``, for stochastic depth.
        """
        network = self.encoder
        tokens = [self.embed(images) for images in groups]
        layout = tuple((x.shape[0], x.shape[1]) for x in tokens)
        rotations = [self._rotation(math.isqrt(count - self.prefix)) for _, count in layout]
        depth = len(network.blocks)
        layer_scales = scales_of_layers(scales, layout, depth)
        stream = Stream(network.norm_pre(torch.cat([x.flatten(0, 1) for x in tokens])))
        tapped = {}
        for layer, block in enumerate(network.blocks):
            stream = block(stream, layout, [_of_layer(one, layer) for one in rotations], layer_scales[layer])
            if layer in self.taps or layer == depth - 1:
                x, tapped[layer] = stream.normalised(network.norm)
                stream = Stream(x)
        packed = PackedTokens(tuple(tapped[layer] for layer in self.taps), layout, self.prefix)
        pooled = torch.cat([self.pool(part) for part in packed.split(tapped[depth - 1])])
        return pooled.to(stream.x.dtype), packed  # tokens have the dtype of autocast

    def embed(self, images: Tensor) -> Tensor:
        """``[I, 3, R, R]`` -> prefix and patch tokens with their positions, ``[I, P + T, C]``."""
        check_images(images, self.sides)
        network = self.encoder
        patches = network.patch_embed(self.statistics.convert(images))  # [I, g, g, C]
        grid, patches = patches.shape[1], patches.flatten(1, 2)
        prefix = [one.expand(len(images), -1, -1) for one in (network.cls_token, network.reg_token) if one is not None]
        if network.pos_embed is None:
            return torch.cat([*prefix, patches], dim=1)
        if network.no_embed_class:
            return torch.cat([*prefix, patches + resize_positions(network.pos_embed, grid, 0)], dim=1)
        return torch.cat([*prefix, patches], dim=1) + resize_positions(network.pos_embed, grid, self.prefix)

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens after the final norm ``[I, P + T, C]`` -> image features ``[I, C]``, as timm pools them."""
        pooled = self.encoder.forward_head(tokens, pre_logits=True)
        if pooled.ndim == 2:
            return pooled
        # Networks of timm without pooling return all tokens.
        return pooled[:, 0] if self.encoder.cls_token is not None else pooled.mean(dim=1)

    def _rotation(self, grid: int) -> Tensor | None:
        """Sine and cosine of the rotary positions of a grid: ``[T, 2d]``, or ``[layers, heads, T, 2d]`` if learned."""
        if self.rope is None:
            return None
        if any(True for _ in self.rope.parameters()):
            return self.rope.get_embed(shape=(grid, grid))
        key = grid, next(self.encoder.parameters()).device
        if key not in self._rotations:
            # Some are computed on the host. Outside inference mode, as the training may use those of an evaluation.
            with torch.inference_mode(False):
                self._rotations[key] = self.rope.get_embed(shape=(grid, grid)).to(key[1])
        return self._rotations[key]


def _of_layer(rotation: Tensor | None, layer: int) -> Tensor | None:
    """A rotation as ``[T, 1 or heads, 2d]``."""
    if rotation is None or rotation.ndim == 2:
        return rotation if rotation is None else rotation.unsqueeze(1)
    return rotation[layer].transpose(0, 1)


class PackedBlock(Layer):
    """A transformer layer of timm, with its parameters under the same names, over packed rows."""

    attn: Any
    mlp: Any
    norm1: Any
    norm2: Any

    def __init__(self, block: nn.Module, prefix: int, attention: str, recompute: str) -> None:
        super().__init__(recompute)
        self.prefix, self.attention = prefix, attention
        self.post_norm = type(block).__name__ in POST_NORM
        for name, module in block.named_children():
            self.add_module(name, module)
        for name, parameter in block.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def layer(
        self, stream: Stream, layout: Layout, rotations: Sequence[Tensor | None], scales: Tensor | None
    ) -> Stream:
        """Append two branches to the stream, with scales ``[2, M, 1]``."""
        first, second = (None, None) if scales is None else scales.unbind()
        if self.post_norm:
            x = stream.added()
            x = Stream(x, self.norm1(self.attend(x, layout, rotations)), first).added()
            return Stream(x, self.norm2(self.mlp(x)), second)
        x, normed = stream.normalised(self.norm1)
        x, normed = Stream(x, self.gained(self.attend(normed, layout, rotations), 1), first).normalised(self.norm2)
        return Stream(x, self.gained(self.mlp(normed), 2), second)

    def gained(self, x: Tensor, branch: int) -> Tensor:
        """Apply the layer scale of a branch, which timm keeps as a module or as a parameter."""
        if hasattr(self, f"ls{branch}"):
            return getattr(self, f"ls{branch}")(x)
        gain = getattr(self, f"gamma_{branch}", None)
        return x if gain is None else gain * x

    def attend(self, x: Tensor, layout: Layout, rotations: Sequence[Tensor | None]) -> Tensor:
        """Attention within each image, ``[M, C]`` -> ``[M, C]``."""
        attn = self.attn
        attended = attend(self._queries_keys_values(x, layout, rotations), attn.num_heads, layout, self.attention)
        attended = attn.norm(attended)
        if attn.gate is not None:
            attended = attended * attn.gate(x).sigmoid()
        return attn.proj(attended)

    def _queries_keys_values(self, x: Tensor, layout: Layout, rotations: Sequence[Tensor | None]) -> Tensor:
        """``[M, C]`` -> ``[M, 3 * heads * d]``."""
        attn = self.attn
        if attn.qkv is None:
            parts = [attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)]
        else:
            bias = getattr(attn, "q_bias", None)  # EVA's keys have none
            if bias is None:
                joint = attn.qkv(x)
            else:
                joint = F.linear(x, attn.qkv.weight, torch.cat([bias, torch.zeros_like(bias), attn.v_bias]))
            if rotations[0] is None and isinstance(attn.q_norm, nn.Identity):
                return joint
            parts = list(joint.chunk(3, dim=1))
        q, k, v = (part.unflatten(1, (-1, attn.head_dim)) for part in parts)  # [M, heads, d]
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rotations[0] is not None:
            half = getattr(attn, "rotate_half", False)
            q, k = (rotate(one, layout, rotations, self.prefix, half).to(v.dtype) for one in (q, k))
        repeats = attn.num_heads // k.shape[1]  # grouped queries share keys and values
        k, v = (one.repeat_interleave(repeats, dim=1) if repeats > 1 else one for one in (k, v))
        return torch.stack([q.to(v.dtype), k.to(v.dtype), v], dim=1).flatten(1)


def rotate(x: Tensor, layout: Layout, rotations: Sequence[Any], prefix: int, half: bool) -> Tensor:
    """Turn the patch rows of ``x [M, heads, d]`` by their rotary positions, ``[T, 1 or heads, 2d]`` per resolution."""
    from timm.layers import apply_rot_embed_cat

    sizes = [images * tokens for images, tokens in layout]
    turned = []
    for part, shape, rotation in zip(x.split(sizes), layout, rotations, strict=True):
        rows = part.unflatten(0, shape)  # [I, P + T, heads, d]
        patches = apply_rot_embed_cat(rows[:, prefix:], rotation, half=half)
        turned.append(torch.cat([rows[:, :prefix], patches], dim=1).flatten(0, 1))
    return torch.cat(turned)


def resize_positions(positions: Tensor, grid: int, prefix: int) -> Tensor:
    """Resize a position embedding ``[1, P + h * h, C]`` to ``[1, P + grid * grid, C]``; the prefix does not change.

    As timm: bicubic with antialiasing. The resize is a small matrix for each axis, because the backward of
    ``F.interpolate`` is not deterministic on a GPU.
    """
    old = math.isqrt(positions.shape[1] - prefix)
    if old == grid:
        return positions
    identity = torch.eye(old, dtype=torch.float64, device=positions.device)[None, None]
    axis = F.interpolate(identity, size=(grid, old), mode="bicubic", antialias=True)[0, 0].to(positions.dtype)
    patches = positions[0, prefix:].unflatten(0, (old, old))  # [h, h, C]
    with torch.autocast("cpu" if positions.is_meta else positions.device.type, enabled=False):
        patches = torch.einsum("yi,ijc->yjc", axis, patches)
        patches = torch.einsum("xj,yjc->yxc", axis, patches)
    return torch.cat([positions[:, :prefix], patches.flatten(0, 1)[None]], dim=1)
