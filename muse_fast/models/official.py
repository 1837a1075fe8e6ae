"""Reading the checkpoints that the authors of MUSE published.

Their ``.pth`` files contain ``{"teacher": {"module.backbone.<name>": tensor, ...}, ...}``. Without the prefix, the
names are ours. Nothing here runs code from a file.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_fast.config import RESIZE_UNRECORDED
from muse_fast.errors import UserError
from muse_fast.models.weight_files import read_pth

PREFIX = "module.backbone."
EXACT = "exact_pos_embed"  # key of our exports, next to "teacher": the tensors are used as stored
RESIZE = "pos_embed_resize"  # key of our exports: the rule by which the position embedding is resized to other sizes
RECORD = "muse_fast"  # key of our exports: a dict with their "arch" and "taps"
log = logging.getLogger(__name__)


class Official(NamedTuple):
    """Content of a ``.pth`` in the published layout."""

    tensors: dict[str, Tensor]  # of the teacher's backbone, with our names, on the CPU
    compat: str  # how to use its position embedding: "exact" for our exports, "muse_official" for the authors' files
    pos_embed_resize: str  # that of the authors' code is "scale_factor"
    arch: str | None  # of our exports
    taps: tuple[int, ...]  # the same
    left_out: list[str]  # names of other modules' tensors


def read_official(path: Path) -> Official:
    """Read a ``.pth`` of the authors, or one in their layout.

    Tensors of other modules (the pretraining heads) are skipped and logged.

    Raises:
        UserError: the file is a git-LFS pointer, is damaged, could run code, or has no such tensors.
    """
    content = _read_dict(path)
    teacher = content["teacher"]
    tensors = {name.removeprefix(PREFIX): value for name, value in teacher.items() if name.startswith(PREFIX)}
    if not tensors:
        raise UserError(f"{path}: no tensor under 'teacher' starts with {PREFIX!r}; it has {sorted(teacher)[:3]}, ...")
    ignored = sorted(name for name in teacher if not name.startswith(PREFIX))
    if ignored:
        log.info("%s: skipped %d tensors outside the backbone: %s", path, len(ignored), ", ".join(ignored))
    if EXACT not in content:
        return Official(tensors, "muse_official", "scale_factor", None, (), ignored)
    record = content.get(RECORD, {})
    rule = content.get(RESIZE, RESIZE_UNRECORDED)
    return Official(tensors, "exact", rule, record.get("arch"), tuple(record.get("taps", ())), ignored)


def is_official(content: Any) -> bool:
    """Whether the content of a file is in the published layout."""
    teacher = content.get("teacher") if isinstance(content, dict) else None
    return isinstance(teacher, dict) and any(str(name).startswith(PREFIX) for name in teacher)


def official_pos_embed(pos_embed: Tensor) -> Tensor:
    """The position embedding ``[1, 1 + g * g, C]`` as the authors' evaluation code loads it.

    Their loader is meant to skip the resize if the size already fits, but compares with the wrong number of patches, so
    every embedding is resampled bicubically by (g + 0.1) / g. The shape stays the same but the values change, and their
    published results were computed with the changed values. Their network resizes the result to images of other sizes
    by the rule ``scale_factor`` of `muse_fast.models.vit.resampling`.
    """
    grid = math.isqrt(pos_embed.shape[1] - 1)
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    patches = patches.transpose(1, 2).unflatten(2, (grid, grid))  # [1, C, g, g]
    scale = (grid + 0.1) / grid
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


def _read_dict(path: Path) -> dict[str, Any]:
    """Read a dict with a state dict under ``teacher``."""
    content = read_pth(path)
    teacher = content.get("teacher") if isinstance(content, dict) else None
    if not isinstance(teacher, dict) or not all(isinstance(value, Tensor) for value in teacher.values()):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path}: expected a dict with a state dict under 'teacher', as the MUSE files have; got {found}"
        )
    return content
