"""The process pool: order, errors, and no process outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from muse_fast.preparing.pool import Pool


def slow_square(x: int) -> int:
    time.sleep(0.002 * (x % 3))
    return x * x


def die(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def test_results_come_in_order_to_many_threads() -> None:
    """More threads than pending results are allowed; none deadlocks."""
    with Pool(2) as pool, ThreadPoolExecutor(7) as threads:
        runs = [threads.submit(lambda n=n: list(pool.map(slow_square, range(n)))) for n in range(12)]  # type: ignore[misc]
        assert [run.result(300) for run in runs] == [[x * x for x in range(n)] for n in range(12)]
        assert pool.call(slow_square, 7) == 49
        some = pool.map(slow_square, range(100))
        assert [next(some) for _ in range(5)] == [0, 1, 4, 9, 16]
        some.close()  # type: ignore[attr-defined]
        assert list(pool.map(slow_square, range(20))) == [x * x for x in range(20)]  # closing freed its room


def test_without_processes() -> None:
    with Pool(1) as pool:
        assert list(pool.map(lambda _: os.getpid(), range(2))) == [os.getpid()] * 2
        assert pool.call(slow_square, 3) == 9


def test_a_process_that_dies_raises() -> None:
    with Pool(2) as pool, pytest.raises(BrokenProcessPool):
        list(pool.map(die, range(10)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from muse_fast.preparing.pool import Pool\n"
        "if __name__ == '__main__':\n"
        "    with Pool(2) as pool:\n"
        "        print(*pool.map(os.getpgid, [0] * 20), flush=True)\n"
        "        print(*{p.pid for p in pool._executor._processes.values()}, flush=True)\n"
        "        time.sleep(1000)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    parent.stdout.readline()
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2 and all(Path(f"/proc/{pid}").exists() for pid in children)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 300
    while any(_alive(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
