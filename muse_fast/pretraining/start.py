"""What a run begins with: ``model.init`` and checkpoints, read into the tensors of student, teacher and centres."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muse_fast.config import PretrainConfig
from muse_fast.errors import UserError
from muse_fast.models.archs import find_arch
from muse_fast.models.backbone import Backbone, build_to_fill
from muse_fast.models.timm.networks import PREFIX, load_file, parse_spec
from muse_fast.models.weights import find_checkpoint, is_timm_folder, read_backbone
from muse_fast.pretraining.distill import backbone_of
from muse_fast.runtime import checkpoint
from muse_fast.runtime.options import flatten, recorded_settings
from muse_fast.runtime.tensors import some

SAME = ("model.arch", "model.taps", "model.decoder_dim", "head.")  # settings that decide names and shapes
GROUPS = {  # of the report: key, and how it is printed
    "loaded": "loaded",
    "new": "new",
    "resized": "resized",
    "converted": "converted by timm",
    "left_out": "left out",
}


class Start(NamedTuple):
    """Tensors for student, teacher and centres; those of other parts stay as the seed has drawn them."""

    part: str  # prefix of the names in a `Network` that are all given
    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    centers: Mapping[str, Tensor] = {}  # by head
    about: Mapping[str, Any] = {}  # more groups of the report

    def report(self, names: Collection[str]) -> dict[str, Any]:
        """What was loaded and what is new among ``names`` of a `Network`, and what of the file was not used."""
        loaded = [name for name in names if name in self.student]
        new = [name for name in names if name not in self.student]
        centers = [] if self.centers else ["centers"]
        return {"loaded": loaded, "new": new + centers, **self.about}


def read_start(init: str, config: PretrainConfig) -> Start:
    """Read ``model.init``.

    Args:
        init: a run or checkpoint, which gives student, teacher, heads and centres; weights of a backbone that
            `load_backbone` reads (an official ``.pth``, any export), for student and teacher; or
            ``timm:NAME[:key=value ...]@FILE``, the encoder of both.

    Raises:
        UserError: no such path; weights of another architecture or other heads; tensors are missing, unexpected or of
            another shape. The message names them.
        CheckpointError: a file of a checkpoint is damaged.
    """
    if init.startswith(PREFIX):
        return _read_encoder(init, config)
    path = Path(init)
    if not path.exists():
        raise UserError(
            f"model.init={init}: no such file or folder; expected a run, a checkpoint, weights of a MUSE backbone "
            f"(.pth, .safetensors or an export for timm), or {PREFIX}NAME@FILE"
        )
    if path.is_dir() and not is_timm_folder(path):
        return _read_run(find_checkpoint(path), config)
    return _read_backbone(path, config)


def read_networks(folder: Path) -> Start:
    """Read student, teacher and centres of a checkpoint as they are."""
    student, teacher, state = (checkpoint.read_tensors(folder, stem) for stem in ("student", "teacher", "state"))
    return Start("", student, teacher, {name.removeprefix("center/"): center for name, center in state.items()})


def first_backbone(config: PretrainConfig) -> Backbone:
    """Return the backbone as a run begins, which its seed draws and ``model.init`` replaces.

    Raises:
        UserError, CheckpointError: as `read_start`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = backbone_of(config)
    if config.model.init:
        start, prefix = read_start(config.model.init, config), "backbone."
        tensors = {name.removeprefix(prefix): t for name, t in start.teacher.items() if name.startswith(prefix)}
        backbone.load_state_dict(tensors, strict=False)
    return backbone.requires_grad_(False)


def describe(report: Mapping[str, Any]) -> list[str]:
    """One line for each group of `Start.report`: parts of the network with their number of tensors, names of others."""
    lines = []
    for group, words in GROUPS.items():
        names = report.get(group, [])
        if group in ("loaded", "new"):
            parts = Counter(".".join(name.split(".")[: 2 if name.startswith("backbone.") else 1]) for name in names)
            names = [f"{part} ({count} tensors)" if part != "centers" else part for part, count in parts.items()]
        if names:
            lines.append(f"{words}: {some(names)}")
    return lines


def _read_run(folder: Path, config: PretrainConfig) -> Start:
    then = recorded_settings(PretrainConfig, checkpoint.read_state(folder)["config"])
    now = dict(flatten(dataclasses.asdict(config)))
    _refuse_others(folder, {key: (then.get(key), now[key]) for key in now if key.startswith(SAME)})
    found, rule = read_networks(folder), then["model.pos_embed_resize"]
    (student, resized), (teacher, _) = (_resized(tensors, config, rule) for tensors in (found.student, found.teacher))
    return found._replace(student=student, teacher=teacher, about={"resized": resized})


def _read_backbone(path: Path, config: PretrainConfig) -> Start:
    # Training goes on with the position embedding as it was trained, which the authors' evaluation resamples.
    backbone, left_out = read_backbone(None, path, "exact")
    model = config.model
    _refuse_others(
        path, {"model.arch": (backbone.arch, model.arch), "model.taps": (list(backbone.taps), list(model.taps))}
    )
    stored = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    tensors, resized = _resized(stored, config, backbone.pos_embed_resize)
    return Start("backbone.", tensors, tensors, about={"resized": resized, "left_out": left_out})


def _read_encoder(init: str, config: PretrainConfig) -> Start:
    name, model = init.partition("@")[0], config.model
    if (file := parse_spec(init).file) is None:
        raise UserError(f"model.init={init}: no weights; expected {name}@FILE")
    if name != model.arch:
        raise UserError(f"model.init={init}: weights of {name}, but model.arch={model.arch}; use one name for both")
    arch = find_arch(name, "model.arch", model.taps)
    encoder = build_to_fill(name, model.taps, lambda: arch.build(image_size=config.views.global_size))
    about = load_file(encoder.encoder, name, file)
    tensors = {f"backbone.encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return Start("backbone.encoder.", tensors, tensors, about=about)


def _refuse_others(path: Path, settings: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse weights from other settings, given by key as those of the weights and of this run."""
    other = [f"{key}={then} (here {now})" for key, (then, now) in settings.items() if then != now]
    if other:
        raise UserError(f"model.init={path} comes from a run with {', '.join(other)}; use the same settings")


def _resized(
    tensors: Mapping[str, Tensor], config: PretrainConfig, rule: str
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Resize position embeddings to the global views by the rule of their run, so that its network sees the new views
    as usual; returns all tensors, and the names of those that have changed.
    """
    arch = find_arch(config.model.arch, taps=config.model.taps)
    grid = config.views.global_size // arch.strides[-1]
    fitted = {
        name: arch.resize(value, grid, rule) if name.endswith("pos_embed") else value for name, value in tensors.items()
    }
    return fitted, [name for name, value in fitted.items() if value.shape != tensors[name].shape]
