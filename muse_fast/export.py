"""``python -m muse_fast.export RUN_OR_CHECKPOINT OUT --format safetensors|timm|muse-official [--which student]``

safetensors    one file: backbone, both heads and both centres, under the same names as in a checkpoint
timm           a folder: the encoder as timm loads it (config.json, model.safetensors), and decoder.safetensors
muse-official  a .pth in the layout of the published files: {"teacher": {"module.backbone.NAME": tensor}}

`load_backbone` reads each of them, with bit-identical weights; the command checks this before it renames the export to
its final name. An official .pth keeps its stored position embedding, and the export records that load_backbone has to
resample it; only timm, which does not, gets the resampled one. To other image sizes, timm resizes it by a rule of its
own, with antialiasing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from muse_fast.config import PretrainConfig
from muse_fast.errors import UserError
from muse_fast.models.archs import find_arch
from muse_fast.models.official import EXACT, PREFIX, RECORD, RESIZE
from muse_fast.models.weights import (
    COMPAT,
    ENCODER,
    POS_EMBED,
    TIMM_CONFIG,
    TIMM_DECODER,
    TIMM_WEIGHTS,
    as_used,
    default_compat,
    find_checkpoint,
    is_timm_folder,
    load_backbone,
    stored_image_size,
)
from muse_fast.runtime import atomic, checkpoint
from muse_fast.runtime.options import recorded_settings
from muse_fast.runtime.tensors import write_tensors
from muse_fast.version import __version__

WHICH = ("teacher", "student")
BACKBONE = "backbone."  # prefix of the backbone's tensors


@dataclass(frozen=True, slots=True)
class Trained:
    """A network to export."""

    arch: str
    tensors: dict[str, Tensor]  # backbone.*; of a checkpoint also image_head.*, nucleus_head.*, center.{image,nucleus}
    record: dict[str, str]  # its origin and how it was trained
    compat: str  # how to use the position embedding, see `load_backbone`
    pos_embed_resize: str  # rule by which a ViT resizes it
    taps: list[int]  # layers whose maps its decoder receives, if they were chosen

    def origin(self) -> str:
        """Return the record as one line."""
        return ", ".join(f"{key} {value}" for key, value in self.record.items() if key != "head")

    def metadata(self) -> dict[str, str]:
        use = {COMPAT: self.compat, RESIZE: self.pos_embed_resize} | (
            {"taps": json.dumps(self.taps)} if self.taps else {}
        )
        return {"arch": self.arch, **self.record, **use, "muse_fast": __version__, "torch": torch.__version__}

    def backbone(self) -> dict[str, Tensor]:
        """Return the backbone's stored tensors under the names of its state dict."""
        return {name.removeprefix(BACKBONE): t for name, t in self.tensors.items() if name.startswith(BACKBONE)}

    def as_used(self) -> Trained:
        """Return it with the position embedding that `load_backbone` uses."""
        used = {f"{BACKBONE}{name}": tensor for name, tensor in as_used(self.backbone(), self.compat).items()}
        return replace(self, tensors=self.tensors | used, compat="exact")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.export", description="Write a trained network for use elsewhere."
    )
    parser.add_argument("source", help="run folder, checkpoint, or other weights that load_backbone reads")
    parser.add_argument("out", type=Path, help="new file, or new folder for timm")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="one file, a folder for timm, or a .pth as published",
    )
    parser.add_argument("--which", choices=WHICH, default="teacher", help="network of a checkpoint (default: teacher)")
    args = parser.parse_args(argv)
    export(args.source, args.out, args.format, which=args.which)
    return 0


def export(source: str, out: Path, kind: str, *, which: str = "teacher") -> None:
    """Write the network of ``source`` to ``out`` in one of `FORMATS` and print a summary.

    Raises:
        UserError: ``out`` exists or has the wrong suffix, the source cannot be read or has no student, or the disk is
            full; no partial output remains.
    """
    form = FORMATS[kind]
    if out.exists():
        raise UserError(f"{out} exists already; remove it or choose another path")
    if form.suffix and out.suffix != form.suffix:
        raise UserError(f"{out}: --format {kind} writes one file; choose a name that ends in {form.suffix}")
    network = read_network(source, which)
    print(f"export {source} ({network.arch}, {network.origin()}) -> {out}, {kind}")
    try:
        with atomic.replacing(out) if form.suffix else atomic.new_folder(out) as temporary:
            form.write(network, temporary)
            _check(network, temporary)
    except (OSError, SafetensorError, RuntimeError) as error:  # usually a full disk
        raise UserError(f"{out} was not written: {error}") from error
    size = sum(path.stat().st_size for path in ([out] if form.suffix else out.iterdir()))
    print(f"{size / 1e6:.1f} MB, read back and equal. Use: {form.use.format(out)}")


def read_network(source: str, which: str) -> Trained:
    """Read the network ``which`` of a run or checkpoint with heads and centres; of other weights, only the backbone."""
    path = Path(source)
    if path.is_dir() and not is_timm_folder(path):
        folder = find_checkpoint(path)
        state = checkpoint.read_state(folder)
        config = recorded_settings(PretrainConfig, state["config"])
        centers = checkpoint.read_tensors(folder, "state")
        return Trained(
            arch=config["model.arch"],
            tensors=checkpoint.read_tensors(folder, which)
            | {name.replace("/", "."): value for name, value in centers.items() if name.startswith("center/")},
            record={
                "network": which,
                "step": str(state["step"]),
                "image_size": str(config["views.global_size"]),
                "mpp": f"{config['views.global_mpp_min']}-{config['views.global_mpp_max']}",
                "head": json.dumps(state["config"]["head"]),
            },
            compat="exact",
            pos_embed_resize=config["model.pos_embed_resize"],
            taps=config["model.taps"],
        )
    if which != "teacher":
        raise UserError(f"{source}: --which {which} needs a run or a checkpoint; other weights contain one network")
    backbone = load_backbone(None, source, compat="exact")
    return Trained(
        arch=backbone.arch,
        tensors={f"{BACKBONE}{name}": value for name, value in backbone.state_dict().items()},
        record={"source": Path(source).name},
        compat=default_compat(source),
        pos_embed_resize=backbone.pos_embed_resize,
        taps=list(backbone.taps),
    )


def write_safetensors(network: Trained, path: Path) -> None:
    _save(network.tensors, path, network.metadata())


def write_timm(network: Trained, folder: Path) -> None:
    network = network.as_used()
    backbone = network.backbone()
    config = _timm_config(network.arch, backbone)
    encoder = {name.removeprefix(ENCODER): t for name, t in backbone.items() if name.startswith(ENCODER)}
    decoder = {name: t for name, t in backbone.items() if not name.startswith(ENCODER)}
    _save(encoder, folder / TIMM_WEIGHTS, network.metadata())
    _save(decoder, folder / TIMM_DECODER, network.metadata())
    atomic.write_json(folder / TIMM_CONFIG, config)


def write_official(network: Trained, path: Path) -> None:
    content: dict[str, Any] = {"teacher": {f"{PREFIX}{name}": tensor for name, tensor in network.backbone().items()}}
    if network.compat == "exact":
        record = {"arch": network.arch, "taps": network.taps}
        content |= {EXACT: torch.tensor(True), RESIZE: network.pos_embed_resize, RECORD: record}
    torch.save(content, path)


class Format(NamedTuple):
    suffix: str  # empty for a folder
    write: Callable[[Trained, Path], None]
    use: str


FORMATS = {
    "safetensors": Format(".safetensors", write_safetensors, 'muse_fast.load_backbone(None, "{}")'),
    "timm": Format("", write_timm, 'timm.create_model("local-dir:{}", pretrained=True), or load_backbone'),
    "muse-official": Format(
        ".pth",
        write_official,
        'torch.load("{}", weights_only=True)["teacher"], or load_backbone. The authors\' code resamples the position '
        "embedding of every file that it loads, load_backbone only that of files that come from theirs",
    ),
}


def _timm_config(arch: str, backbone: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return timm's config of the encoder: without classes, the model returns a pooled image feature."""
    import timm

    found, side = find_arch(arch), stored_image_size(arch, backbone)
    if not found.timm:
        raise UserError(f"--format timm: timm has no architecture like {arch}; use safetensors")
    if classes := [key for key in found.timm_options if key.endswith("_layer")]:
        raise UserError(f"--format timm: timm's config.json cannot name the class of {classes[0]}; use safetensors")
    known: Any = timm.get_pretrained_cfg(found.timm)
    return {
        "architecture": found.timm.partition(".")[0],
        "num_classes": 0,
        "num_features": found.image_dim,
        "model_args": found.timm_options | ({"img_size": side} if POS_EMBED in backbone else {}),
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": known.fixed_input_size,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": found.mean,
            "std": found.std,
            "num_classes": 0,
            "first_conv": known.first_conv,
            "classifier": known.classifier,
        },
    }


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    write_tensors(path, tensors, {"format": "pt", **metadata})


def _check(network: Trained, written: Path) -> None:
    """Read ``written`` back; raise UserError unless the backbone is the same."""
    backbone = load_backbone(network.arch, written)
    found, expected = backbone.state_dict(), network.as_used().backbone()
    wrong = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor.to(found[name]))]
    if backbone.pos_embed_resize != network.pos_embed_resize:
        wrong.append(RESIZE)
    if wrong:
        raise UserError(f"{written}: reading it back returned other values for {wrong[0]}; check the disk")


if __name__ == "__main__":
    from muse_fast.runtime.cli import run

    raise SystemExit(run(main))
