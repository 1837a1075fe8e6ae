"""Processes to be killed, stopped and starved, and what is left of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Children are forked from a process that has imported the commands and done nothing else: it has neither threads nor
# autograd, after which a fork would not work, and a child needs no seconds to import torch.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["muse_fast.pretrain", "muse_fast.finetune", "torch.utils.tensorboard", "torture.toy"])


class Child:
    """``function(*arguments)`` in a process of its own; what it returns is the exit code. Killed at the end.

    Args:
        log: file for its output.
        env: added to its environment.
    """

    def __init__(
        self, function: Callable[..., int], *arguments: Any, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        os.environ["OMP_NUM_THREADS"] = "1"
        self._process = _CONTEXT.Process(target=_call, args=(function, arguments, log, dict(env or {})))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 600) -> int:
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            raise TimeoutError(f"still running after {seconds:g} s: {self.output()[-500:]}")
        return code

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """By SIGKILL, and gone when this returns."""
        if self.poll() is None:
            self._process.kill()
        self._process.join()

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *raised: object) -> None:
        self.kill()


def _call(function: Callable[..., int], arguments: Sequence[Any], log: Path, env: Mapping[str, str]) -> None:
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a command of its own; its loader forks, above all
    os.environ.update(env)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(function(*arguments))


def wait_until(happened: Callable[[], bool], seconds: float, what: str = "nothing") -> float:
    """Seconds that it took; AssertionError where it did not happen in time."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"{what} within {seconds:g} s")
        time.sleep(0.01)
    return time.monotonic() - began


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def status_of(pid: int) -> tuple[str, int]:
    """State letter of a process, X where there is none, and its parent."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


def is_alive(pid: int) -> bool:
    return status_of(pid)[0] not in "ZX"


def everyone() -> list[int]:
    """All processes."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def children_of(pid: int) -> list[int]:
    return [each for each in everyone() if status_of(each)[1] == pid]


def environment_of(pid: int) -> dict[str, str]:
    """Of a process, as it was when it began; nothing where there is none, or it is not ours."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def name_of(code: int) -> str:
    """An exit code in words."""
    return signal.Signals(-code).name if code < 0 else str(code)
