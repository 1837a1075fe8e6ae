"""Start processes that can be killed, stopped and starved, and look at what is left of them."""

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

# Children are forked from a server that has only imported the commands. This saves each child the seconds it takes to
# import torch, and is safe as the server has no threads and has not used autograd.
FORKED = multiprocessing.get_context("forkserver")
_COMMANDS = ["muse_fast.pretrain", "muse_fast.finetune", "torture.toy"]
FORKED.set_forkserver_preload([*_COMMANDS, "torch.utils.tensorboard", "torch.distributed.fsdp", "timm"])


class Child:
    """``function(*arguments)`` in its own process, with the result as exit code. Leaving the context kills it.

    Args:
        log: file for its output.
        env: variables added to its environment.
    """

    def __init__(
        self, function: Callable[..., int], *arguments: Any, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        os.environ["OMP_NUM_THREADS"] = "1"
        self._process = FORKED.Process(target=_call, args=(function, arguments, log, dict(env or {})))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code (negative after a signal), or None while it runs."""
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
        """Send SIGKILL and wait until the process is gone."""
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
    multiprocessing.set_start_method("fork", force=True)  # as in a real command, whose loader forks
    os.environ.update(env)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(function(*arguments))


def wait_until(happened: Callable[[], bool], seconds: float, what: str = "nothing happened") -> float:
    """Wait and return the seconds it took; AssertionError if it did not happen in time."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"{what} after {seconds:g} s")
        time.sleep(0.01)
    return time.monotonic() - began


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def status_of(pid: int) -> tuple[str, int]:
    """Return the state letter of a process (X if it does not exist) and its parent."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


def is_alive(pid: int) -> bool:
    return status_of(pid)[0] not in "ZX"


def all_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def children_of(pid: int) -> list[int]:
    return [each for each in all_processes() if status_of(each)[1] == pid]


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment that a process started with; empty if it does not exist or is not ours."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def name_of(code: int) -> str:
    """Return an exit code as text, or the name of the signal behind it."""
    return signal.Signals(-code).name if code < 0 else str(code)
