"""How runs begin and end: the checkpoint to resume from, settings that must not change, the folder, early ends."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf

from muse_fast.errors import UserError
from muse_fast.runtime import checkpoint, exit_codes
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.distributed import gather_over_ranks, is_main, wait_for_all
from muse_fast.runtime.options import Config, fixed_settings, recorded_settings
from muse_fast.training.guard import NonFiniteError


def find_start(out: Path, resume: str, config: Config, device: torch.device) -> Path | None:
    """Return the checkpoint from which all ranks continue, if any.

    Args:
        resume: ``auto``, ``never`` or a checkpoint folder.

    Raises:
        UserError: ``never`` although there are checkpoints, none of them is intact, its settings are not those of
            ``config``, or ranks found different ones.
    """
    start = find_checkpoint(out, resume)
    step = -1 if start is None else checkpoint.read_state(start)["step"]
    steps = gather_over_ranks(torch.tensor(step, device=device)).tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"{out}: ranks would start from checkpoints of different steps, {steps} (-1: none); "
            "all of them must see the same folder"
        )
    if start is not None:
        refuse_other_settings(start, config)
    return start


def find_checkpoint(out: Path, resume: str) -> Path | None:
    """Return the checkpoint to continue from, if any, as this rank finds it; arguments and errors of `find_start`."""
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


def open_folder(out: Path, config: Config) -> None:
    """Create the folder of a run with its ``config.yaml``, without what a killed save left; for the main rank."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    checkpoint.remove_temporary(out)


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
