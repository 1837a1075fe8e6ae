"""Tensors in safetensors files, and into a module that must take every one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muse_fast.errors import UserError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file with the permissions of any other new file: safetensors would keep it to its owner."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, dict(metadata or {}) or None)
    path.chmod(mode)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, on the CPU; UserError where it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a sound .safetensors file ({error}); copy or download it again") from error


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], origin: str, arch: str = "") -> None:
    """Copy ``tensors`` into ``model``; every tensor must find its place and every place its tensor.

    Args:
        arch: what the message calls the model; its attribute ``arch`` unless given.

    Raises:
        UserError: names missing, left over, or of another shape; the message begins with ``origin`` and lists them.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    reshaped = [
        f"{name} {list(tensors[name].shape)} instead of {list(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    problems = [f"{len(names)} {what}: {some(names)}" for what, names in groups.items() if names]
    if problems:
        raise UserError(f"{origin}: does not fit {arch or model.arch}. {'; '.join(problems)}")
    model.load_state_dict(dict(tensors))


def some(names: list[str], limit: int = 8) -> str:
    """The first names, with commas between, and how many there are besides."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
