"""T2, T3, T4: several ranks, one of which is killed or hangs."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence

from muse_fast.batch import Views
from muse_fast.distributed import rank
from muse_fast.train import checkpoint
from muse_fast.train.run import EXIT_STALLED
from muse_fast.train.trainer import Metrics, Trainer
from torture import toy
from torture.processes import name_of
from torture.rows import Outcome, Row, Scale, Tally
from torture.runs import two_ranks
from torture.suite import tests

_TIMEOUT = 6
_HUNG_STEP = 5  # counted from 1


def same_numbers(scale: Scale) -> Outcome:
    return tests("tests/test_distributed.py", "-k", "two_ranks_equal_one")


def killed_rank(scale: Scale) -> Outcome:
    return tests("tests/test_torchrun.py", "-k", "killed_rank")


def hanging(argv: Sequence[str], on_rank: int) -> int:
    """The command, one rank of which sleeps for ever in step 5."""
    train_step = Trainer.train_step

    def step_that_hangs(trainer: Trainer, *views: Views, measure: bool) -> Metrics:
        if trainer.step == _HUNG_STEP - 1 and rank() == on_rank:
            time.sleep(3600)
        return train_step(trainer, *views, measure=measure)

    Trainer.train_step = step_that_hangs  # type: ignore[method-assign]
    return toy.command(argv)


def hung_rank(scale: Scale) -> Outcome:
    """One of two ranks sleeps, or is stopped; either of them."""
    tally, workplace = Tally(), toy.prepare(scale.folder)
    took = []
    for kind, culprit in [("asleep", 1), ("stopped", 1), ("asleep", 0)][: scale.of(3, 2)]:
        out = scale.folder / f"{kind}-{culprit}"
        argv = toy.arguments(workplace, out, "optim.batch_size=4", f"train.timeout={_TIMEOUT}", "optim.steps=1000")
        sleeper = culprit if kind == "asleep" else -1
        ranks = two_ranks(out, hanging, (argv, sleeper), (argv, sleeper))
        try:
            toy.wait_for_step(out, _HUNG_STEP - 1, ranks[0])
            if kind == "stopped":
                ranks[culprit].signal(signal.SIGSTOP)
            began = time.monotonic()
            code = ranks[1 - culprit].wait(60)
            took.append(time.monotonic() - began)
            said = "".join(child.output() for child in ranks)
        finally:
            for child in ranks:
                child.kill()
        told = json.loads((out / "exit.json").read_text()) if (out / "exit.json").exists() else {}
        reason = str(told.get("reason", ""))
        why = "no longer answers" if kind == "stopped" else "keeps them waiting"
        named = f"; rank {culprit} (step " in reason and why in reason and reason in said
        kept = not checkpoint.latest(out)[1] and checkpoint.steps(out) != []
        in_time = took[-1] < _TIMEOUT + 5
        # The rank that sees the sleeper end by itself first may leave with an error of its connection.
        ended = told.get("code") == EXIT_STALLED and code != 0
        what = f"{kind} rank {culprit}: {name_of(code)} after {took[-1]:.1f} s, {told}, said {said[-400:]!r}"
        tally.add(named and kept and in_time and ended, what)
    return tally.outcome(f"with a limit of {_TIMEOUT} s, named after {max(took):.1f} s at the latest")


ROWS = [
    Row(
        "T2",
        "two ranks give the numbers of one",
        "DDP and FSDP2, 50 steps: 1e-12 in float64, 1e-5 in float32",
        same_numbers,
        quick=False,
    ),
    Row(
        "T3",
        "a killed rank ends the job and torchrun starts it again",
        "others gone within 10 s, restart, again until done, bit-identical",
        killed_rank,
        quick=False,
    ),
    Row(
        "T4",
        "a rank that hangs is named with its step",
        "asleep and stopped: named within the limit + 5 s, the last checkpoint untouched",
        hung_rank,
    ),
]
