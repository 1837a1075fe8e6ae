"""`load_backbone`: a backbone from a run, a checkpoint or a file, or with random weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from muse_fast.errors import UserError
from muse_fast.models.archs import ARCHS, find_arch
from muse_fast.models.backbone import Backbone, build_backbone
from muse_fast.models.official import official_pos_embed, read_official
from muse_fast.runtime.tensors import load_strictly, read_safetensors, some

COMPATS = ("exact", "muse_official")
ENCODER = "encoder.encoder."  # prefix of timm's names
POS_EMBED = f"{ENCODER}pos_embed"
TIMM_CONFIG, TIMM_WEIGHTS, TIMM_DECODER = "config.json", "model.safetensors", "decoder.safetensors"  # an export's files
log = logging.getLogger(__name__)


def load_backbone(arch: str | None, weights: str | Path | None = None, *, compat: str | None = None) -> Backbone:
    """Load a backbone in evaluation mode, float32, on the CPU.

    Args:
        arch: a name in `muse_fast.models.ARCHS`, such as ``vit_small``; None infers it from the weights.
        weights: a run folder (its newest checkpoint), a checkpoint folder, any export (``.safetensors``, ``.pth``
            or timm folder), an official ``.pth`` file, or ``"random:vit_small"``; None or ``"random"`` draws random
            weights for ``arch`` from torch's global generator.
        compat: ``"exact"`` uses the stored position embedding; ``"muse_official"`` resamples it as the
            authors' code does. Default: ``"muse_official"`` for a ``.pth`` that is not our export, else ``"exact"``.

    Raises:
        UserError: unknown arch or compat, no such path, a damaged file or one of another kind, weights of another arch,
            missing or unexpected tensors. The message names them.
    """
    if arch is not None:
        find_arch(arch)
    if compat not in (None, *COMPATS):
        raise UserError(f"unknown compat {compat!r}; expected one of {', '.join(COMPATS)}")
    if weights is None or str(weights).partition(":")[0] == "random":
        return build_backbone(_random_arch(arch, str(weights or "random"))).eval()

    path = Path(weights)
    found = _read(path)
    tensors = found.tensors
    found_arch = found.arch or infer_arch(tensors)
    if found_arch is None:
        raise UserError(f"{path}: not the weights of a MUSE backbone; its tensors are {some(sorted(tensors))}")
    if arch not in (None, found_arch):
        raise UserError(
            f"{path}: contains a {found_arch}, not the requested {arch}. Request {found_arch}, or omit the name."
        )

    if compat is None:
        compat = found.compat
    if compat == "muse_official" and POS_EMBED in tensors:
        tensors = {**tensors, POS_EMBED: official_pos_embed(tensors[POS_EMBED])}
    with torch.device("meta"):  # no memory and no random draws for values that the file replaces
        backbone = build_backbone(found_arch, image_size=stored_image_size(found_arch, tensors))
    backbone = backbone.to_empty(device="cpu")
    load_strictly(backbone, tensors, str(path))
    return backbone.eval()


def infer_arch(tensors: Mapping[str, Tensor]) -> str | None:
    """The arch whose mark is among the tensors, or None."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    marks = {name: arch.mark for name, arch in ARCHS.items()}
    return next((name for name, (tensor, shape) in marks.items() if shapes.get(f"encoder.{tensor}") == shape), None)


def _random_arch(arch: str | None, weights: str) -> str:
    named = weights.partition(":")[2] or arch
    if named is None:
        raise UserError("random weights need an arch, for example weights='random:vit_small'")
    if arch not in (None, named):
        raise UserError(f"weights {weights!r} contradict arch {arch!r}; omit one of them")
    return named


class _Found(NamedTuple):
    """Weights read from a path."""

    tensors: Mapping[str, Tensor]  # of the backbone, with our names
    arch: str | None = None  # if the source records one
    compat: str = "exact"  # how to use the position embedding


def _read(path: Path) -> _Found:
    if not path.exists():
        raise UserError(f"weights {path} do not exist; pass a run, a checkpoint, a .safetensors, a .pth or random:ARCH")
    if is_timm_folder(path):
        return _Found(_read_timm(path))
    if path.is_dir():
        return _read_checkpoint(path)
    if path.suffix == ".safetensors":
        return _Found(_strip(read_safetensors(path)))
    if path.suffix == ".pth":
        official = read_official(path)
        return _Found(official.tensors, compat=official.compat)
    raise UserError(
        f"weights {path}: unknown kind {path.suffix!r}; expected a folder, a .safetensors or an official .pth"
    )


def _read_checkpoint(folder: Path) -> _Found:
    from muse_fast.runtime import checkpoint

    folder = find_checkpoint(folder)
    arch = checkpoint.read_state(folder)["config"]["model"]["arch"]
    return _Found(_strip(checkpoint.read_tensors(folder, "teacher")), arch)


def find_checkpoint(folder: Path) -> Path:
    """The newest intact checkpoint of a run, or ``folder`` itself if it is a checkpoint; otherwise UserError."""
    from muse_fast.runtime import checkpoint

    if (folder / "checkpoints").is_dir():
        newest, problems = checkpoint.latest(folder)
        for problem in problems:
            log.warning("%s", problem)
        if newest is None:
            raise UserError(f"{folder}: no intact checkpoint in this run. {some(problems)}")
        return newest
    if not (folder / checkpoint.MANIFEST).exists():
        raise UserError(f"{folder}: neither a run (no checkpoints/) nor a checkpoint (no {checkpoint.MANIFEST})")
    return folder


def is_timm_folder(path: Path) -> bool:
    """Whether ``path`` is a folder that timm can load a model from."""
    return (path / TIMM_CONFIG).is_file() and (path / TIMM_WEIGHTS).is_file()


def _read_timm(folder: Path) -> dict[str, Tensor]:
    if not (folder / TIMM_DECODER).is_file():
        raise UserError(f"{folder}: {TIMM_DECODER} is missing; a timm model has no decoder, which nuclei need")
    encoder = {f"{ENCODER}{name}": tensor for name, tensor in read_safetensors(folder / TIMM_WEIGHTS).items()}
    return encoder | read_safetensors(folder / TIMM_DECODER)


def _strip(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Keep only the backbone: training files prefix its names with ``backbone.`` and contain heads; exports do not."""
    stripped = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    return stripped or tensors


def stored_image_size(arch: str, tensors: Mapping[str, Tensor]) -> int:
    """The side in pixels that the position embedding was stored for; 224 for a model without one, where any works."""
    pos_embed = tensors.get(POS_EMBED)
    return 224 if pos_embed is None else find_arch(arch).strides[-1] * math.isqrt(pos_embed.shape[1] - 1)
