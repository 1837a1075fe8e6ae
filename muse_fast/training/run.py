"""How runs begin and end: the checkpoint to resume from, settings that must not change, reports of an early end."""

from __future__ import annotations

from pathlib import Path

import torch

from muse_fast.errors import UserError
from muse_fast.runtime import checkpoint, exit_codes
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.distributed import is_main, wait_for_all
from muse_fast.runtime.options import Config, fixed_settings, recorded_settings
from muse_fast.training.guard import NonFiniteError


def find_start(out: Path, resume: str) -> Path | None:
    """Return the checkpoint to start from, if any; ``resume`` is ``auto``, ``never`` or a checkpoint folder.

    Raises:
        UserError: ``never`` although there are checkpoints, or none of them is intact.
    """
    if resume == "never":
        if checkpoint.steps(out):
            raise UserError(f"{out} contains checkpoints; continue with --resume auto or choose another --out")
        return None
    if resume != "auto":
        checkpoint.verify(Path(resume))
        return Path(resume)
    found, problems = checkpoint.latest(out)
    for problem in problems if is_main() else ():
        print(f"skipped: {problem}")
    if problems and found is None:
        raise UserError(f"{out}: no checkpoint is intact, see above; --resume PATH uses one of another run")
    return found


def refuse_other_settings(start: Path, config: Config) -> None:
    """Refuse to continue from ``start`` with different settings, except for those that may change."""
    then = recorded_settings(type(config), checkpoint.read_state(start)["config"])
    now = dict(fixed_settings(config))
    changed = [f"{k}={now[k]} (was {then.get(k)})" for k in now if now[k] != then.get(k)]
    if changed:
        raise UserError(
            f"{start} belongs to a run with other settings: {', '.join(changed)}; give the old values to continue it, "
            "or choose another --out"
        )


def print_precision_note(precision: str, device: torch.device) -> None:
    """Tell the user if the device only emulates bf16."""
    if precision == "bf16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        print("  note   this CPU emulates bf16, which is many times slower: train.precision=fp32")


def report_non_finite(out: Path, seed: int, error: NonFiniteError) -> int:
    """Write down what is needed to investigate; returns the exit code."""
    if is_main():
        path = out / f"non_finite_step_{error.step}.json"
        content = {"error": str(error), "roi_ids": error.roi_ids, "epochs": error.epochs, "seed": seed}
        write_json(path, content)
        write_json(out / "exit.json", {"code": exit_codes.NON_FINITE, "reason": str(error), "step": error.step - 1})
        print(f"{error}\n{path} names the batch; the last checkpoint is intact. Lower optim.lr, or inspect the batch.")
    wait_for_all()
    return exit_codes.NON_FINITE


def report_stopped(out: Path, reason: str, step: int) -> int:
    """Say how to continue; returns the exit code."""
    if is_main():
        write_json(out / "exit.json", {"code": exit_codes.STOPPED, "reason": reason, "step": step})
        print(f"{reason}: stopped after step {step}, checkpoint written; start again to continue")
    wait_for_all()
    return exit_codes.STOPPED


def report_stalled(out: Path, reason: str, step: int) -> None:
    """Write down which rank this one waited for; any rank may, because the main rank may be the one that hangs."""
    if out.is_dir():
        write_json(out / "exit.json", {"code": exit_codes.STALLED, "reason": reason, "step": step - 1})
