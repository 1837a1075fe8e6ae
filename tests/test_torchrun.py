"""torchrun: ranks that are killed, stopped, or refuse to start. ``torture`` kills more of them (row T3)."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from muse_fast.errors import UserError
from muse_fast.runtime import checkpoint, exit_codes
from muse_fast.runtime.distributed import _lost_rank_explained, store_of_this_start
from tests.support.ranks import Ranks
from tests.support.toy_runs import UNCHANGED, assert_same_losses, assert_same_weights, run_command, training_rows
from torture import toy
from torture.processes import is_alive, wait_until
from torture.torchrun import Job
from torture.toy import FINETUNE, PRETRAIN, Command

STEPS = 16
NETWORKS = ("student", "teacher", "detector")  # files of checkpoints
SHORT = {
    "pretrain": ("optim.batch_size=4", "train.checkpoint_every=6", "train.eval_every=0"),
    "finetune": ("loss.confidence=0.3",),
}


@pytest.fixture(
    scope="module", params=[PRETRAIN, pytest.param(FINETUNE, marks=pytest.mark.heavy)], ids=lambda c: c.name
)
def command(request: pytest.FixtureRequest) -> Command:
    found: Command = request.param
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.prepare(tmp_path_factory.mktemp("torchrun"))


def arguments(command: Command, workplace: Path, out: Path, *overrides: str) -> list[str]:
    short = "train.precision=fp64", command.lasting(STEPS), "train.log_every=2", "data.workers=1"
    return command.arguments(workplace, out, *short, *SHORT[command.name], *overrides)


@pytest.fixture(scope="module")
def unbroken(command: Command, workplace: Path, two_ranks: Ranks) -> Path:
    """A run on two ranks without torchrun."""
    out = workplace / f"{command.name}-unbroken"
    if not (out / "summary.json").exists():  # pytest sets this up again when it comes back to a command
        run_on_two_ranks(command, arguments(command, workplace, out, "data.workers=0"), two_ranks)
    return out


def run_on_two_ranks(command: Command, argv: list[str], two_ranks: Ranks) -> None:
    ended = two_ranks(run_command, [(argv, UNCHANGED, command.main)] * 2)
    assert [each.code for each in ended] == [0, 0], ended


@pytest.mark.slow
def test_a_killed_rank_starts_again_and_a_stopped_job_saves(
    command: Command, workplace: Path, unbroken: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    """torchrun restarts the ranks from the last checkpoint, and passes SIGTERM on to them."""
    out = tmp_path / "run"
    argv = arguments(command, workplace, out)
    with Job(command.name, argv, "--max-restarts", "1", log=toy.log_of(out)) as job:
        job.wait_for_steps(4)
        first = job.processes()
        assert len(first) >= 4  # two ranks with a loader each
        os.kill(job.ranks()[1], signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, first)), 200, "the other rank is still alive")
        before = len(job.steps())
        job.wait_for_steps(before + 1)
        os.kill(job.pid, signal.SIGTERM)
        assert job.wait() == 1 and not job.processes()
        printed, steps = job.output(), job.steps()
    # On a busy machine torchrun may end the other rank before it notices.
    assert printed.count("lost its connection to another rank") <= 1 and "[rank" not in printed
    assert printed.count("muse_fast ") == 2  # only the main rank prints
    assert 8 <= steps[before] <= steps[before - 1] + 2  # from the checkpoint of step 6, or a later one
    assert_saved(out, steps[-1])
    run_on_two_ranks(command, argv, two_ranks)
    assert_same_end(command, out, unbroken)


def assert_saved(out: Path, step: int) -> None:
    """Assert that a job that was asked to stop has saved its last step."""
    written = json.loads((out / "exit.json").read_text())
    assert (written["code"], written["step"]) == (exit_codes.STOPPED, step) and step in range(4, STEPS, 2)
    assert checkpoint.steps(out)[-1] == training_rows(out)[-1]["step"] == step
    checkpoint.verify(checkpoint.folder_of(out, step))


def assert_same_end(command: Command, out: Path, unbroken: Path) -> None:
    """Two starts of the same run on a busy machine have differed in the last bit of a loss, from the first row on."""
    assert [row["step"] for row in training_rows(out)] == list(range(2, STEPS + 1, 2))
    assert_same_losses(out, unbroken, 1e-11, ("loss",))
    assert_same_weights(out, unbroken, 1e-9, *(stem for stem in command.stems if stem in NETWORKS))
    assert not (out / "exit.json").exists()


@pytest.mark.heavy
def test_torchrun_equals_one_rank(command: Command, workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    with Job(command.name, arguments(command, workplace, out), log=toy.log_of(out)) as job:
        assert job.wait() == 0, job.output()
        printed = job.output()
        assert job.steps() == list(range(2, STEPS + 1, 2))
    assert printed.count("muse_fast ") == printed.count("done: ") == printed.count("summary: ") == 1
    assert command(arguments(command, workplace, tmp_path / "one")) == 0
    assert_same_losses(out, tmp_path / "one", 1e-12, ("loss",))


def test_a_start_does_not_see_what_an_earlier_one_stored() -> None:
    """The first rank finds the name of the previous start, whose rank 0 no longer answers."""
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


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:30096",
            True,
        ),
        (
            "NCCL error in: NCCLUtils.cpp:94\nncclRemoteError: a remote process exited or there was a network error",
            True,
        ),
        ("NCCL error in: NCCLUtils.cpp:94\nncclInvalidUsage: Duplicate GPU detected", False),
        ("a bug", False),
    ],
)
def test_which_errors_mean_a_lost_rank(message: str, lost: bool) -> None:
    expected = UserError if lost else torch.distributed.DistBackendError
    with pytest.raises(expected) as raised, _lost_rank_explained(3):
        raise torch.distributed.DistBackendError(message)
    assert message.splitlines()[0] in str(raised.value) and ("rank 3 lost its" in str(raised.value)) == lost


@pytest.mark.heavy
@pytest.mark.parametrize("receiver", ["launcher", "rank 0", "rank 1"])
def test_sigterm_saves_on_all_ranks(
    command: Command, workplace: Path, unbroken: Path, tmp_path: Path, two_ranks: Ranks, receiver: str
) -> None:
    """The ranks agree at the next row. torchrun does not pass code 75 on: it exits with 1."""
    out = tmp_path / "stopped"
    argv = arguments(command, workplace, out, *command.saves_rarely)
    with Job(command.name, argv, log=tmp_path / "stopped.log") as job:
        job.wait_for_steps(2)
        ranks = job.ranks()
        os.kill({"launcher": job.pid, "rank 0": ranks[0], "rank 1": ranks[1]}[receiver], signal.SIGTERM)
        assert job.wait() == 1 and not job.processes()
        printed = job.output()
    written = json.loads((out / "exit.json").read_text())
    assert written["reason"] == ("another rank was asked to stop" if receiver == "rank 1" else "SIGTERM")
    assert printed.count("checkpoint written") == 1
    assert_saved(out, written["step"])
    run_on_two_ranks(command, arguments(command, workplace, out), two_ranks)
    assert_same_end(command, out, unbroken)


@pytest.mark.heavy
def test_a_batch_that_does_not_divide_is_refused_by_every_rank(
    command: Command, workplace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "odd"
    argv = arguments(command, workplace, out, "optim.batch_size=3")
    with Job(command.name, argv, log=tmp_path / "odd.log") as job:
        assert job.wait(600) == 1
        printed = job.output()
    assert printed.count("error: optim.batch_size=3: expected a multiple of 2 ranks x 1 micro-batches") == 2
    assert "exitcode  : 2" in printed and "muse_fast/train" not in printed
    assert not out.exists()
