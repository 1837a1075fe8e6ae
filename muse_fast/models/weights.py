"""`load_backbone`: a backbone from a run, a checkpoint or a file, or with random weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from muse_fast.config import POS_EMBED_RESIZE, RESIZE_UNRECORDED, PretrainConfig
from muse_fast.errors import UserError
from muse_fast.models.archs import ARCHS, find_arch
from muse_fast.models.backbone import Backbone, build_backbone, build_to_fill
from muse_fast.models.decoder import PYRAMID, dense_dim
from muse_fast.models.official import RESIZE, is_official, official_pos_embed, read_official
from muse_fast.models.timm.networks import PREFIX, load_file
from muse_fast.models.weight_files import TORCH_SUFFIXES, files_in, find_network, read_pth
from muse_fast.runtime.options import recorded_settings
from muse_fast.runtime.tensors import load_strictly, read_metadata, read_safetensors, some

COMPATS = ("exact", "muse_official")
COMPAT = "pos_embed_compat"  # key of an export's metadata, next to RESIZE
ENCODER = "encoder.encoder."  # prefix of timm's names
POS_EMBED = f"{ENCODER}pos_embed"
TIMM_CONFIG, TIMM_WEIGHTS, TIMM_DECODER = "config.json", "model.safetensors", "decoder.safetensors"  # an export's files
log = logging.getLogger(__name__)


def load_backbone(arch: str | None, weights: str | Path | None = None, *, compat: str | None = None) -> Backbone:
    """Load a backbone in evaluation mode, float32, on the CPU.

    Args:
        arch: a name in `muse_fast.models.ARCHS`, such as ``vit_small``, or ``timm:NAME[:key=value ...]``; None infers
            it from the weights.
        weights: a run folder (its newest checkpoint), a checkpoint folder, any export (``.safetensors``, ``.pth``
            or timm folder), an official ``.pth`` file, a file in which another script saved such a backbone, or
            ``"random:vit_small"``; None or ``"random"`` draws random weights for ``arch`` from torch's global
            generator. ``"timm:NAME[:key=value ...]@FILE"`` reads an encoder of timm from FILE, and draws the weights of
            the decoder.
        compat: ``"exact"`` uses the stored position embedding; ``"muse_official"`` does what the authors' code does: it
            resamples the embedding once, and resizes it to images of other sizes by DINO's rule (``scale_factor``).
            Default: ``"muse_official"`` for an official ``.pth`` and what was exported from it, else ``"exact"``.

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
    if str(weights).startswith(PREFIX):
        return _load_timm(arch, str(weights))

    return read_backbone(arch, Path(weights), compat)[0]


def read_backbone(arch: str | None, path: Path, compat: str | None = None) -> tuple[Backbone, list[str]]:
    """Read a backbone from a file or folder as `load_backbone` does; also returns the names of its other tensors."""
    found = _read(path)
    tensors = found.tensors
    found_arch = found.arch or infer_arch(tensors)
    if found_arch is None:
        raise UserError(
            f"{path}: not the weights of a MUSE backbone{_kind(tensors)}; its tensors are {some(sorted(tensors))}"
        )
    if arch not in (None, found_arch):
        raise UserError(
            f"{path}: contains a {found_arch}, not the requested {arch}. Request {found_arch}, or omit the name."
        )

    if found.compat not in COMPATS or found.pos_embed_resize not in POS_EMBED_RESIZE:
        raise UserError(
            f"{path}: records {COMPAT}={found.compat} and {RESIZE}={found.pos_embed_resize}; expected "
            f"{' or '.join(COMPATS)}, and {' or '.join(POS_EMBED_RESIZE)}. Export it again with this version"
        )
    compat = compat or found.compat
    rule = "scale_factor" if compat == "muse_official" else found.pos_embed_resize
    size, dim = stored_image_size(found_arch, tensors), stored_decoder_dim(found_arch, tensors)
    backbone = build_to_fill(
        found_arch,
        found.taps,
        lambda: build_backbone(found_arch, image_size=size, pos_embed_resize=rule, decoder_dim=dim, taps=found.taps),
    )
    load_strictly(backbone, tensors, str(path))
    backbone.load_state_dict(as_used(backbone.state_dict(), compat))
    return backbone.eval(), sorted(found.left_out)


def as_used(tensors: Mapping[str, Tensor], compat: str) -> Mapping[str, Tensor]:
    """The tensors of a backbone as `load_backbone` uses those that are stored."""
    if compat == "exact" or POS_EMBED not in tensors:
        return tensors
    return {**tensors, POS_EMBED: official_pos_embed(tensors[POS_EMBED])}


def default_compat(weights: str | Path) -> str:
    """The ``compat`` that `load_backbone` uses for ``weights`` if none is given; raises as it does."""
    return "exact" if str(weights).partition(":")[0] in ("random", "timm") else _read(Path(weights)).compat


def _load_timm(arch: str | None, weights: str) -> Backbone:
    named, _, file = weights.partition("@")
    if arch not in (None, named):
        raise UserError(f"weights {weights!r} contradict arch {arch!r}; omit one of them")
    if not file:
        raise UserError(f"{weights}: no weights; expected {weights}@FILE, or random:{weights} for random ones")
    if not Path(file).is_file():
        raise UserError(f"{weights}: no such file {file}; expected the weights of {named.removeprefix(PREFIX)}")
    backbone = build_backbone(named)
    report = load_file(backbone.encoder.encoder, named, Path(file))
    for key, what in (("left_out", "without"), ("converted", "converted by timm:")):
        if report[key]:
            log.info("%s: %s %s", file, what, some(report[key]))
    return backbone.eval()


def infer_arch(tensors: Mapping[str, Tensor]) -> str | None:
    """The arch whose mark is among the tensors, or None."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    marks = {name: arch.mark for name, arch in ARCHS.items() if arch.mark is not None}
    return next((name for name, (tensor, shape) in marks.items() if shapes.get(f"encoder.{tensor}") == shape), None)


def stored_decoder_dim(name: str, tensors: Mapping[str, Tensor]) -> int:
    """The ``decoder_dim`` with which a backbone of these tensors must be built; 0 if it follows from the encoder."""
    level = tensors.get("decoder.hyper_feats.conv_list.0.layer.0.weight")
    if level is None or "decoder.dim_map_layers.0.weight" not in tensors:
        return 0
    arch = find_arch(name)
    follows = arch.strides != PYRAMID and 4 * len(level) == dense_dim(arch.widths, arch.strides)
    return 0 if follows else 4 * len(level)


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
    pos_embed_resize: str = RESIZE_UNRECORDED  # rule by which a ViT resizes it to other sizes
    taps: tuple[int, ...] = ()  # layers whose maps the decoder receives, if they were chosen
    left_out: Sequence[str] = ()  # names of other tensors there


def _read(path: Path) -> _Found:
    if not path.exists():
        raise UserError(f"weights {path} do not exist; pass a run, a checkpoint, a .safetensors, a .pth or random:ARCH")
    if is_timm_folder(path):
        return _Found(_read_timm(path), **_recorded(path / TIMM_WEIGHTS))
    if path.is_dir():
        return _read_checkpoint(path)
    if path.suffix == ".safetensors":
        return _find(path, read_safetensors(path))._replace(**_recorded(path))
    if path.suffix in TORCH_SUFFIXES:
        content = read_pth(path)
        return _Found(**read_official(path)._asdict()) if is_official(content) else _find(path, content)
    raise UserError(
        f"weights {path}: unknown kind {path.suffix!r}; expected a folder, a .safetensors or a file of torch.save "
        f"({', '.join(TORCH_SUFFIXES)})"
    )


def _find(path: Path, content: Any) -> _Found:
    """The tensors of a backbone of ours in the content of a file, or all if it has none."""
    for mark in {arch.mark[0] for arch in ARCHS.values() if arch.mark is not None}:
        stored = find_network(path, content, [f"encoder.{mark}"])
        if infer_arch(stored.tensors):
            break
    return _Found(stored.tensors, left_out=stored.outside)


def _kind(tensors: Mapping[str, Tensor]) -> str:
    """What the weights of another network are, with what can use them."""
    if any(name.endswith(("patch_embed.proj.weight", "layer1.0.conv1.weight")) for name in tensors):
        return (
            ", but of an encoder without MUSE's decoder (evaluate and finetune take it as --weights timm:NAME@FILE, "
            "pretrain as model.init=timm:NAME@FILE)"
        )
    return ""


def _read_checkpoint(folder: Path) -> _Found:
    from muse_fast.runtime import checkpoint

    folder = find_checkpoint(folder)
    config = recorded_settings(PretrainConfig, checkpoint.read_state(folder)["config"])
    stored = checkpoint.read_tensors(folder, "teacher")
    return _Found(
        _strip(stored),
        config["model.arch"],
        pos_embed_resize=config["model.pos_embed_resize"],
        taps=tuple(config["model.taps"]),
        left_out=[name for name in stored if not name.startswith("backbone.")],
    )


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
        raise UserError(
            f"{folder}: neither a run (no checkpoints/) nor a checkpoint (no {checkpoint.MANIFEST}); if it is of "
            f"another project, {files_in(folder)}"
        )
    return folder


def is_timm_folder(path: Path) -> bool:
    """Whether ``path`` is a folder that timm can load a model from."""
    return (path / TIMM_CONFIG).is_file() and (path / TIMM_WEIGHTS).is_file()


def _read_timm(folder: Path) -> dict[str, Tensor]:
    if not (folder / TIMM_DECODER).is_file():
        raise UserError(f"{folder}: {TIMM_DECODER} is missing; a timm model has no decoder, which nuclei need")
    encoder = {f"{ENCODER}{name}": tensor for name, tensor in read_safetensors(folder / TIMM_WEIGHTS).items()}
    return encoder | read_safetensors(folder / TIMM_DECODER)


def _recorded(path: Path) -> dict[str, Any]:
    """What an export says about its network."""
    metadata = read_metadata(path)
    return {
        "arch": metadata.get("arch") if "muse_fast" in metadata else None,
        "compat": metadata.get(COMPAT, "exact"),
        "pos_embed_resize": metadata.get(RESIZE, RESIZE_UNRECORDED),
        "taps": tuple(json.loads(metadata.get("taps", "[]"))),
    }


def _strip(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Keep only the backbone: training files prefix its names with ``backbone.`` and contain heads; exports do not."""
    stripped = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    return stripped or tensors


def stored_image_size(name: str, tensors: Mapping[str, Tensor]) -> int:
    """The side in pixels that the position embedding was stored for; 224 for a model without one, where any works."""
    pos_embed = tensors.get(POS_EMBED)
    if pos_embed is None:
        return 224
    arch = find_arch(name)
    return arch.strides[-1] * math.isqrt(pos_embed.shape[1] - arch.prefix)
