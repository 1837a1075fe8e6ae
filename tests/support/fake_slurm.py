"""Stand-ins for Slurm's commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Put commands into ``folder`` and first on the PATH.

    ``srun`` does nothing; ``sbatch`` keeps the scripts that it is given as ``batch-0.sh``, ``batch-1.sh``, ... and
    calls their jobs 40, 41, ...

    Args:
        commands: further ones, as lines of the shell.
    """
    folder.mkdir(exist_ok=True)
    submit = f"n=$(ls {folder} | grep -c batch-); cp $1 {folder}/batch-$n.sh; echo Submitted batch job 4$n"
    for name, text in {"srun": "", "sbatch": submit, **commands}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
