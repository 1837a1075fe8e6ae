"""T2, T3, T4: several ranks, one of which is killed or hung."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from muse_fast.runtime import checkpoint, exit_codes
from muse_fast.runtime.distributed import rank
from muse_fast.training.report import Metrics
from torture import toy
from torture.harness import Outcome, Row, Scale, Tally
from torture.processes import is_alive, name_of, wait_until
from torture.rows.runs import codes_of, two_ranks
from torture.suite import tests
from torture.torchrun import Job
from torture.toy import FINETUNE, PRETRAIN, Command, Step

_TIMEOUT = 6
_HUNG_STEP = 5  # counted from 1


def same_numbers(scale: Scale) -> Outcome:
    files = "tests/test_distributed.py", "tests/test_finetune_ranks.py"
    return tests(*files, "-k", "two_ranks_equal_one", MUSE_FAST_TOY_STEPS="60")


# ---------------------------------------------------------------------------------------------------------------- T3

_KILLS = 5  # per job: the launcher restarts after all but the last
_GONE, _AGAIN = 5, 15  # limits in seconds until all ranks and loaders, or the job, have ended; until the next step


def killed_ranks(scale: Scale) -> Outcome:
    """Kill either rank of torchrun's jobs at random steps and moments, until torchrun gives the job up.

    Nothing may be left of a start, and a later job must finish the run with the numbers of an unbroken one.
    """
    tally, workplace = Tally(), toy.prepare(scale.folder)
    kills = scale.of(_KILLS, 2)
    steps = 6 * kills + 4  # a start takes up to four, and two more during the pause before the kill
    gone: list[float] = []
    again: list[float] = []
    for command in (PRETRAIN, FINETUNE):
        unbroken = scale.folder / f"{command.name}-unbroken"
        assert _finish_on_two_ranks(command, workplace, unbroken, steps) == [0, 0]
        for number in range(scale.of(2, 1)):
            out = scale.folder / f"{command.name}-{number}"
            argv = _argv(command, workplace, out, steps)
            with Job(command.name, argv, "--max-restarts", str(kills - 1), log=toy.log_of(out)) as job:
                _kill_until_it_gives_up(job, scale, tally, kills, gone, again)
                orphans = job.processes()
                codes = job.wait(), _finish_on_two_ranks(command, workplace, out, steps)
                said = job.output()
            reported = said.count("lost its connection to another rank") == kills and "[rank" not in said
            same = toy.losses(out) == toy.losses(unbroken)
            same = same and command.weights_hash(out, steps) == command.weights_hash(unbroken, steps)
            left_over = orphans or toy.orphans(out)
            survived = reported and same and codes == (1, [0, 0]) and not left_over
            what = f"{out.name}: exit codes {codes}, same numbers {same}, left over {left_over}, said {said[-600:]!r}"
            tally.add(survived, what)
    notes = f"{len(gone)} kills: gone after {_spread(gone)}, training again after {_spread(again)}"
    return tally.outcome(f"{notes}; {tally.injected - len(gone)} runs finished bit-identical")


def _kill_until_it_gives_up(
    job: Job, scale: Scale, tally: Tally, kills: int, gone: list[float], again: list[float]
) -> None:
    """Kill a rank of each start of a job; append the seconds until all had ended, and until the next step."""
    job.wait_for_steps(scale.rng.randint(1, 4))
    for starts_left in reversed(range(kills)):
        time.sleep(scale.rng.uniform(0, 0.3))
        victim, before, printed = scale.rng.choice([0, 1]), job.processes(), len(job.steps())
        assert len(before) >= 4, before  # two ranks with a loader each
        os.kill(job.ranks()[victim], signal.SIGKILL)
        ended = partial(_ended, job, before, for_good=starts_left == 0)
        gone.append(wait_until(ended, scale.limit(60), "the other rank is still alive"))
        in_time = gone[-1] < scale.limit(_GONE)
        if starts_left:
            again.append(gone[-1] + job.wait_for_steps(printed + 1))
            in_time = in_time and again[-1] < scale.limit(_AGAIN)
            job.wait_for_steps(printed + scale.rng.randint(1, 4))
        at = f"rank {victim} of {job.log.stem}, {starts_left} starts left"
        tally.add(in_time, f"{at}: gone after {gone[-1]:.1f} s, training again after {again[-1:]}")


def _ended(job: Job, before: set[int], for_good: bool) -> bool:
    """Whether all processes of ``before`` have ended and, if ``for_good``, the launcher too."""
    return not any(map(is_alive, before)) and (not for_good or job.poll() is not None)


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} s (at most {max(seconds):.1f} s)"


def _argv(command: Command, workplace: Path, out: Path, steps: int) -> list[str]:
    return command.arguments(workplace, out, command.lasting(steps), "data.workers=1")


def _finish_on_two_ranks(command: Command, workplace: Path, out: Path, steps: int) -> list[int]:
    argv = _argv(command, workplace, out, steps)
    return codes_of(two_ranks(out, command, (argv,), (argv,)))


# ---------------------------------------------------------------------------------------------------------------- T4


def hanging(command: Command, argv: Sequence[str], on_rank: int) -> int:
    """Run the command; rank ``on_rank`` sleeps for ever in step 5."""

    def with_sleep(train_step: Step) -> Step:
        def step_that_hangs(trainer: Any, *batch: Any, measure: bool) -> Metrics:
            if trainer.step == _HUNG_STEP - 1 and rank() == on_rank:
                time.sleep(3600)
            return train_step(trainer, *batch, measure=measure)

        return step_that_hangs

    command.wrap_step(with_sleep)
    return command(argv)


def hung_rank(scale: Scale) -> Outcome:
    """Let one of two ranks sleep, or stop it."""
    tally, workplace = Tally(), toy.prepare(scale.folder)
    took = []
    cases = toy.in_turn([("asleep", 1), ("stopped", 1), ("asleep", 0)])
    for command, (kind, culprit) in cases[: scale.of(6, 2)]:
        out = scale.folder / f"{command.name}-{kind}-{culprit}"
        settings = ("optim.batch_size=4", f"train.timeout={_TIMEOUT}", command.lasting(1000))
        argv = command.arguments(workplace, out, *settings)
        sleeper = culprit if kind == "asleep" else -1
        ranks = two_ranks(out, hanging, *[(command, argv, sleeper)] * 2)
        try:
            toy.wait_for_step(out, _HUNG_STEP - 1, ranks[0])
            if kind == "stopped":
                ranks[culprit].signal(signal.SIGSTOP)
            began = time.monotonic()
            code = ranks[1 - culprit].wait(scale.limit(60))
            took.append(time.monotonic() - began)
            said = "".join(child.output() for child in ranks)
        finally:
            for child in ranks:
                child.kill()
        written = json.loads((out / "exit.json").read_text()) if (out / "exit.json").exists() else {}
        reason = str(written.get("reason", ""))
        why = "no longer answers" if kind == "stopped" else "keeps them waiting"
        named = f"; rank {culprit} (step " in reason and why in reason and reason in said
        kept = not checkpoint.latest(out)[1] and checkpoint.steps(out) != []
        in_time = took[-1] < scale.limit(_TIMEOUT + 5)
        # If the other rank sees the sleeper end first, it may exit with a connection error.
        ended = written.get("code") == exit_codes.STALLED and code != 0
        what = f"{out.name}: {name_of(code)} after {took[-1]:.1f} s, {written}, said {said[-400:]!r}"
        tally.add(named and kept and in_time and ended, what)
    return tally.outcome(f"with a limit of {_TIMEOUT} s, named within {max(took):.1f} s")


ROWS = [
    Row(
        "T2",
        "two ranks compute the same numbers as one",
        "DDP and FSDP2: losses within 1e-13 in float64 and 5e-6 in float32 over 60 steps of pretraining, "
        "1e-12 and 2e-5 over 40 of fine-tuning",
        same_numbers,
        quick=False,
    ),
    Row(
        "T3",
        "a killed rank ends the job, and torchrun restarts it",
        "20 kills: others and loaders gone within 5 s, training again within 15 s, no process left, bit-identical",
        killed_ranks,
    ),
    Row(
        "T4",
        "a hung rank is named, with its step",
        "asleep and stopped: named within the limit + 5 s, the last checkpoint is untouched",
        hung_rank,
    ),
]
