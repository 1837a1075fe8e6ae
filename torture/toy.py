"""Runs of the training commands that take seconds: a small ROI set, a small network, and fine-tuning."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from muse_fast import finetune, pretrain
from muse_fast.detection.finetuner import Finetuner
from muse_fast.images.synthetic import synthetic_image
from muse_fast.pretraining.trainer import Trainer
from muse_fast.roiset.roiset import RoiSetWriter
from muse_fast.runtime import checkpoint
from muse_fast.runtime.cli import run as run_command
from muse_fast.training.report import Metrics, read_metrics
from torture.processes import Child, wait_until

STEPS = 12
# A thin network, whose checkpoints are small: the runs are about commands, not about what a network computes.
ARCH = "timm:vit_tiny_patch16_224:depth=4:embed_dim=32:num_heads=2"
PRETRAINING = f"""
views: {{global_size: 64, local_size: 32, num_locals: 1}}
model: {{arch: "{ARCH}", drop_path: 0.1}}
head: {{hidden_dim: 32, bottleneck_dim: 16, prototypes: 16, input_norm: true}}
loss: {{centering: sinkhorn}}
optim: {{steps: {STEPS}, batch_size: 2, warmup_steps: 2, freeze_prototypes_steps: 1, ema_start: 0.9}}
train: {{precision: fp32, log_every: 1, checkpoint_every: 2, eval_every: 6, eval_rois: 4}}
"""
# An epoch of its four images has two steps.
FINETUNING = f"""
data: {{sample_size: 64}}
detector: {{hidden_dim: 16}}
optim: {{epochs: {STEPS // 2}, batch_size: 2}}
train: {{precision: fp32, log_every: 1, eval_every: 3}}
"""

_Kind = TypeVar("_Kind")
Step = Callable[..., Metrics]  # of a trainer, micro-batches, and whether to measure


@dataclass(frozen=True)
class Command:
    """A command that trains, and its toy run: `STEPS` steps, a checkpoint every second one, an evaluation of step 6.

    Attributes:
        main: takes the arguments of the command.
        trainer: class with the ``train_step`` of the command.
        fixed: arguments of every run, with ``{0}`` for the folder of `prepare`.
        stems: files of a checkpoint.
        length: setting of a run's length, and the steps of one unit of it.
        items: beginning of the names of what a loader reads, in messages.
        saves_rarely: settings with which the run writes as few checkpoints as it can.
    """

    name: str
    main: Callable[[Sequence[str] | None], int]
    trainer: type[Any]
    fixed: tuple[str, ...]
    stems: tuple[str, ...]
    length: tuple[str, int]
    items: str
    saves_rarely: tuple[str, ...]

    def arguments(self, workplace: Path, out: Path, *overrides: str) -> list[str]:
        """Return the arguments of a toy run."""
        return ["--out", str(out), *self.settings(workplace, *overrides)]

    def settings(self, workplace: Path, *overrides: str) -> list[str]:
        """Return these arguments without ``--out``."""
        fixed = [argument.format(workplace) for argument in self.fixed]
        return [*fixed, "data.workers=0", "train.device=cpu", *overrides]

    def lasting(self, steps: int) -> str:
        """Return the setting for a run of ``steps`` steps, an even number."""
        key, steps_of_one = self.length
        return f"{key}={steps // steps_of_one}"

    def __call__(self, argv: Sequence[str]) -> int:
        """Do what ``python -m muse_fast.COMMAND`` does; return the exit code."""
        return run_command(self.main, argv)

    def wrap_step(self, wrapped: Callable[[Step], Step]) -> None:
        """Let all runs of this process take the step that ``wrapped`` makes of the real one."""
        self.trainer.train_step = wrapped(self.trainer.train_step)

    def start(self, workplace: Path, out: Path, *overrides: str) -> Child:
        return Child(self, self.arguments(workplace, out, *overrides), log=log_of(out))

    def finish(self, workplace: Path, out: Path, *overrides: str) -> int:
        """Start a run and wait for its end; return the exit code."""
        with self.start(workplace, out, *overrides) as child:
            return child.wait()

    def weights_hash(self, out: Path, step: int = STEPS) -> str:
        """Hash all tensors of a checkpoint: weights, moments, and teacher and centres if there are any."""
        digest = hashlib.sha256()
        for stem in self.stems:
            for name, tensor in sorted(checkpoint.read_tensors(checkpoint.folder_of(out, step), stem).items()):
                digest.update(f"{stem}/{name}".encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


PRETRAIN = Command(
    name="pretrain",
    main=pretrain.main,
    trainer=Trainer,
    fixed=("--config", "{0}/toy.yaml", "data.roiset={0}/rois"),
    stems=("student", "teacher", "optimizer", "state"),
    length=("optim.steps", 1),
    items="ROIs [",
    saves_rarely=("train.checkpoint_every=1000",),
)
FINETUNE = Command(
    name="finetune",
    main=finetune.main,
    trainer=Finetuner,
    fixed=(
        "--config",
        "{0}/finetuning.yaml",
        "--data",
        "synthetic:5",
        "source.size=96",
        "--weights",
        f"random:{ARCH}",
    ),
    stems=("detector", "optimizer"),
    length=("optim.epochs", 2),
    items="images synthetic",
    saves_rarely=(),
)
COMMANDS = {command.name: command for command in (PRETRAIN, FINETUNE)}


def in_turn(kinds: Sequence[_Kind]) -> list[tuple[Command, _Kind]]:
    """Pair each of an odd number of kinds with both commands, which alternate, so that a few pairs have both."""
    return list(zip(list(COMMANDS.values()) * len(kinds), [*kinds, *kinds], strict=True))


def prepare(folder: Path, nuclei: Sequence[int | None] = (None,) * 5) -> Path:
    """Write ``rois``, ``toy.yaml`` and ``finetuning.yaml``. ``nuclei``: how many each ROI keeps, None for all."""
    with RoiSetWriter(folder / "rois", provenance={}) as writer:
        for seed, count in enumerate(nuclei):
            image, xy, _ = synthetic_image(seed, 160, 0.25)
            writer.add(image, mpp=0.25, xy=xy[:count], slide=f"s{seed}")
    (folder / "toy.yaml").write_text(PRETRAINING)
    (folder / "finetuning.yaml").write_text(FINETUNING)
    return folder


def log_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def last_step(out: Path) -> int:
    rows = read_metrics(out / "metrics.jsonl")
    return rows[-1]["step"] if rows else -1


def wait_for_step(out: Path, step: int, child: Child) -> None:
    """Wait until the row of a step is in ``metrics.jsonl``."""
    wait_until(lambda: last_step(out) >= step or child.poll() is not None, 600, f"step {step} not logged")
    if last_step(out) < step:
        raise AssertionError(f"ended before step {step}: {child.output()[-500:]}")


def losses(out: Path) -> list[tuple[int, str]]:
    """Return step and loss of every row, exact to the bit."""
    rows = read_metrics(out / "metrics.jsonl")
    return [(row["step"], float(row["loss"]).hex()) for row in rows if "loss" in row]


def orphans(out: Path) -> list[str]:
    """Return the temporary files and folders left in a run folder."""
    return [os.path.relpath(path, out) for path in out.rglob(".*")]
