"""C1, C3, C4: kills while saving, damaged files and full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from muse_fast.errors import UserError
from muse_fast.runtime import checkpoint
from muse_fast.training.report import Metrics
from torture import toy
from torture.harness import Outcome, Row, Scale, Tally
from torture.processes import Child

STEMS = ("student", "teacher")
_TMPFS_BYTES = 12 << 20


def filled(step: int, size: int, tensors: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    """Return tensors filled with the number of their step, so that mixed steps are noticed."""
    return {stem: {str(i): torch.full((size,), float(step)) for i in range(tensors)} for stem in STEMS}


def save(run: Path, step: int, size: int = 50) -> Path:
    return checkpoint.save(run, step, filled(step, size), {"step": step}, keep_every=0)


def is_whole(folder: Path, step: int) -> bool:
    """Whether a checkpoint contains the values of ``step`` and no others."""
    values = {v for stem in STEMS for t in checkpoint.read_tensors(folder, stem).values() for v in t.unique().tolist()}
    return checkpoint.read_state(folder)["step"] == step and values == {float(step)}


# ---------------------------------------------------------------------------------------------------------------- C1


def kills(scale: Scale) -> Outcome:
    """Send SIGKILL at random moments of an endless loop of saves. Forking saves the import of torch per kill."""
    tally, run = Tally(), scale.folder / "run"
    for _ in range(scale.of(1000, 40)):
        acknowledged = _kill_a_writer(run, scale.rng.uniform(0, 0.03))
        checkpoint.remove_temporary(run)  # as every start does
        left = [path.name for path in (run / "checkpoints").glob(".tmp-*")]
        found, _ = checkpoint.latest(run)
        step = checkpoint.read_state(found)["step"] if found else -1
        lost = step < acknowledged
        whole = found is not None and is_whole(found, step)
        tally.add(not lost and whole and not left, f"step {acknowledged} acknowledged, {step} found, left over {left}")
    return tally.outcome(f"{checkpoint.steps(run)[-1]} steps saved in between")


def _kill_a_writer(run: Path, after: float) -> int:
    """Kill a child that saves, ``after`` seconds after its first save; return the last step whose save returned."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        step = (checkpoint.steps(run) or [0])[-1]
        while True:
            step += 1
            save(run, step, size=20_000)
            os.write(write, step.to_bytes(4, "big"))
    os.close(write)
    acknowledged = os.read(read, 4)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(read, 4):
        acknowledged = more
    os.close(read)
    return int.from_bytes(acknowledged, "big")


# ---------------------------------------------------------------------------------------------------------------- C3


def flips_and_cuts(scale: Scale) -> Outcome:
    """Flip one bit or cut off the end, at random places, in each file of the newest checkpoint in turn."""
    good, bad = save(scale.folder, 1), save(scale.folder, 2)
    files, tally = sorted(bad.iterdir()), Tally()
    for number in range(scale.of(300, 60)):
        path = files[number % len(files)]
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[scale.rng.randrange(len(whole))] ^= 1 << scale.rng.randrange(8)
        for what, content in (("flip", bytes(flipped)), ("cut", whole[: scale.rng.randrange(len(whole))])):
            path.write_bytes(content)
            found, problems = checkpoint.latest(scale.folder)
            named = len(problems) == 1 and str(bad) in problems[0]
            tally.add(found == good and named, f"{what} in {path.name}: {problems}")
        path.write_bytes(whole)
    tally.add(checkpoint.latest(scale.folder) == (bad, []), "the repaired checkpoint is refused")
    return tally.outcome(f"over {len(files)} files")


# ---------------------------------------------------------------------------------------------------------------- C4


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a tmpfs of 12 MiB.

    Raises:
        PermissionError: only root can mount one.
    """
    place = folder / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_BYTES}", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        raise PermissionError(mounted.stderr.strip())
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def full_disk(scale: Scale) -> Outcome:
    """Save to a disk without room for the checkpoint, then run the real command on a disk that fills up."""
    tally = Tally()
    try:
        with small_disk(scale.folder) as disk:
            for size in (500_000, 900_000, 5_000_000):  # 16, 29 and 160 MB, next to 4 MB
                _refused(tally, disk / f"run-{size}", size)
    except PermissionError as error:
        return _limited_file_size(scale, f"no tmpfs ({error}): RLIMIT_FSIZE")
    _command_on_a_full_disk(tally, scale)
    return tally.outcome("tmpfs of 12 MiB, and the command on one")


def _refused(tally: Tally, run: Path, size: int) -> None:
    good = save(run, 1, size=100_000)
    try:
        save(run, 2, size=size)
        said = "nothing"
    except UserError as error:
        said = str(error)
    kept = checkpoint.latest(run) == (good, []) and is_whole(good, 1)
    reported = "step-00000002" in said and "no room" in said and said.count("MiB") == 2
    nothing_left = [path.name for path in (run / "checkpoints").iterdir()] == [good.name]
    tally.add(kept and reported and nothing_left, f"{size}: said {said!r}")
    if run.parent.is_mount():
        subprocess.run(["rm", "-r", str(run)], check=True)


def _limited_file_size(scale: Scale, notes: str) -> Outcome:
    """Save in a child with a limit on the size of files, where no small disk can be mounted."""
    import resource

    tally = Tally()
    good = save(scale.folder, 1, size=1000)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            save(scale.folder, 2, size=1_000_000)
        except UserError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    said = os.read(read, 4096).decode()
    os.close(read)
    os.waitpid(pid, 0)
    kept = checkpoint.latest(scale.folder) == (good, []) and is_whole(good, 1)
    tally.add(kept and "step-00000002" in said and "MiB" in said, f"said {said!r}")
    return tally.outcome(notes)


def _command_on_a_full_disk(tally: Tally, scale: Scale) -> None:
    """Fill the disk with other files during a run; once there is room again, the run resumes exactly."""
    workplace = toy.prepare(scale.folder)
    assert toy.PRETRAIN.finish(workplace, scale.folder / "unbroken") == 0
    place = scale.folder / "larger"
    place.mkdir()
    size = 600 << 20  # a checkpoint takes 120; a run keeps two and writes a third
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        out = place / "run"
        arguments = toy.PRETRAIN.arguments(workplace, out)
        with Child(filling, toy.PRETRAIN, arguments, place / "others", log=toy.log_of(out)) as child:
            code, said = child.wait(), child.output()
        newest, problems = checkpoint.latest(out)
        left = toy.orphans(out)
        tally.add(not left, f"left over {left}")
        reported = code == 2 and "error:" in said and "room" in said and "Traceback" not in said
        tally.add(reported and newest is not None and not problems, f"command: exit code {code}, {said[-400:]!r}")
        with toy.PRETRAIN.start(workplace, out, "train.checkpoint_every=1000", "optim.steps=12") as child:
            code, said = child.wait(), child.output()
        reported = code == 2 and "make room" in said and "Traceback" not in said
        tally.add(reported, f"no room for a row: exit code {code}, {said[-900:]!r}")
        (place / "others").unlink()
        code = toy.PRETRAIN.finish(workplace, out)
        tally.add(code == 0 and toy.losses(out) == toy.losses(scale.folder / "unbroken"), f"resumed: exit code {code}")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def filling(command: toy.Command, argv: Sequence[str], path: Path) -> int:
    """Run the command, whose disk is full from the middle of the run on."""

    def with_a_full_disk(train_step: toy.Step) -> toy.Step:
        def step_on_a_full_disk(trainer: Any, *batch: Any, measure: bool) -> Metrics:
            if trainer.step == toy.STEPS // 2 - 1:
                fill(path)
            return train_step(trainer, *batch, measure=measure)

        return step_on_a_full_disk

    command.wrap_step(with_a_full_disk)
    return command(argv)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        for block in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(block)) == block:
                    pass
            except OSError:
                continue


ROWS = [
    Row(
        "C1",
        "kill -9 at any moment loses no acknowledged checkpoint",
        "1000 kills: no checkpoint lost or mixed, no temporary folder after the next start",
        kills,
    ),
    Row(
        "C3",
        "a damaged checkpoint is named and refused, and the previous one is used",
        "300 flipped bits and 300 cuts over every file",
        flips_and_cuts,
    ),
    Row(
        "C4",
        "on a full disk, the old checkpoint is kept and the error says why",
        "path, bytes needed and free; the run resumes once there is room",
        full_disk,
    ),
]
