"""Read and write safetensors files, and load tensors strictly into modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muse_fast.errors import UserError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any new file, which safetensors would restrict to the owner."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, dict(metadata or {}) or None)
    path.chmod(mode)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file to the CPU; raises UserError if it is damaged."""
    with _refuse_damage(path):
        return load_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Read what `write_tensors` wrote beside the tensors; raises UserError if the file is damaged."""
    with _refuse_damage(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextmanager
def _refuse_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: not a valid .safetensors file ({error}); copy or download it again") from error


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], origin: str, arch: str = "") -> None:
    """Copy ``tensors`` into ``model``, whose state must have exactly these names and shapes.

    Args:
        arch: name of the model for messages; its attribute ``arch`` by default.

    Raises:
        UserError: as `refuse_misfits`.
    """
    refuse_misfits(model.state_dict(), tensors, origin, arch or str(model.arch))
    model.load_state_dict(dict(tensors))


def refuse_misfits(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str, arch: str) -> None:
    """Raise UserError unless ``tensors`` have the names and shapes of ``expected``; the message begins with ``origin``
    and names those that are missing, unexpected or of another shape.
    """
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
        raise UserError(f"{origin}: does not fit {arch}. {'; '.join(problems)}")


def some(names: list[str], limit: int = 8) -> str:
    """Join the first names, and say how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
