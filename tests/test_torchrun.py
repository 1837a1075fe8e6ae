"""torchrun, on the network as it is: ranks that are killed, told to stop, or refuse; nothing is left of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from toy_runs import Runs, assert_same_bits, assert_same_losses, toy_runs, training_rows

from muse_fast import pretrain
from muse_fast.distributed import store_of_this_start
from muse_fast.train import checkpoint
from torture.processes import children_of, is_alive, wait_until

SHORT = ("optim.steps=16", "train.log_every=2", "train.checkpoint_every=4", "data.workers=1")


class Job(subprocess.Popen[str]):
    """``torchrun`` with two ranks; all that is left of it is killed at the end."""

    def __init__(self, argv: Sequence[str], *options: str) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
        super().__init__(
            [*launcher, "-m", "muse_fast.pretrain", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.seen: set[int] = set()

    def __exit__(self, *raised: Any) -> None:
        self.kill()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        super().__exit__(*raised)

    def wait_for_step(self, out: Path, step: int) -> dict[int, int]:
        """Until it is logged; returns the process of each rank."""
        while not any(row["step"] >= step for row in training_rows(out)):
            assert self.poll() is None, self.communicate()
            time.sleep(0.02)
        ranks = {environment_of(pid).get("RANK", ""): pid for pid in children_of(self.pid)}
        self.seen |= {child for pid in ranks.values() for child in (pid, *children_of(pid))}
        return {number: ranks[str(number)] for number in (0, 1)}

    def left(self) -> set[int]:
        """Ranks and their loaders that were there when a step was waited for, and still are."""
        return {pid for pid in self.seen if is_alive(pid)}


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def finish(runs: Runs, out: Path) -> None:
    """Go on to the end with two ranks again, on the network as it is."""
    assert runs.ranks(pretrain.main, [(runs.argv(out, *SHORT),)] * 2) == [0, 0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks) -> Runs:
    return toy_runs(tmp_path_factory.mktemp("torchrun"), two_ranks)


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> Path:
    """A run under torchrun, whose output the main rank alone has written."""
    out = runs.folder / "unbroken"
    with Job(runs.argv(out, *SHORT)) as job:
        printed, _ = job.communicate()
        assert job.returncode == 0
    steps = [line.split()[1] for line in printed.splitlines() if line.startswith("step ")]
    assert steps == [f"{step}/16" for step in range(2, 17, 2)]
    assert printed.count("muse_fast ") == printed.count("done: ") == printed.count("summary: ") == 1
    return out


@pytest.mark.slow
def test_torchrun_equals_one_rank(runs: Runs, unbroken: Path, tmp_path: Path) -> None:
    assert pretrain.main(runs.argv(tmp_path / "one", *SHORT)) == 0
    assert_same_losses(unbroken, tmp_path / "one", 1e-12)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "ended"
    with Job(runs.argv(out, *SHORT)) as job:
        os.kill(job.wait_for_step(out, 6)[1], signal.SIGKILL)
        wait_until(lambda: not job.left(), 10)
    assert checkpoint.steps(out)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_torchrun_starts_it_again(runs: Runs, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    with Job(runs.argv(out, *SHORT), "--max-restarts", "1") as job:
        first = job.wait_for_step(out, 6)
        os.kill(first[1], signal.SIGKILL)
        wait_until(lambda: not job.left(), 10)
        checkpoints = checkpoint.steps(out)
        assert job.poll() is None and checkpoints

        second = job.wait_for_step(out, 10)
        assert not set(first.values()) & set(second.values())
        os.kill(second[0], signal.SIGKILL)
        wait_until(lambda: not job.left() and job.poll() is not None, 10)
        assert job.returncode == 1
    finish(runs, out)
    assert_same_bits(out, unbroken)


def test_a_start_does_not_see_what_an_earlier_one_stored() -> None:
    """The rank that is there first finds the name of the start before, whose rank 0 answers no more."""
    store = torch.distributed.HashStore()
    seconds = timedelta(seconds=20)
    for number in range(3):
        with ThreadPoolExecutor() as threads:
            others = [threads.submit(store_of_this_start, store, other, 3, seconds) for other in (1, 2)]
            time.sleep(0.2)
            stores = [store_of_this_start(store, 0, 3, seconds), *(each.result() for each in others)]
        assert not any(each.check(["address"]) for each in stores)
        stores[1].set("address", str(number))
        assert [each.get("address") for each in stores] == [str(number).encode()] * 3
    with pytest.raises(torch.distributed.DistStoreError):
        store_of_this_start(store, 1, 3, timedelta(seconds=0))


@pytest.mark.slow
@pytest.mark.parametrize("told", ["launcher", "rank 0", "rank 1"])
def test_sigterm_saves_on_all_ranks(runs: Runs, unbroken: Path, tmp_path: Path, told: str) -> None:
    """They agree at the next row. torchrun keeps code 75 to itself: its own is 1."""
    out = tmp_path / "told"
    with Job(runs.argv(out, *SHORT, "train.checkpoint_every=1000")) as job:
        ranks = job.wait_for_step(out, 4)
        os.kill({"launcher": job.pid, "rank 0": ranks[0], "rank 1": ranks[1]}[told], signal.SIGTERM)
        printed, _ = job.communicate()
        assert job.returncode == 1 and not job.left()
    written = json.loads((out / "exit.json").read_text())
    assert written["code"] == pretrain.EXIT_STOPPED and written["step"] in (4, 6, 8)
    assert written["reason"] == ("another rank was told to stop" if told == "rank 1" else "SIGTERM")
    assert checkpoint.steps(out) == [written["step"]] and printed.count("checkpoint written") == 1
    checkpoint.verify(checkpoint.folder_of(out, written["step"]))
    assert training_rows(out)[-1]["step"] == written["step"]
    finish(runs, out)
    assert_same_bits(out, unbroken)
    assert not (out / "exit.json").exists()


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_by_every_rank(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "odd"
    with Job(runs.argv(out, *SHORT, "optim.batch_size=3")) as job:
        _, printed = job.communicate(timeout=60)
        assert job.returncode == 1
    assert printed.count("error: optim.batch_size=3: expected a multiple of 2 ranks x 1 micro-batches") == 2
    assert "exitcode  : 2" in printed and "muse_fast/train" not in printed
    assert not out.exists()
