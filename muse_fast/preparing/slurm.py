"""``prepare wsi:PATH OUT --slurm-tasks N``: the slides shared out over a job array, and a last job that assembles."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muse_fast.errors import UserError, require
from muse_fast.preparing.parts import Parts
from muse_fast.preparing.slides import parts_folder
from muse_fast.runtime import cluster
from muse_fast.sources.wsi import Slides, usable_cpus

_MAX_TIMEOUTS = 1_000  # a task is over when its slides are done, however often its time was up
_CPUS_PER_TASK = 8


@dataclass(frozen=True)
class PrepareJob:
    """One job: a share of the slides, or the assembly. submitit pickles it and calls it on its node.

    Attributes:
        command: takes the arguments of ``python -m muse_fast.prepare`` and returns the exit code.
    """

    command: Callable[[Sequence[str]], int]
    arguments: tuple[str, ...]

    def __call__(self) -> int:
        """Run until the end.

        Raises:
            UserError: the command cannot do it.
        """
        return self.command(self.arguments)

    def checkpoint(self) -> Any:
        """What submitit queues again when the time is over: the same, for finished slides are not done again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many machines (pip install 'muse_fast[slurm]')")
    group.add_argument("--slurm-tasks", type=int, metavar="N", help="distribute the slides over N tasks of a job array")
    group.add_argument(
        "--time",
        type=int,
        default=1440,
        metavar="MINUTES",
        help="time limit of a task, then it is requeued (%(default)s)",
    )
    group.add_argument(
        "--cpus-per-task", type=int, default=_CPUS_PER_TASK, metavar="N", help="cores per task (%(default)s)"
    )
    cluster.add_arguments(group)


def submit(options: argparse.Namespace, source: Slides, command: Callable[[Sequence[str]], int]) -> int:
    """Submit the array and the job that assembles; with --local run both here. Returns the exit code.

    Raises:
        UserError: the settings cannot be used, ``OUT`` exists, or submission or a local job failed.
    """
    tasks = options.slurm_tasks
    require(tasks > 0, "--slurm-tasks", tasks, "1 or more")
    if options.task or options.out.exists():
        problem = "--task is for what this submits" if options.task else f"{options.out} exists already"
        raise UserError(f"{problem}; see python -m muse_fast.prepare --help")
    logs = options.out.absolute().with_name(f"{options.out.name}.slurm")
    with cluster.submitting():
        executor = cluster.executor(logs, options.local, _MAX_TIMEOUTS)
        Parts(parts_folder(options.out), source.options, options.quality)  # refuses what the tasks would refuse
        common = {"name": options.out.name, "timeout_min": options.time, "stderr_to_stdout": True}
        slurm = {} if options.local else cluster.slurm_parameters(options, options.cpus_per_task)
        executor.update_parameters(**common, **slurm)
        with executor.batch():
            jobs = [executor.submit(_job(command, options, task)) for task in range(tasks)]
        print(f"{tasks} tasks for {len(source.files)} slides; output in {logs}", flush=True)
        if options.local:
            cluster.wait_for(jobs)
        else:
            array = jobs[0].job_id.partition("_")[0]
            # After the tasks, also where one failed: the last job does what they have left, then assembles.
            last = cluster.slurm_parameters(options, options.cpus_per_task, dependency=f"afterany:{array}")
            executor.update_parameters(**last)
        last_job = executor.submit(_job(command, options, None))
        if options.local:
            cluster.wait_for([last_job])
            print(Path(last_job.paths.stdout).read_text(), end="")
        else:
            print(f"jobs {array} and {last_job.job_id}, which assembles {options.out}")
    return 0


def _job(command: Callable[[Sequence[str]], int], options: argparse.Namespace, task: int | None) -> PrepareJob:
    arguments = [options.source, str(options.out), "--quality", str(options.quality), *_settings(options, task)]
    arguments += ["--keep-parts"] if options.keep_parts else []
    arguments += [] if task is None else ["--task", f"{task}/{options.slurm_tasks}"]
    return PrepareJob(command, tuple(arguments))


def _settings(options: argparse.Namespace, task: int | None) -> Sequence[str]:
    """key=value; tasks on this machine share its cores."""
    if options.local and task is not None and not any(text.startswith("workers=") for text in options.options):
        return [*options.options, f"workers={max(1, usable_cpus() // options.slurm_tasks)}"]
    return options.options
