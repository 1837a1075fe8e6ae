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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from muse_fast.batch import Views
from muse_fast.detection.finetuner import Finetuner
from muse_fast.images.imagenet import normalised
from muse_fast.pretraining.trainer import Trainer
from muse_fast.runtime import checkpoint, exit_codes
from muse_fast.runtime.distributed import rank
from muse_fast.training.report import Metrics
from torture import toy
from torture.harness import Outcome, Row, Scale, Tally
from torture.processes import Child, children_of, free_port, is_alive, name_of, rank_environment, wait_until
from torture.suite import tests

# ---------------------------------------------------------------------------------------------------------------- C2


def exact_resume(scale: Scale) -> Outcome:
    """Kill runs at random moments and restart them, with and without loader processes: the result is bit-identical."""
    tally, workplace = Tally(), toy.prepare(scale.folder)
    unbroken = scale.folder / "unbroken"
    assert toy.finish(workplace, unbroken) == 0
    kills = scale.of(20, 1)
    for number, workers in enumerate(["data.workers=0", "data.workers=2"] * kills):
        out = scale.folder / f"killed-{number}"
        step = scale.rng.randint(2, toy.STEPS - 1)
        with toy.start(workplace, out, workers) as child:
            toy.wait_for_step(out, step, child)
            time.sleep(scale.rng.uniform(0, 0.3))
            child.kill()
        code = toy.finish(workplace, out, workers)
        same = code == 0 and toy.losses(out) == toy.losses(unbroken)
        same = same and toy.weights_hash(out) == toy.weights_hash(unbroken) and not toy.orphans(out)
        tally.add(same, f"killed at step {step}, {workers}: exit code {code}, left over {toy.orphans(out)}")
        shutil.rmtree(out)
    return tally.outcome(f"{kills} without loader processes, {kills} with two")


# ---------------------------------------------------------------------------------------------------------------- T1

_BAD_STEP = 5  # counted from 1; the checkpoint of step 4 is the last good one
_POISONS = ("nan in an image", "inf in an image", "nan only in the gradients")


def poisoned(argv: Sequence[str], poison: str, on_rank: int, report: Path) -> int:
    """Run the command with a non-finite value in step 5 on one rank, then report the state it left in memory."""
    train_step = Trainer.train_step
    trainers: list[Trainer] = []
    before: dict[str, torch.Tensor] = {}

    def step_with_poison(trainer: Trainer, *views: Views, measure: bool) -> Metrics:
        if trainer.step == _BAD_STEP - 1:
            trainers.append(trainer)
            before.update(state_of(trainer))
            if rank() == on_rank:
                views = (inject(poison, trainer, views[0]), *views[1:])
        return train_step(trainer, *views, measure=measure)

    Trainer.train_step = step_with_poison  # type: ignore[method-assign, assignment]
    code = toy.command(argv)
    after = state_of(trainers[0])
    untouched = all(torch.equal(after[name], value) for name, value in before.items())
    report.write_text(json.dumps({"untouched": untouched, "finite": all(map(is_finite, after.values()))}))
    return code


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return weights, teacher and centres."""
    networks = {"student": trainer.student.state_dict(), "teacher": trainer.teacher.state_dict()}
    named = {f"{who}/{name}": value.clone() for who, state in networks.items() for name, value in state.items()}
    named |= {f"center/{name}": value.clone() for name, value in trainer.centers.items()}
    # The running statistics of BatchNorm are for evaluation and change with every forward.
    return {name: value for name, value in named.items() if "running_" not in name and "num_batches" not in name}


def is_finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def inject(poison: str, trainer: Trainer, views: Views) -> Views:
    """Return the views of the step, of which one is poisoned, unless the gradients are."""
    if poison.endswith("image"):
        images = normalised(views.global_images).clone()
        images[0] = float(poison.split()[0])
        return replace(views, global_images=images)
    parameter = next(p for p in trainer.student.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
    return views


def non_finite(scale: Scale) -> Outcome:
    """Try each poison on a run on one rank, and nan on one of two ranks."""
    tally, workplace = Tally(), toy.prepare(scale.folder)
    poison_one_rank(tally, scale, workplace, _POISONS)
    _poison_one_of_two_ranks(tally, scale, workplace)
    return tally.outcome()


def poison_one_rank(tally: Tally, scale: Scale, workplace: Path, poisons: Sequence[str]) -> None:
    for poison in poisons:
        out, report = scale.folder / poison.replace(" ", "_"), scale.folder / "report.json"
        argv = toy.arguments(workplace, out)
        with Child(poisoned, argv, poison, 0, report, log=toy.log_of(out)) as child:
            code = child.wait()
        what = f"{poison}: exit code {code}, {child.output()[-300:]}"
        tally.add(_stopped_cleanly(out, code, [report], rois=2), what)


def _poison_one_of_two_ranks(tally: Tally, scale: Scale, workplace: Path) -> None:
    out = scale.folder / "two_ranks"
    argv = toy.arguments(workplace, out, "optim.batch_size=4")
    reports = [scale.folder / f"report-{number}.json" for number in (0, 1)]
    ranks = two_ranks(out, poisoned, *((argv, _POISONS[0], 1, report) for report in reports))
    codes = codes_of(ranks)
    survived = codes[0] == codes[1] and _stopped_cleanly(out, codes[0], reports, rois=4)
    tally.add(survived, f"nan on one of two ranks: exit codes {codes}, {ranks[0].output()[-300:]}")


def _stopped_cleanly(out: Path, code: int, reports: Sequence[Path], rois: int) -> bool:
    if code != exit_codes.NON_FINITE:
        return False
    written = json.loads((out / f"non_finite_step_{_BAD_STEP}.json").read_text())
    found, problems = checkpoint.latest(out)
    kept = found == checkpoint.folder_of(out, _BAD_STEP - 1) and not problems
    finite = found is not None and all(map(is_finite, checkpoint.read_tensors(found, "teacher").values()))
    memory = [json.loads(report.read_text()) for report in reports]
    named = len(written["roi_ids"]) == rois and any(word in written["error"] for word in ("loss", "gradient norm"))
    return kept and finite and named and memory == [{"untouched": True, "finite": True}] * len(reports)


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


# Name: wait until the moment is reached, number of signals, settings.
_MOMENTS: dict[str, tuple[Callable[[Path, Child], None], int, tuple[str, ...]]] = {
    "while starting": (_while_starting, 1, ()),
    "in warm-up": (_in_warm_up, 1, ()),
    "twice": (_at_a_step, 2, ()),
    "in an evaluation": (_in_an_evaluation, 1, ()),
    "while saving": (_while_saving, 1, ("train.checkpoint_every=2",)),
}


def sigterm(scale: Scale) -> Outcome:
    """Send SIGTERM at five moments of a run on one rank, to torchrun's launcher, and to one of two ranks."""
    tally, workplace = Tally(), toy.prepare(scale.folder)
    unbroken = scale.folder / "unbroken"
    assert toy.finish(workplace, unbroken) == 0
    for name, (reached, signals, settings) in _MOMENTS.items():
        out = scale.folder / name.replace(" ", "_")
        with toy.start(workplace, out, *(settings or ("train.checkpoint_every=1000",))) as child:
            reached(out, child)
            for _ in range(signals):
                child.signal(signal.SIGTERM)
                time.sleep(0.05)
            code = child.wait()
        problem = _not_resumable(workplace, out, code, unbroken)
        tally.add(not problem, f"{name}: {problem}")
    if not scale.quick:
        ran = tests("tests/test_torchrun.py", "-k", "sigterm and (launcher or (rank and 1))")
        for number in range(2):
            tally.add(ran.injected >= 2 and ran.survived == ran.injected, f"torchrun {number}: {ran.notes}")
    return tally.outcome()


def _not_resumable(workplace: Path, out: Path, code: int, unbroken: Path) -> str:
    """Return what is wrong with a stopped run; empty if it saved its last step and resumes exactly."""
    if code != exit_codes.STOPPED:
        return f"ended with {name_of(code)}: {toy.log_of(out).read_text()[-300:]}"
    written = json.loads((out / "exit.json").read_text())
    found, problems = checkpoint.latest(out)
    at = toy.last_step(out)
    if (written["code"], written["step"]) != (code, at) or found != checkpoint.folder_of(out, at) or problems:
        return f"exit.json {written}, checkpoint {found}, last row {at}, {problems}"
    if toy.finish(workplace, out) != 0 or toy.losses(out) != toy.losses(unbroken):
        return "after resuming, the losses differ"
    return "" if toy.weights_hash(out) == toy.weights_hash(unbroken) else "after resuming, the weights differ"


# ---------------------------------------------------------------------------------------------------------------- T6


def lost_workers(scale: Scale) -> Outcome:
    """Kill, crash or stop a loader process: the run ends, names process and ROIs, and leaves no process behind."""
    tally, workplace = Tally(), toy.prepare(scale.folder)
    took = []
    endless = ("data.workers=2", "data.timeout=6")
    pretraining = partial(toy.arguments, workplace), toy.command, (*endless, "optim.steps=1000"), "ROIs ["
    finetuning = partial(toy.finetuning_arguments, workplace), toy.finetuning_command, endless, "images synthetic"
    kinds = [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP]
    cases = [(pretraining, kind) for kind in kinds * scale.of(4, 1)] + [(finetuning, kind) for kind in kinds]
    for number, ((arguments, command, settings, items), kind) in enumerate(cases[: scale.of(15, 3)]):
        out = scale.folder / f"{kind.name}-{number}"
        with Child(command, arguments(out, *settings), log=toy.log_of(out)) as child:
            toy.wait_for_step(out, scale.rng.randint(1, 4), child)
            workers = children_of(child.pid)
            os.kill(scale.rng.choice(workers), kind)
            began = time.monotonic()
            code = child.wait(scale.limit(60))
            took.append(time.monotonic() - began)
            said = child.output()
        reported = code == 2 and "loader process" in said and items in said and "Traceback" not in said
        left = [pid for pid in workers if is_alive(pid)]
        tally.add(
            reported and not left and took[-1] < scale.limit(30),
            f"{kind.name}, {items}: exit code {code}, still alive {left}, said {said[-600:]!r}",
        )
    return tally.outcome(f"ended within {max(took):.1f} s")


# ---------------------------------------------------------------------------------------------------------------- T7


def starved(command: Callable[[Sequence[str]], int], kind: type[Trainer] | type[Finetuner], argv: Sequence[str]) -> int:
    """Run a command that in its third step has no memory left and cannot get more."""
    train_step: Callable[..., Metrics] = kind.train_step
    ballast: list[torch.Tensor] = []

    def step_in_little_memory(trainer: Trainer | Finetuner, *batch: Any, measure: bool) -> Metrics:
        if trainer.step == 2:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (64 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            for size in (16 << 20, 1 << 20, 256 << 10):
                with suppress(RuntimeError):
                    while True:
                        ballast.append(torch.empty(size, dtype=torch.uint8))
        return train_step(trainer, *batch, measure=measure)

    kind.train_step = step_in_little_memory  # type: ignore[method-assign, assignment]
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
        out = scale.folder / f"starved-{number}"
        argv = toy.arguments(workplace, out, "train.checkpoint_every=1", *large, *filter(None, [setting]))
        with Child(starved, toy.command, Trainer, argv, log=toy.log_of(out)) as child:
            tally.add(*_explained(out, child, ("2 x 128 px", "8 x 32 px", *advice)))
    out = scale.folder / "finetuning"
    argv = toy.finetuning_arguments(workplace, out, "data.sample_size=256")
    with Child(starved, toy.finetuning_command, Finetuner, argv, log=toy.log_of(out)) as child:
        remedies = ("model.recompute=selective", "optim.accumulate=2", "optim.batch_size=2")
        tally.add(*_explained(out, child, ("4 images of 256 px", "1024 proposals", *remedies)))
    return tally.outcome()


def _explained(out: Path, child: Child, words: Sequence[str]) -> tuple[bool, str]:
    """Return whether a starved run printed ``words``, step and peak and kept its checkpoint, and what it did."""
    code, said = child.wait(), child.output()
    missing = [word for word in ("step 3", "MiB", *words) if word not in said]
    kept = checkpoint.latest(out) == (checkpoint.folder_of(out, 2), [])
    explained = code == 2 and not missing and "Traceback" not in said
    return explained and kept, f"{out.name}: exit code {code}, kept {kept}, missing {missing}, {said[-600:]!r}"


ROWS = [
    Row(
        "C2",
        "a killed run continues exactly",
        "20 of 20 without and with loader processes: losses and all weights bit-identical",
        exact_resume,
    ),
    Row(
        "T1",
        "a non-finite value stops the run before anything changes",
        "4 of 4: weights, teacher and checkpoint are untouched; term, step and ROIs are named",
        non_finite,
    ),
    Row(
        "T5",
        "SIGTERM saves a checkpoint and exits with code 75",
        "7 of 7: checkpoint of the last step, exit.json, exact continuation",
        sigterm,
    ),
    Row(
        "T6",
        "a loader process that dies or stalls is reported",
        "killed, crashed, stopped, 5 times each, once in fine-tuning: process and ROIs or images named, none left",
        lost_workers,
    ),
    Row(
        "T7",
        "running out of memory is explained",
        "step, shapes, peak and three settings to lower; the last checkpoint is untouched",
        out_of_memory,
    ),
]
