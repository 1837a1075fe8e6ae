"""Runs of a training command on toy networks, in this process and on two ranks, and comparisons of their results."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from muse_fast import pretrain
from muse_fast.batch import Views
from muse_fast.images.imagenet import normalised
from muse_fast.images.synthetic import synthetic_image
from muse_fast.pretraining import run
from muse_fast.pretraining.results import Results
from muse_fast.pretraining.trainer import Trainer
from muse_fast.roiset.roiset import RoiSetWriter
from muse_fast.runtime import checkpoint, cli
from muse_fast.runtime.distributed import rank
from muse_fast.training.report import read_metrics
from muse_fast.views.loader import StepSampler
from tests.support.ranks import Ranks
from tests.support.thin import thin_networks

STEPS = int(os.environ.get("MUSE_FAST_TOY_STEPS", "12"))  # torture's row T2 takes 60
MIDWAY = 3 * STEPS // 5  # a checkpoint while prototypes are still frozen, hence without their moments
TOY = f"""
views: {{global_size: 64, local_size: 32, num_locals: 1}}
model: {{arch: vit_tiny, drop_path: 0.2}}
head: {{hidden_dim: 32, bottleneck_dim: 16, prototypes: 16, input_norm: true}}
loss: {{centering: sinkhorn}}
optim: {{steps: {STEPS}, batch_size: 4, warmup_steps: 5, freeze_prototypes_steps: {MIDWAY + 2},
  ema_start: 0.9, clip_grad: 0.3}}
train: {{precision: fp64, device: cpu, log_every: 1, checkpoint_every: {MIDWAY}, keep_every: {MIDWAY},
  eval_every: 0, eval_rois: 4}}
"""
LOSSES = ("loss", "loss_image", "loss_nucleus")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Change(NamedTuple):
    """Changes that a test makes to the command.

    Attributes:
        smooth: use softplus instead of ReLU. In float32 some of the 10^7 inputs of ReLUs in a run are so close to 0
            that the order of a sum decides their sign. That changes the gradient, and Adam makes it 1e-3 of the loss.
        order: order of the ROIs of a step.
        poison: step (from 0) and rank whose images get a nan.
    """

    smooth: bool = False
    order: Sequence[int] = ()
    poison: tuple[int, int] | None = None


UNCHANGED = Change()
Command = Callable[[Sequence[str]], int]


def run_command(argv: Sequence[str], change: Change = UNCHANGED, command: Command = pretrain.main) -> Ended:
    """Run the command on thin networks: a ViT with four layers, a ResNet-50 with a sixteenth of the channels.

    It draws no pictures of the results.
    """
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(thin_networks())
        stack.enter_context(without_pictures())
        if change.smooth:
            stack.enter_context(mock.patch.object(F, "relu", lambda x, inplace=False: F.softplus(x)))
        if change.order:
            stack.enter_context(mock.patch.object(StepSampler, "_sample", in_order(change.order)))
        if change.poison:
            stack.enter_context(mock.patch.object(Trainer, "train_step", poisoned(*change.poison)))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        code = cli.run(command, argv)
    return Ended(code, out.getvalue(), err.getvalue())


@contextmanager
def without_pictures() -> Iterator[None]:
    """Let finished runs draw nothing, which takes a third of the time of a toy run."""
    with mock.patch.object(run, "draw_results", lambda networks, *_: Results({}, dict.fromkeys(networks))):
        yield


def in_order(order: Sequence[int]) -> Callable[[StepSampler, int], Any]:
    sample = StepSampler._sample
    return lambda sampler, place: sample(sampler, place - place % len(order) + order[place % len(order)])


def with_nan(views: Views) -> Views:
    """The views, the first of which is not a number; uint8 ones could not be."""
    images = normalised(views.global_images).clone()
    images[0] = float("nan")
    return replace(views, global_images=images)


def poisoned(step: int, on_rank: int) -> Callable[..., Any]:
    train_step = Trainer.train_step

    def step_with_nan(trainer: Trainer, *micro_batches: Any, measure: bool) -> Any:
        if (trainer.step, rank()) == (step, on_rank):
            micro_batches = (with_nan(micro_batches[0]), *micro_batches[1:])
        return train_step(trainer, *micro_batches, measure=measure)

    return step_with_nan


class Runs:
    """Runs of a command in this process and on two ranks. They are cached, so that tests can share them.

    Args:
        folder: has ``toy.yaml``, the settings.
        fixed: arguments of every run.
    """

    def __init__(self, folder: Path, ranks: Ranks, command: Command, fixed: Sequence[str]) -> None:
        self.folder, self.ranks, self.command, self.fixed = folder, ranks, command, fixed
        self._done: dict[str, Path] = {}

    def argv(self, out: Path, *overrides: str) -> list[str]:
        config = ["--config", str(self.folder / "toy.yaml"), "--out", str(out)]
        return [*config, *self.fixed, "data.workers=0", *overrides]

    def __call__(self, name: str, engine: str, *overrides: str, change: Change = UNCHANGED) -> Path:
        """Return the folder of a run on one rank (engine "one"), or on two."""
        key = f"{name}-{engine}"
        if key not in self._done:
            out = self.folder / key
            for ended in self.end(out, engine, *overrides, change=change):
                assert ended.code == 0, ended
            self._done[key] = out
        return self._done[key]

    def end(self, out: Path, engine: str, *overrides: str, change: Change = UNCHANGED) -> list[Ended]:
        """Run and return how each rank ended."""
        if engine == "one":
            return [run_command(self.argv(out, *overrides), change, self.command)]
        argv = self.argv(out, f"train.parallel={engine}", *overrides)
        return self.ranks(run_command, [(argv, change, self.command)] * 2)


def toy_runs(folder: Path, ranks: Ranks) -> Runs:
    """Write five ROIs and the settings above to ``folder``."""
    write_rois(folder / "rois", [True] * 5)
    (folder / "toy.yaml").write_text(TOY)
    return Runs(folder, ranks, pretrain.main, [f"data.roiset={folder / 'rois'}"])


def write_rois(folder: Path, with_nuclei: Sequence[bool]) -> None:
    with RoiSetWriter(folder, provenance={}) as writer:
        for seed, has_nuclei in enumerate(with_nuclei):
            image, xy, _ = synthetic_image(seed, 160, 0.25)
            writer.add(image, mpp=0.25, xy=xy if has_nuclei else xy[:0], slide=f"s{seed}")


def training_rows(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def assert_same_losses(
    ours: Path, theirs: Path, tolerance: float, keys: Sequence[str] = (*LOSSES, "pairs_per_roi")
) -> None:
    """Assert that the rows of ``ours`` equal the last rows of ``theirs``."""
    mine, others = training_rows(ours), training_rows(theirs)
    others = others[-len(mine) :]
    assert [row["step"] for row in mine] == [row["step"] for row in others]
    for key in keys:
        np.testing.assert_allclose(
            [r[key] for r in mine], [r[key] for r in others], rtol=tolerance, atol=0, err_msg=key
        )


def weights(out: Path, *stems: str) -> dict[str, torch.Tensor]:
    """Return the tensors of files of the last checkpoint, except parameters whose gradient is only rounding.

    A bias of all keys adds the same to every score of a query, and a bias before a norm without parameters is
    subtracted again. Adam turns such noise into steps of full length, which change nothing.
    """
    last = checkpoint.folder_of(out, checkpoint.steps(out)[-1])
    found = {}
    for stem in stems:
        for name, value in checkpoint.read_tensors(last, stem).items():
            if name.endswith("qkv.bias"):
                query, _, of_value = value.chunk(3)
                value = torch.cat([query, of_value])
            if not name.endswith("input_norm.0.bias"):
                found[f"{stem}/{name}"] = value.double()
    return found


def assert_same_weights(ours: Path, theirs: Path, tolerance: float, *stems: str) -> None:
    mine, others = weights(ours, *stems), weights(theirs, *stems)
    assert mine.keys() == others.keys()
    for name, value in mine.items():
        difference = (value - others[name]).abs().max() / others[name].abs().max().clamp(min=1e-30)
        assert difference <= tolerance, (name, difference)


def assert_same_bits(ours: Path, theirs: Path) -> None:
    assert_same_losses(ours, theirs, 0.0)
    last = [checkpoint.folder_of(out, checkpoint.steps(out)[-1]) for out in (ours, theirs)]
    for stem in ("student", "teacher", "optimizer", "state"):
        mine, others = (checkpoint.read_tensors(folder, stem) for folder in last)
        assert mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine), stem
