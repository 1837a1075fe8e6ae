"""Weights in the files of other projects: reading them without running code, and finding a network's tensors in them.

Training scripts store more than a network and put words before its names: DataParallel ``module.``, torch.compile
``_orig_mod.``, Lightning the attribute that held it. A network is found by its own names, whatever stands before them.
Hugging Face's names of a ViT and the chunks of DINOv2's FSDP are translated.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from muse_fast.errors import UserError
from muse_fast.runtime.tensors import read_safetensors, some

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")  # of files of torch.save
STATE_DICTS = ("teacher", "state_dict", "model", "model_state_dict")  # where training scripts keep the weights
_GIT_LFS_POINTER = b"version https://git-lfs"

# Packages whose objects in a checkpoint only tell how it was trained.
_RECORDS = (
    "addict", "argparse", "collections", "datetime", "easydict", "enum", "lightning", "lightning_fabric",
    "ml_collections", "mmengine", "numpy", "omegaconf", "pathlib", "pytorch_lightning", "transformers", "typing",
    "uuid", "yacs",
)  # fmt: skip
_DICTS = (".defaultdict", ".AttributeDict", ".EasyDict", ".Dict", ".CfgNode", ".ConfigDict")
_BUILTINS = tuple(f"builtins.{kind.__name__}" for kind in (bool, dict, float, frozenset, int, list, str, tuple))
_CONVERT = "load it in an isolated place and save only its tensors, as {'teacher': state_dict} or as .safetensors."
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # anywhere in a name
_PREFIXES = ("module.", "model.", "backbone.")  # of files whose names are not yet the network's
_TEACHERS = re.compile(r"teacher|ema")  # of two copies of a network, the one to use
_CHUNK = re.compile(r"\bblocks\.\d+\.(?=\d+\.)")

_HUGGING_FACE = {  # of ViTModel and Dinov2Model; the names of timm
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"embeddings\.(cls_token|mask_token|register_tokens)": r"\1",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense": r"blocks.\1.attn.proj",
    r"encoder\.layer\.(\d+)\.intermediate\.dense": r"blocks.\1.mlp.fc1",
    r"encoder\.layer\.(\d+)\.output\.dense": r"blocks.\1.mlp.fc2",
    r"encoder\.layer\.(\d+)\.layernorm_before": r"blocks.\1.norm1",
    r"encoder\.layer\.(\d+)\.layernorm_after": r"blocks.\1.norm2",
    r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1": r"blocks.\1.ls\2.gamma",
    r"encoder\.layer\.(\d+)\.mlp\.weights_in": r"blocks.\1.mlp.w12",
    r"encoder\.layer\.(\d+)\.mlp\.weights_out": r"blocks.\1.mlp.w3",
    r"encoder\.layer\.(\d+)\.": r"blocks.\1.",
    r"layernorm\.": "norm.",
}
_QKV = re.compile(r"\bencoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.")
_HUGGING_FACE_HEADS = ("pooler.", "classifier.")


class Stored(NamedTuple):
    """A network's tensors from a file."""

    tensors: dict[str, Tensor]  # under the network's names
    outside: list[str]  # names of the file that belong to no part of the network
    layout: str = ""  # how the file named them, if not by the network's names alone


def files_in(folder: Path) -> str:
    """Words for a folder that was given in place of a file, with the files of weights in it."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", *TORCH_SUFFIXES))
    return f"name the file of weights in it ({some(found) or 'there is none'})"


def read_weights(path: Path) -> Any:
    """The content of a ``.safetensors`` or of a file of ``torch.save``; errors as `read_pth` or `read_safetensors`."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pth(path)


def read_pth(path: Path) -> Any:
    """Read the tensors and plain values in a file of ``torch.save``.

    Records of how it was trained (numbers of numpy, paths, options of common packages) are passed over: no class of
    theirs is ever called.

    Raises:
        UserError: the file is a git-LFS pointer, is damaged, or could run code; says what it is and what to do.
    """
    with path.open("rb") as file:
        start = file.read(len(_GIT_LFS_POINTER))
    if start == _GIT_LFS_POINTER:
        raise UserError(f"{path}: a git-LFS pointer, not the weights; run `git lfs pull` in its repository first.")
    named = _named_objects(path)
    if any(name.startswith("__torch__.") for name in named):
        raise UserError(f"{path}: a TorchScript program, which could run code when read; if you trust it, {_CONVERT}")
    passed_over = [(_PlainDict if name.endswith(_DICTS) else _PassedOver, name) for name in named if _is_record(name)]
    try:
        with torch.serialization.safe_globals(passed_over):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: {_why_not(named, error)}") from error


class _PassedOver:
    """Stands for an object that is not built."""

    def __new__(cls, *_: Any, **__: Any) -> _PassedOver:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Ignore what the object contained."""


class _PlainDict(_PassedOver):
    """Stands for a kind of dict: torch puts items only into the common kinds, and they may contain the weights."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def _is_record(name: str) -> bool:
    return name.partition(".")[0] in _RECORDS or name in _BUILTINS


def _named_objects(path: Path) -> list[str]:
    """The classes and functions that the pickles of a file name, without reading any; [] if it has no pickle."""
    found = set()
    try:
        for stream in _pickles(path):
            operations = pickletools.genops(stream)
            found |= {str(argument) for kind, argument, _ in operations if kind.name == "GLOBAL"}
    except (ValueError, zipfile.BadZipFile, OSError, NotImplementedError):
        pass  # whatever loads the file will name the damage
    return sorted(".".join(_today(*name.split(" ", 1))) for name in found)


def _today(module: str, name: str) -> tuple[str, str]:
    """Python 3's names of what pickles call by those of Python 2."""
    return NAME_MAPPING.get((module, name)) or (IMPORT_MAPPING.get(module, module), name)


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:  # of old releases of torch: five pickles, then the numbers
            for _ in range(5):
                yield file
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                yield io.BytesIO(archive.read(name))


def _why_not(named: list[str], error: Exception) -> str:
    others = [name for name in named if not _is_record(name) and name.partition(".")[0] not in ("torch", "_codecs")]
    if any(name.startswith("torch.nn.modules.") for name in named):
        return (
            f"a whole network stored with its classes ({some(others or named, 3)}), which could run code when read; if "
            f"you trust it, {_CONVERT}"
        )
    if any(name.startswith("torch.distributed.") for name in named):
        return (
            "one rank's part of an FSDP run, not a whole network; use the file that the run gathered for evaluation "
            "(DINOv2: eval/.../teacher_checkpoint.pth), or gather a full state dict with torch.distributed.checkpoint"
        )
    if others:
        return f"contains objects that could run code when read ({some(others, 3)}); if you trust it, {_CONVERT}"
    line = str(error).strip().split("\n")[0] or type(error).__name__
    return (
        f"damaged, or contains objects that could run code when read, so it was not loaded ({line}). Compare its "
        f"checksum with the publisher's; if you trust it, {_CONVERT}"
    )


def find_network(file: Path, content: Any, expected: Collection[str]) -> Stored:
    """Find a network in the content of a file.

    Args:
        expected: names of the network's tensors. The file may lack some and have others; the caller decides.

    Raises:
        UserError: no tensors, or several networks of which none is a teacher or an average; says what the file has.
    """
    tensors = _state_dict(file, content)
    if parts := [name for name in tensors if name.rpartition(".")[2] == "_flat_param"]:
        raise UserError(
            f"{file}: one rank's part of an FSDP run ({some(parts, 2)}), not a whole network; use the file that the "
            "run gathered for evaluation, or gather a full state dict with torch.distributed.checkpoint"
        )
    layouts, heads = [], tuple[str, ...]()
    tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if any(_QKV.search(name) for name in tensors):
        tensors = _from_hugging_face(tensors)
        heads = _HUGGING_FACE_HEADS
        layouts.append("names of Hugging Face")
    if not any(_CHUNK.search(name) for name in expected):
        whole = {_CHUNK.sub("blocks.", name): tensor for name, tensor in tensors.items()}
        if whole.keys() != tensors.keys() and len(whole) == len(tensors):
            tensors = whole
            layouts.append("blocks in chunks")
    prefix = _prefix(file, tensors, expected)
    if prefix is None:
        return Stored(*_without_usual_prefixes(tensors), ", ".join(layouts))
    kept = [name for name in tensors if name.startswith(prefix) and not name.removeprefix(prefix).startswith(heads)]
    inside = {name.removeprefix(prefix): tensors[name] for name in kept}
    return Stored(
        inside, sorted(tensors.keys() - kept), ", ".join([*layouts, *([f"under {prefix}"] if prefix else [])])
    )


def _state_dict(file: Path, content: Any) -> dict[str, Tensor]:
    """The innermost dict of tensors, by its usual keys or as the only one."""
    while isinstance(content, Mapping):
        usual = [key for key in STATE_DICTS if isinstance(content.get(key), Mapping)]
        inner = [key for key, value in content.items() if isinstance(value, Mapping) and _has_tensors(value)]
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if usual or len(inner) == 1:
            content = content[usual[0] if usual else inner[0]]
        elif tensors and not inner:
            return tensors
        else:
            break
    found = some(sorted(map(str, content))) if isinstance(content, Mapping) else type(content).__name__
    raise UserError(
        f"{file}: expected a state dict, bare or under {', '.join(STATE_DICTS)}; got {found}. Save the one to use, as "
        "{'teacher': state_dict} or as .safetensors"
    )


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    values: Iterable[Any] = content.values()
    return any(isinstance(value, Tensor) or (isinstance(value, Mapping) and _has_tensors(value)) for value in values)


def _prefix(file: Path, tensors: Mapping[str, Tensor], expected: Collection[str]) -> str | None:
    """What stands before most of the expected names; None if fewer than half of them are there.

    Raises:
        UserError: several copies of the network, none of them a teacher or an average.
    """
    names, counts = frozenset(expected), Counter[str]()
    for name in tensors:
        parts = name.split(".")
        counts.update(".".join([*parts[:i], ""]) for i in range(len(parts)) if ".".join(parts[i:]) in names)
    most = max(counts.values(), default=0)
    if 2 * most <= len(names):
        return None
    best = sorted(prefix for prefix, count in counts.items() if count == most)
    chosen = [prefix for prefix in best if _TEACHERS.search(prefix)] if len(best) > 1 else best
    if len(chosen) != 1:
        raise UserError(
            f"{file}: contains the network {len(best)} times, under {some(best)}; save the one to use, as "
            "{'teacher': state_dict} or as .safetensors"
        )
    return chosen[0]


def _without_usual_prefixes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """For files whose names the caller has yet to convert."""
    inside, outside = dict(tensors), list[str]()
    for prefix in _PREFIXES:
        if kept := {name.removeprefix(prefix): one for name, one in inside.items() if name.startswith(prefix)}:
            outside += sorted(name for name in inside if not name.startswith(prefix))
            inside = kept
    return inside, outside


def _from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a ViT or DINOv2 of ``transformers`` under timm's names; query, key and value become one matrix."""
    renamed, split = dict[str, Tensor](), defaultdict[str, dict[str, Tensor]](dict)
    for name, tensor in tensors.items():
        if match := _QKV.search(name):
            split[_QKV.sub(r"blocks.\1.attn.qkv.", name)][match[2]] = tensor
            continue
        for pattern, ours in _HUGGING_FACE.items():
            name = re.sub(rf"\b{pattern}", ours, name)
        renamed[name] = tensor
    whole = {name: parts for name, parts in split.items() if len(parts) == 3}
    return renamed | {name: torch.cat([parts[p] for p in ("query", "key", "value")]) for name, parts in whole.items()}
