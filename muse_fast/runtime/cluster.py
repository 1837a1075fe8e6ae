"""Shared by commands that submit to Slurm: their options, and submitit's errors as UserError."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from muse_fast.errors import UserError


def add_arguments(parser: Any) -> None:
    """Add the options of a job to a parser or an argument group."""
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--account", help="Slurm account")
    parser.add_argument(
        "--sbatch", action="append", default=[], type=_pair, metavar="KEY=VALUE", help="other option of sbatch"
    )
    parser.add_argument("--local", action="store_true", help="run on this machine instead, and wait until it is done")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}': expected KEY=VALUE, for example qos=high")
    return key, value


def executor(logs: Path, local: bool, max_timeouts: int) -> Any:
    """Return submitit's executor.

    Raises:
        UserError: submitit is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("submitit is not installed: pip install 'muse_fast[slurm]'") from None
    cluster = "local" if local else "slurm"
    return submitit.AutoExecutor(logs, cluster, **{f"{cluster}_max_num_timeout": max_timeouts})


def slurm_parameters(options: argparse.Namespace, cpus: int, **additional: Any) -> dict[str, Any]:
    """Return the parameters of ``sbatch`` other than nodes, tasks and time; --sbatch overrides ``additional``."""
    return {
        "slurm_partition": options.partition,
        "slurm_account": options.account,
        "cpus_per_task": cpus,
        "slurm_srun_args": [f"--cpus-per-task={cpus}"],  # since Slurm 22.05 srun does not inherit it from sbatch
        "slurm_additional_parameters": {"requeue": True, **additional, **dict(options.sbatch)},
    }


@contextmanager
def submitting() -> Iterator[None]:
    """Turn errors of submitit (no srun, a refusal by sbatch, several nodes with --local) into UserError."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None


def wait_for(jobs: Sequence[Any]) -> None:
    """Wait for jobs on this machine.

    Raises:
        UserError: a job failed; contains its traceback.
    """
    for job in jobs:
        try:
            job.results()
        except RuntimeError as error:  # from submitit, for a job that failed or has no result
            raise UserError(str(error)) from None
