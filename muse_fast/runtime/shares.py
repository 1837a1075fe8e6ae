"""The files of a command shared out over processes, and the call that joins what they have done.

``--task I/N`` does one share. ``--slurm-tasks N`` submits an array of such tasks, and a last job, which does what is
left and joins. Under torchrun each rank does its share, and rank 0 then does what that last job does.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from muse_fast.errors import UserError, require
from muse_fast.runtime import cluster, distributed
from muse_fast.runtime.cli import print_any_name

_MAX_TIMEOUTS = 1_000  # a task is over when its files are done, however often its time was up
_CPUS_PER_TASK = 8
_SECONDS_BETWEEN_LOOKS = 0.2


class _WithPath(Protocol):
    @property
    def path(self) -> Path: ...


_File = TypeVar("_File", bound=_WithPath)


class Share(NamedTuple):
    """Share ``task`` (from 0) of ``tasks``."""

    task: int
    tasks: int

    def of(self, files: Sequence[_File]) -> list[_File]:
        """Every ``tasks``-th file in descending order of size, so that all shares are of similar size."""
        return sorted(files, key=lambda file: (-file.path.stat().st_size, file.path))[self.task :: self.tasks]

    def __str__(self) -> str:
        return f"{self.task}/{self.tasks}"


def _share(text: str) -> Share:
    task, _, tasks = text.partition("/")
    if not (task.isdecimal() and tasks.isdecimal() and int(task) < int(tasks)):
        raise argparse.ArgumentTypeError(f"'{text}': expected I/N with I from 0 to N-1")
    return Share(int(task), int(tasks))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--task``, ``--slurm-tasks`` and the options of its jobs."""
    group = parser.add_argument_group("many machines (--slurm-tasks needs pip install 'muse_fast[slurm]')")
    group.add_argument(
        "--task",
        type=_share,
        metavar="I/N",
        help="do only share I (0 to N-1) of the slides; the command without --task does what is left and joins all",
    )
    group.add_argument(
        "--slurm-tasks", type=int, metavar="N", help="distribute the slides over N tasks of a job array, then join"
    )
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


def each_share(do: Callable[[Share | None], None], given: Share | None) -> None:
    """Do a command: the share that ``--task`` gives, or everything; under torchrun the share of each rank.

    Rank 0 waits for the others, however long, and then joins. If one dies, the launcher ends the job; what was finished
    is used when it is started again.

    Args:
        do: called with a share; with None to do all that is left, and to join.
    """
    if given or not distributed.launched():
        do(given)
        return
    store, rank, ranks = distributed.join_store()
    do(Share(rank, ranks))
    if rank:
        store.set(f"done/{rank}", "")
        return
    for other in range(1, ranks):
        while not store.check([f"done/{other}"]):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    do(None)


@dataclass(frozen=True)
class TaskJob:
    """One job: a share, or the last one. submitit pickles it and calls it on its node.

    Attributes:
        command: takes the arguments of a command and returns the exit code.
    """

    command: Callable[[Sequence[str]], int]
    arguments: tuple[str, ...]

    def __call__(self) -> int:
        """Run until the end.

        Raises:
            UserError: the command cannot do it.
        """
        print_any_name()
        return self.command(self.arguments)

    def checkpoint(self) -> Any:
        """What submitit queues again when the time is over: the same, for finished files are not done again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class JobArray:
    """The jobs of a command with ``--slurm-tasks``.

    Args:
        options: those of `add_arguments`, and ``out``.

    Raises:
        UserError: the options cannot be used, or submitit is not installed.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        tasks, self._options, self._out = options.slurm_tasks, options, options.out
        require(tasks > 0, "--slurm-tasks", tasks, "1 or more")
        if options.task:
            raise UserError("--task is for what --slurm-tasks submits; give one of them")
        self._logs = self._out.absolute().with_name(f"{self._out.name}.slurm")
        with cluster.submitting():
            self._executor = cluster.executor(self._logs, options.local, _MAX_TIMEOUTS)

    def submit(
        self,
        command: Callable[[Sequence[str]], int],
        arguments: Sequence[str],
        files: int,
        of_a_task: Sequence[str] = (),
    ) -> None:
        """Submit the tasks and the job that joins; with ``--local`` run them here, and print what the last prints.

        Args:
            command: as in `TaskJob`.
            arguments: of all jobs.
            files: how many are shared out, for the message.
            of_a_task: further arguments of the tasks.

        Raises:
            UserError: submission or a local job failed.
        """
        options, tasks = self._options, self._options.slurm_tasks
        if options.local:  # the tasks share this machine's cores; Slurm binds each to its own
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // tasks)))
        with cluster.submitting():
            common = {"name": self._out.name, "timeout_min": options.time, "stderr_to_stdout": True}
            self._executor.update_parameters(**common, **self._slurm())
            with self._executor.batch():
                jobs = [
                    self._executor.submit(TaskJob(command, (*arguments, *of_a_task, "--task", str(Share(task, tasks)))))
                    for task in range(tasks)
                ]
            print(f"{tasks} tasks for {files} slides; output in {self._logs}", flush=True)
            array = jobs[0].job_id.partition("_")[0]
            if options.local:
                cluster.wait_for(jobs)
            else:  # after the tasks, also where one failed: the last job does what they have left
                self._executor.update_parameters(**self._slurm(dependency=f"afterany:{array}"))
            last = self._executor.submit(TaskJob(command, tuple(arguments)))
            if options.local:
                cluster.wait_for([last])
                print(Path(last.paths.stdout).read_text(), end="")
            else:
                print(f"jobs {array} and {last.job_id}, which completes {self._out}")

    def _slurm(self, **additional: Any) -> dict[str, Any]:
        if self._options.local:
            return {}
        return cluster.slurm_parameters(self._options, self._options.cpus_per_task, **additional)
