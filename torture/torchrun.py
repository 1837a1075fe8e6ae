"""Run ``torchrun`` with two ranks and keep track of all its descendants."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torture.processes import all_processes, children_of, environment_of, is_alive, wait_until

_MARK = "MUSE_FAST_JOB"  # in the environment of a job's processes; their children inherit it


class Job(subprocess.Popen[bytes]):
    """torchrun's launcher of ``python -m torture.paced``. Leaving the context kills what is left of the job.

    Args:
        command: `pretrain` or `finetune`.
        argv: arguments of the command.
        options: options of torchrun.
        log: file for the output of the launcher and the ranks.
    """

    def __init__(self, command: str, argv: Sequence[str], *options: str, log: Path) -> None:
        self.log, self._name = log, uuid.uuid4().hex
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
        with open(log, "ab") as file:
            super().__init__(
                [*launcher, "-m", "torture.paced", command, *argv],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", _MARK: self._name},
            )

    def __exit__(self, *raised: Any) -> None:
        self.kill()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        super().__exit__(*raised)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def steps(self) -> list[int]:
        """Return the steps that all starts have printed."""
        return [int(step) for step in re.findall(r"^step (\d+)/", self.output(), re.MULTILINE)]

    def wait_for_steps(self, count: int, seconds: float = 600) -> float:
        """Wait until all starts together have printed ``count`` steps; return the seconds it took."""
        took = wait_until(
            lambda: len(self.steps()) >= count or self.poll() is not None, seconds, f"fewer than {count} steps"
        )
        assert len(self.steps()) >= count, f"ended with {self.poll()}: {self.output()[-2000:]}"
        return took

    def ranks(self) -> dict[int, int]:
        """Return the process of each rank."""
        found = {environment_of(pid).get("RANK", ""): pid for pid in children_of(self.pid)}
        return {number: found[str(number)] for number in (0, 1)}

    def processes(self) -> set[int]:
        """Return the living descendants of the launcher: ranks, their loaders and others."""
        ours = {pid for pid in all_processes() if environment_of(pid).get(_MARK) == self._name and is_alive(pid)}
        return ours - {self.pid}
