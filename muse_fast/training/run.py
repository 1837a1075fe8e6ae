"""How runs begin and end: the checkpoint to go on from, settings that must not change, exit codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from muse_fast.errors import UserError
from muse_fast.runtime import checkpoint
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.distributed import is_main, wait_for_all
from muse_fast.runtime.options import flatten
from muse_fast.runtime.watchdog import EXIT_STALLED
from muse_fast.training.guard import NonFiniteError

EXIT_STOPPED = 75  # stopped on request, a checkpoint is written: start again to go on
EXIT_NON_FINITE = 3

__all__ = [
    *("EXIT_NON_FINITE", "EXIT_STALLED", "EXIT_STOPPED"),
    *("find_start", "refuse_other_settings", "report_non_finite", "report_stalled", "report_stopped"),
]


def find_start(out: Path, resume: str) -> Path | None:
    """The checkpoint to start from, if any; ``resume`` is ``auto``, ``never`` or a checkpoint folder.

    Raises:
        UserError: ``never`` where there are checkpoints, or none of them is sound.
    """
    if resume == "never":
        if checkpoint.steps(out):
            raise UserError(f"{out} holds checkpoints; go on with --resume auto or give another --out")
        return None
    if resume != "auto":
        checkpoint.verify(Path(resume))
        return Path(resume)
    found, problems = checkpoint.latest(out)
    for problem in problems if is_main() else ():
        print(f"passed over: {problem}")
    if problems and found is None:
        raise UserError(f"{out}: no checkpoint is sound; see above. --resume PATH takes one of another run")
    return found


def refuse_other_settings(start: Path, config: Any, free: Collection[str]) -> None:
    """Refuse to go on from ``start`` with settings (a dataclass) other than its own, but for the keys in ``free``."""
    then = dict(flatten(checkpoint.read_state(start)["config"]))
    now = dict(flatten(dataclasses.asdict(config)))
    changed = [f"{k}={now[k]} (was {then.get(k)})" for k in now if now[k] != then.get(k) and k not in free]
    if changed:
        raise UserError(f"{start} belongs to a run with other settings: {', '.join(changed)}; give another --out")


def report_non_finite(out: Path, seed: int, error: NonFiniteError) -> int:
    """Leave behind what is needed to look into it; returns the exit code."""
    if is_main():
        path = out / f"non_finite_step_{error.step}.json"
        content = {"error": str(error), "roi_ids": error.roi_ids, "epochs": error.epochs, "seed": seed}
        write_json(path, content)
        write_json(out / "exit.json", {"code": EXIT_NON_FINITE, "reason": str(error), "step": error.step - 1})
        print(
            f"{error}\nThe batch is named in {path}; the last checkpoint is untouched. Lower optim.lr, or look at it."
        )
    wait_for_all()
    return EXIT_NON_FINITE


def report_stopped(out: Path, reason: str, step: int) -> int:
    """Say how to go on; returns the exit code."""
    if is_main():
        write_json(out / "exit.json", {"code": EXIT_STOPPED, "reason": reason, "step": step})
        print(f"{reason}: stopped after step {step}, checkpoint written; start again to go on")
    wait_for_all()
    return EXIT_STOPPED


def report_stalled(out: Path, reason: str, step: int) -> None:
    """Leave behind whom this rank waited for; any rank may, as the main one may be the one that hangs."""
    if out.is_dir():
        write_json(out / "exit.json", {"code": EXIT_STALLED, "reason": reason, "step": step - 1})
