"""C2, T1, T5, T6, T7: whole runs, which are killed, stopped, poisoned, and starved of workers and memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from muse_fast.batch import Views
from muse_fast.detection.samples import LfovBatch
from muse_fast.images.imagenet import normalised
from muse_fast.runtime import checkpoint, exit_codes
from muse_fast.runtime.distributed import rank
from muse_fast.training.report import Metrics
from torture import toy
from torture.harness import Outcome, Row, Scale, Tally
from torture.processes import Child, children_of, free_port, is_alive, name_of, rank_environment, wait_until
from torture.suite import tests
from torture.toy import FINETUNE, PRETRAIN, Command, Step

# ---------------------------------------------------------------------------------------------------------------- C2


def exact_resume(scale: Scale) -> Outcome:
    """Kill runs at random moments and restart them, with and without loader processes: the result is bit-identical."""
    tally, workplace = Tally(), toy.prepare(scale.folder)
    kills = scale.of(10, 1)
    for command in (PRETRAIN, FINETUNE):
        unbroken = scale.folder / f"{command.name}-unbroken"
        assert command.finish(workplace, unbroken) == 0
        for number, workers in enumerate(["data.workers=0", "data.workers=2"] * kills):
            out = scale.folder / f"{command.name}-{number}"
            step = scale.rng.randint(2, toy.STEPS - 1)
            with command.start(workplace, out, workers) as child:
                toy.wait_for_step(out, step, child)
                time.sleep(scale.rng.uniform(0, 0.3))
                child.kill()
            finished = (out / "summary.json").exists()  # the kill may come after the last step
            code = 0 if finished else command.finish(workplace, out, workers)
            same = code == 0 and toy.losses(out) == toy.losses(unbroken)
            same = same and command.weights_hash(out) == command.weights_hash(unbroken) and not toy.orphans(out)
            what = f"{command.name} killed at step {step}, {workers}: exit code {code}, left over {toy.orphans(out)}"
            tally.add(same, what)
            shutil.rmtree(out)
    return tally.outcome(f"of each command {kills} without loader processes, {kills} with two")


# ---------------------------------------------------------------------------------------------------------------- T1

_BAD_STEP = 5  # counted from 1; the checkpoint of step 4 is the last good one
_POISONS = ("nan in an image", "inf in an image", "nan only in the gradients")


def poisoned(command: Command, argv: Sequence[str], poison: str, on_rank: int, report: Path) -> int:
    """Run the command with a non-finite value in step 5 on one rank, then report the state it left in memory."""
    trainers: list[Any] = []
    before: dict[str, torch.Tensor] = {}

    def with_poison(train_step: Step) -> Step:
        def step_with_poison(trainer: Any, *batch: Any, measure: bool) -> Metrics:
            if trainer.step == _BAD_STEP - 1:
                trainers.append(trainer)
                before.update(state_of(trainer))
                if rank() == on_rank:
                    batch = (inject(poison, trainer, batch[0]), *batch[1:])
            return train_step(trainer, *batch, measure=measure)

        return step_with_poison

    command.wrap_step(with_poison)
    code = command(argv)
    after = state_of(trainers[0])
    untouched = all(torch.equal(after[name], value) for name, value in before.items())
    report.write_text(json.dumps({"untouched": untouched, "finite": all(map(is_finite, after.values()))}))
    return code


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of the networks of a trainer, and its centres."""
    networks = {who: getattr(trainer, who).state_dict() for who in networks_of(trainer)}
    named = {f"{who}/{name}": value.clone() for who, state in networks.items() for name, value in state.items()}
    named |= {f"center/{name}": value.clone() for name, value in getattr(trainer, "centers", {}).items()}
    # The running statistics of BatchNorm are for evaluation and change with every forward.
    return {name: value for name, value in named.items() if "running_" not in name and "num_batches" not in name}


def networks_of(trainer: Any) -> tuple[str, ...]:
    """Return the attributes of a trainer that are networks; the first one is trained."""
    return ("detector",) if isinstance(trainer, FINETUNE.trainer) else ("student", "teacher")


def is_finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def inject(poison: str, trainer: Any, batch: Views | LfovBatch) -> Views | LfovBatch:
    """Return the batch of the step, in which one image is poisoned, unless the gradients are."""
    if not poison.endswith("image"):
        parameter = next(p for p in getattr(trainer, networks_of(trainer)[0]).parameters() if p.requires_grad)
        parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
        return batch
    images = batch.images.float() if isinstance(batch, LfovBatch) else normalised(batch.global_images).clone()
    images[0] = float(poison.split()[0])
    return batch._replace(images=images) if isinstance(batch, LfovBatch) else replace(batch, global_images=images)


def non_finite(scale: Scale) -> Outcome:
    """Try each poison on a run on one rank, and nan on one of two ranks."""
    tally, workplace = Tally(), toy.prepare(scale.folder)
    for command, poison in toy.in_turn(_POISONS)[: scale.of(6, 3)]:
        poison_one_rank(tally, scale, workplace, command, poison)
    for command in (PRETRAIN, FINETUNE)[: scale.of(2, 1)]:
        _poison_one_of_two_ranks(tally, scale, workplace, command)
    return tally.outcome()


def poison_one_rank(tally: Tally, scale: Scale, workplace: Path, command: Command, poison: str) -> None:
    out, report = scale.folder / f"{command.name} {poison}", scale.folder / "report.json"
    argv = command.arguments(workplace, out)
    with Child(poisoned, command, argv, poison, 0, report, log=toy.log_of(out)) as child:
        code = child.wait()
    what = f"{command.name}, {poison}: exit code {code}, {child.output()[-300:]}"
    tally.add(_stopped_cleanly(command, out, code, [report], items=2), what)


def _poison_one_of_two_ranks(tally: Tally, scale: Scale, workplace: Path, command: Command) -> None:
    out = scale.folder / f"{command.name}-two_ranks"
    argv = command.arguments(workplace, out, "optim.batch_size=4")
    reports = [scale.folder / f"report-{number}.json" for number in (0, 1)]
    ranks = two_ranks(out, poisoned, *((command, argv, _POISONS[0], 1, report) for report in reports))
    codes = codes_of(ranks)
    survived = codes[0] == codes[1] and _stopped_cleanly(command, out, codes[0], reports, items=4)
    what = f"{command.name}, nan on one of two ranks: exit codes {codes}, {ranks[0].output()[-300:]}"
    tally.add(survived, what)


def _stopped_cleanly(command: Command, out: Path, code: int, reports: Sequence[Path], items: int) -> bool:
    if code != exit_codes.NON_FINITE:
        return False
    written = json.loads((out / f"non_finite_step_{_BAD_STEP}.json").read_text())
    found, problems = checkpoint.latest(out)
    if found != checkpoint.folder_of(out, _BAD_STEP - 1) or problems:
        return False
    finite = all(is_finite(t) for stem in command.stems for t in checkpoint.read_tensors(found, stem).values())
    memory = [json.loads(report.read_text()) for report in reports]
    named = len(written["roi_ids"]) == items and any(word in written["error"] for word in ("loss", "gradient norm"))
    return finite and named and memory == [{"untouched": True, "finite": True}] * len(reports)


def two_ranks(out: Path, function: Callable[..., int], first: tuple[Any, ...], second: tuple[Any, ...]) -> list[Child]:
    """Start two processes, each with its own arguments, that find each other as ranks of torchrun do."""
    port = free_port()
    return [
        Child(
            function,
            *arguments,
            log=out.with_name(f"{out.name}-{number}.log"),
            env=rank_environment(number, 2, port),
        )
        for number, arguments in enumerate((first, second))
    ]


def codes_of(ranks: Sequence[Child]) -> list[int]:
    """Wait for all ranks and return their exit codes; if one does not end, kill all of them."""
    try:
        return [child.wait() for child in ranks]
    finally:
        for child in ranks:
            child.kill()


# ---------------------------------------------------------------------------------------------------------------- T5


def _while_starting(out: Path, child: Child) -> None:
    wait_until(lambda: "muse_fast" in child.output() or child.poll() is not None, 60)


def _in_warm_up(out: Path, child: Child) -> None:
    toy.wait_for_step(out, 1, child)


def _in_an_evaluation(out: Path, child: Child) -> None:
    toy.wait_for_step(out, 6, child)  # of training; the evaluation of this step follows


def _while_saving(out: Path, child: Child) -> None:
    wait_until(lambda: any((out / "checkpoints").glob(".tmp-*")) or child.poll() is not None, 60)


def _at_a_step(out: Path, child: Child) -> None:
    toy.wait_for_step(out, 3, child)


# Name: wait until the moment is reached, number of signals.
_MOMENTS: dict[str, tuple[Callable[[Path, Child], None], int]] = {
    "while starting": (_while_starting, 1),
    "in warm-up": (_in_warm_up, 1),
    "twice": (_at_a_step, 2),
    "in an evaluation": (_in_an_evaluation, 1),
    "while saving": (_while_saving, 1),
}


def sigterm(scale: Scale) -> Outcome:
    """Send SIGTERM at five moments of a run on one rank, to torchrun's launcher, and to one of two ranks."""
    tally, workplace = Tally(), toy.prepare(scale.folder)
    for command in (PRETRAIN, FINETUNE):
        unbroken = scale.folder / f"{command.name}-unbroken"
        assert command.finish(workplace, unbroken) == 0
        for name, (reached, signals) in _MOMENTS.items():
            out = scale.folder / f"{command.name} {name}"
            settings = () if reached is _while_saving else command.saves_rarely
            with command.start(workplace, out, *settings) as child:
                reached(out, child)
                for _ in range(signals):
                    child.signal(signal.SIGTERM)
                    time.sleep(0.05)
                code = child.wait()
            problem = _not_resumable(command, workplace, out, code, unbroken)
            tally.add(not problem, f"{command.name} {name}: {problem}")
    if not scale.quick:
        ran = tests("tests/test_torchrun.py", "-k", "sigterm and (launcher or (rank and 1))")
        for number in range(4):
            tally.add(ran.injected >= 4 and ran.survived == ran.injected, f"torchrun {number}: {ran.notes}")
    return tally.outcome()


def _not_resumable(command: Command, workplace: Path, out: Path, code: int, unbroken: Path) -> str:
    """Return what is wrong with a stopped run; empty if it saved its last step and resumes exactly."""
    if code != exit_codes.STOPPED:
        return f"ended with {name_of(code)}: {toy.log_of(out).read_text()[-300:]}"
    written = json.loads((out / "exit.json").read_text())
    found, problems = checkpoint.latest(out)
    at = toy.last_step(out)
    if (written["code"], written["step"]) != (code, at) or found != checkpoint.folder_of(out, at) or problems:
        return f"exit.json {written}, checkpoint {found}, last row {at}, {problems}"
    if command.finish(workplace, out) != 0 or toy.losses(out) != toy.losses(unbroken):
        return "after resuming, the losses differ"
    return "" if command.weights_hash(out) == command.weights_hash(unbroken) else "after resuming, the weights differ"


# ---------------------------------------------------------------------------------------------------------------- T6


def lost_workers(scale: Scale) -> Outcome:
    """Kill, crash or stop a loader process: the run ends, names process and ROIs, and leaves no process behind."""
    tally, workplace = Tally(), toy.prepare(scale.folder)
    took = []
    kinds = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)
    for number, (command, kind) in enumerate((toy.in_turn(kinds) * 3)[: scale.of(18, 3)]):
        out = scale.folder / f"{kind.name}-{number}"
        with command.start(workplace, out, "data.workers=2", "data.timeout=6", command.lasting(1000)) as child:
            toy.wait_for_step(out, scale.rng.randint(1, 4), child)
            workers = children_of(child.pid)
            os.kill(scale.rng.choice(workers), kind)
            began = time.monotonic()
            code = child.wait(scale.limit(60))
            took.append(time.monotonic() - began)
            said = child.output()
        reported = code == 2 and "loader process" in said and command.items in said and "Traceback" not in said
        left = [pid for pid in workers if is_alive(pid)]
        tally.add(
            reported and not left and took[-1] < scale.limit(30),
            f"{kind.name}, {command.name}: exit code {code}, still alive {left}, said {said[-600:]!r}",
        )
    return tally.outcome(f"ended within {max(took):.1f} s")


# ---------------------------------------------------------------------------------------------------------------- T7


def starved(command: Command, argv: Sequence[str]) -> int:
    """Run a command that in its third step has no memory left and cannot get more."""
    ballast: list[torch.Tensor] = []

    def in_little_memory(train_step: Step) -> Step:
        def step_in_little_memory(trainer: Any, *batch: Any, measure: bool) -> Metrics:
            if trainer.step == 2:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + (64 << 20)
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                for size in (16 << 20, 1 << 20, 256 << 10):
                    with suppress(RuntimeError):
                        while True:
                            ballast.append(torch.empty(size, dtype=torch.uint8))
            return train_step(trainer, *batch, measure=measure)

        return step_in_little_memory

    command.wrap_step(in_little_memory)
    return command(argv)


def out_of_memory(scale: Scale) -> Outcome:
    """Run out of memory in step 3: pretraining with settings on which the advice depends, and fine-tuning."""
    tally, workplace = Tally(), toy.prepare(scale.folder)
    large = ("views.global_size=128", "views.num_locals=8", "views.global_mpp_max=0.3", "optim.batch_size=8")
    kinds = {
        "": ("8 ROIs", "model.recompute=selective", "optim.accumulate=2", "optim.batch_size=4"),
        "model.recompute=selective": ("8 ROIs", "model.recompute=full", "optim.accumulate=2", "optim.batch_size=4"),
        "optim.accumulate=2": ("4 ROIs", "model.recompute=selective", "optim.accumulate=4", "optim.batch_size=4"),
    }
    for number, (setting, advice) in enumerate([*kinds.items()][: scale.of(3, 1)]):
        settings = ("train.checkpoint_every=1", *large, *filter(None, [setting]))
        tally.add(*_explained(scale, workplace, PRETRAIN, number, settings, ("2 x 128 px", "8 x 32 px", *advice)))
    remedies = ("model.recompute=selective", "optim.accumulate=2", "optim.batch_size=2")
    settings = ("data.sample_size=256", "optim.batch_size=4")
    tally.add(*_explained(scale, workplace, FINETUNE, 0, settings, ("4 images of 256 px", "1024 proposals", *remedies)))
    return tally.outcome()


def _explained(
    scale: Scale, workplace: Path, command: Command, number: int, settings: Sequence[str], words: Sequence[str]
) -> tuple[bool, str]:
    """Return whether a starved run printed ``words``, step and peak and kept its checkpoint, and what it did."""
    out = scale.folder / f"starved-{command.name}-{number}"
    with Child(starved, command, command.arguments(workplace, out, *settings), log=toy.log_of(out)) as child:
        code, said = child.wait(), child.output()
    missing = [word for word in ("step 3", "MiB", *words) if word not in said]
    kept = checkpoint.latest(out) == (checkpoint.folder_of(out, 2), [])
    explained = code == 2 and not missing and "Traceback" not in said
    return explained and kept, f"{out.name}: exit code {code}, kept {kept}, missing {missing}, {said[-600:]!r}"


ROWS = [
    Row(
        "C2",
        "a killed run continues exactly",
        "10 of 10 of each command without and with loader processes: losses and all weights bit-identical",
        exact_resume,
    ),
    Row(
        "T1",
        "a non-finite value stops the run before anything changes",
        "4 of 4 of each command: weights, teacher and checkpoint are untouched; term, step and items are named",
        non_finite,
    ),
    Row(
        "T5",
        "SIGTERM saves a checkpoint and exits with code 75",
        "7 of 7 of each command: checkpoint of the last step, exit.json, exact continuation",
        sigterm,
    ),
    Row(
        "T6",
        "a loader process that dies or stalls is reported",
        "killed, crashed, stopped, 3 times each in each command: process and ROIs or images named, none left",
        lost_workers,
    ),
    Row(
        "T7",
        "running out of memory is explained",
        "step, shapes, peak and three settings to lower; the last checkpoint is untouched",
        out_of_memory,
    ),
]
