"""Trainings that a benchmark compares: each runs once, and a repeated command uses it again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from muse_fast.errors import UserError
from muse_fast.runtime.options import Config
from muse_fast.training.run import find_checkpoint, refuse_other_settings


def trained(command: Callable[[Sequence[str]], int], argv: Sequence[str], out: Path, config: Config) -> dict[str, Any]:
    """Train unless ``out`` is a finished run, and return its summary.

    Args:
        command: ``main`` of `muse_fast.pretrain` or `muse_fast.finetune`.
        argv: its arguments, without ``--out``.
        config: the settings that they give.

    Raises:
        UserError: the run cannot start or fails (``OUT.log`` has its output), or a finished run has other settings.
    """
    summary = out / "summary.json"
    if summary.exists():
        refuse_other_settings(find_checkpoint(out, "auto") or out, config)
    else:
        log = out.with_name(f"{out.name}.log")
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file, contextlib.redirect_stdout(file):
            code = command(["--out", str(out), *argv])
        if code != 0:
            raise UserError(f"{out} ended with exit code {code}; see {log}")
    found: dict[str, Any] = json.loads(summary.read_text())
    return found
