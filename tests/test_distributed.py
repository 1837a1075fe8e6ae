"""Two ranks against one: the same command must give the same run, whatever holds the weights and whoever is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from ranks import Ranks, counted_collectives
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from muse_fast import cli, pretrain
from muse_fast.config import load_config
from muse_fast.data.loader import StepSampler, ViewDataset, load_views
from muse_fast.data.roiset import RoiSet, RoiSetWriter
from muse_fast.data.synthetic import synthetic_image
from muse_fast.distributed import rank, store_of_this_start
from muse_fast.models import backbone, resnet, vit
from muse_fast.train import checkpoint
from muse_fast.train.progress import read_metrics
from muse_fast.train.trainer import Trainer
from torture.processes import children_of, is_alive, wait_until

TOY = """
views: {global_size: 64, local_size: 32, num_locals: 1}
model: {arch: vit_tiny, drop_path: 0.2}
head: {hidden_dim: 32, bottleneck_dim: 16, prototypes: 16, input_norm: true}
loss: {centering: sinkhorn}
optim: {steps: 50, batch_size: 4, warmup_steps: 5, freeze_prototypes_steps: 38, ema_start: 0.9, clip_grad: 0.3}
train: {precision: fp64, device: cpu, log_every: 1, checkpoint_every: 36, keep_every: 36, eval_every: 0, eval_rois: 4}
"""
# The other settings. Single precision is for a gentle run: see `Change.smooth`.
PLAIN = ("loss.centering=ema", "loss.logit_free=false", "head.input_norm=false", "head.hidden_dim=256", "optim.lr=1e-4")
ENGINES = ("ddp", "fsdp")
MIDWAY = 36  # a checkpoint with prototypes still frozen, hence without their moments
LOSSES = ("loss", "loss_image", "loss_nucleus")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Change(NamedTuple):
    """What a test changes in the command.

    Attributes:
        smooth: softplus for ReLU. In float32 some of the 10^7 values that pass a ReLU in a run lie so near to 0 that
            the order of a sum decides their sign. That gives another gradient, and Adam makes it 1e-3 of the loss.
        order: of the ROIs of a step.
        poison: step (from 0) and rank whose images get a nan.
    """

    smooth: bool = False
    order: Sequence[int] = ()
    poison: tuple[int, int] | None = None


UNCHANGED = Change()


def run_command(argv: Sequence[str], change: Change = UNCHANGED) -> Ended:
    """The command on thin networks: a ViT of four layers, a ResNet-50 of a sixteenth of the channels."""
    out, err = io.StringIO(), io.StringIO()
    thin_resnet = partial(timm.create_model, channels=(4, 8, 16, 32))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(backbone.VIT_DIMS_AND_HEADS, vit_tiny=(32, 2)))
        stack.enter_context(mock.patch.multiple(vit, DEPTH=4, TAPPED_LAYERS=(0, 1, 2, 3)))
        stack.enter_context(mock.patch.object(timm, "create_model", thin_resnet))
        stack.enter_context(mock.patch.object(resnet, "WIDTHS", (16, 32, 64, 128)))
        if change.smooth:
            stack.enter_context(mock.patch.object(F, "relu", lambda x, inplace=False: F.softplus(x)))
        if change.order:
            stack.enter_context(mock.patch.object(StepSampler, "_sample", in_order(change.order)))
        if change.poison:
            stack.enter_context(mock.patch.object(Trainer, "train_step", poisoned(*change.poison)))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        code = cli.run(pretrain.main, argv)
    return Ended(code, out.getvalue(), err.getvalue())


def in_order(order: Sequence[int]) -> Callable[[StepSampler, int], Any]:
    sample = StepSampler._sample
    return lambda sampler, place: sample(sampler, place - place % len(order) + order[place % len(order)])


def poisoned(step: int, on_rank: int) -> Callable[..., Any]:
    train_step = Trainer.train_step

    def step_with_nan(trainer: Trainer, *micro_batches: Any, measure: bool) -> Any:
        if (trainer.step, rank()) == (step, on_rank):
            micro_batches[0].global_images[0] = float("nan")
        return train_step(trainer, *micro_batches, measure=measure)

    return step_with_nan


class Runs:
    """Runs of the command in this process and on two ranks; a test's may be another's reference, so they are kept."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self._done: dict[str, Path] = {}

    def argv(self, out: Path, *overrides: str) -> list[str]:
        fixed = ["--config", str(self.folder / "toy.yaml"), "--out", str(out), f"data.roiset={self.folder / 'rois'}"]
        return [*fixed, "data.workers=0", *overrides]

    def __call__(self, name: str, engine: str, *overrides: str, change: Change = UNCHANGED) -> Path:
        """The folder of a run on one rank (engine "one"), or on two."""
        key = f"{name}-{engine}"
        if key not in self._done:
            out = self.folder / key
            for ended in self.end(out, engine, *overrides, change=change):
                assert ended.code == 0, ended
            self._done[key] = out
        return self._done[key]

    def end(self, out: Path, engine: str, *overrides: str, change: Change = UNCHANGED) -> list[Ended]:
        """How each rank of a run ended."""
        if engine == "one":
            return [run_command(self.argv(out, *overrides), change)]
        return self.ranks(run_command, [(self.argv(out, f"train.parallel={engine}", *overrides), change)] * 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks) -> Runs:
    folder = tmp_path_factory.mktemp("distributed")
    write_rois(folder / "rois", [True] * 5)
    (folder / "toy.yaml").write_text(TOY)
    return Runs(folder, two_ranks)


def write_rois(folder: Path, with_nuclei: Sequence[bool]) -> None:
    with RoiSetWriter(folder, provenance={}) as writer:
        for seed, has_nuclei in enumerate(with_nuclei):
            image, xy, _ = synthetic_image(seed, 160, 0.25)
            writer.add(image, mpp=0.25, xy=xy if has_nuclei else xy[:0], slide=f"s{seed}")


def training_rows(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if "retrieval_at_1" in row]


def assert_same_losses(ours: Path, theirs: Path, tolerance: float) -> None:
    """Every row that ``ours`` has, and its last are those of ``theirs``."""
    mine, others = training_rows(ours), training_rows(theirs)
    others = others[-len(mine) :]
    assert [row["step"] for row in mine] == [row["step"] for row in others]
    for key in (*LOSSES, "pairs_per_roi"):
        np.testing.assert_allclose(
            [r[key] for r in mine], [r[key] for r in others], rtol=tolerance, atol=0, err_msg=key
        )


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Of student, teacher and centres at the end, but what has no gradient except for rounding.

    A bias of all keys adds the same to every score of a query, and one ahead of a norm without parameters is
    subtracted again. Adam turns such noise into steps of full length, which change nothing.
    """
    last = checkpoint.folder_of(out, checkpoint.steps(out)[-1])
    found = {}
    for stem in ("student", "teacher", "state"):
        for name, value in checkpoint.read_tensors(last, stem).items():
            if name.endswith("qkv.bias"):
                query, _, of_value = value.chunk(3)
                value = torch.cat([query, of_value])
            if not name.endswith("input_norm.0.bias"):
                found[f"{stem}/{name}"] = value.double()
    return found


def assert_same_weights(ours: Path, theirs: Path, tolerance: float) -> None:
    mine, others = weights(ours), weights(theirs)
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


# The same numbers.


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one(runs: Runs, engine: str) -> None:
    """Double precision; Sinkhorn, norm ahead of the heads, drop path, clipping, prototypes frozen and then free."""
    one, two = runs("fp64", "one"), runs("fp64", engine)
    assert_same_losses(two, one, 1e-12)
    assert_same_weights(two, one, 1e-12)
    assert all(row["grad_norm"] > 0.3 for row in training_rows(one))
    assert evaluations(two) == evaluations(one)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one_in_single_precision(runs: Runs, engine: str) -> None:
    """A running mean as centre, stored logits."""
    one, two = (
        runs("fp32", each, "train.precision=fp32", *PLAIN, change=Change(smooth=True)) for each in ("one", engine)
    )
    assert_same_losses(two, one, 1e-5)
    assert_same_weights(two, one, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_resnet50_too(runs: Runs, engine: str) -> None:
    """With locals that leave BatchNorm more than one value of each."""
    settings = ("model.arch=resnet50", "views.local_size=64", "optim.steps=6", "optim.lr=1e-5", "head.hidden_dim=256")
    one, two = (runs("resnet50", each, *settings, "optim.freeze_prototypes_steps=3") for each in ("one", engine))
    assert_same_losses(two, one, 1e-12)


def trainer_and_batches(argv: Sequence[str]) -> tuple[Trainer, Iterator[Any]]:
    """As the command makes them of its arguments, the settings being those with a dot."""
    _, path, _, _, *overrides = argv
    config = load_config(path, overrides)
    roiset = RoiSet(Path(config.data.roiset))
    trainer = Trainer(config, torch.device("cpu"))
    sampler = pretrain._sampler(trainer, roiset.select(""))
    views = load_views(ViewDataset(roiset, config.views, config.seed), sampler, workers=0)
    return trainer, zip(*[views] * config.optim.accumulate, strict=True)


# Checkpoints.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [("one", "ddp"), ("one", "fsdp"), ("ddp", "one"), ("fsdp", "one"), ("ddp", "fsdp"), ("fsdp", "ddp")],
)
def test_a_checkpoint_continues_on_any_number_of_ranks(runs: Runs, tmp_path: Path, before: str, after: str) -> None:
    unbroken = runs("fp64", before)
    resumed = resume(runs, unbroken, after, tmp_path)
    assert [row["step"] for row in training_rows(resumed)] == list(range(MIDWAY + 1, 51))
    assert_same_losses(resumed, unbroken, 1e-12)
    assert_same_weights(resumed, unbroken, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_as_many_ranks_as_before_continue_bit_for_bit(runs: Runs, tmp_path: Path, engine: str) -> None:
    unbroken = runs("fp64", engine)
    assert_same_bits(resume(runs, unbroken, engine, tmp_path), unbroken)


def resume(runs: Runs, unbroken: Path, engine: str, folder: Path) -> Path:
    """The end of a run again, from its checkpoint midway."""
    start = checkpoint.folder_of(unbroken, MIDWAY)
    ended = runs.end(folder / "resumed", engine, "--resume", str(start))
    assert all(each.code == 0 for each in ended), ended
    return folder / "resumed"


def test_ranks_that_see_different_checkpoints_do_not_start(runs: Runs, tmp_path: Path) -> None:
    """As nodes do whose run folder is on a disk of their own."""
    out = tmp_path / "seen"
    runs.end(out, "one", "optim.steps=6", "optim.freeze_prototypes_steps=0")
    (out / "summary.json").unlink()
    argv = ["optim.steps=6", "optim.freeze_prototypes_steps=0"]
    ended = runs.ranks(run_command, [(runs.argv(out, *argv),), (runs.argv(tmp_path / "other", *argv),)])
    for each in ended:
        assert each.code == cli.EXIT_USER_ERROR and "different steps, [6, -1]" in each.err
    assert not (tmp_path / "other").exists()


# Who has what.


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_without_nuclei_and_a_step_without_any(runs: Runs, tmp_path: Path, engine: str) -> None:
    write_rois(tmp_path / "rois", [True, False, False, True, False])
    settings = [f"data.roiset={tmp_path / 'rois'}", "optim.batch_size=2", "optim.steps=10", "train.eval_rois=2"]
    pairs = nuclei_of_ranks(tmp_path / "rois", steps=10)
    assert {(True, False), (False, True), (False, False)} <= set(pairs)
    folders = {}
    for each in ("one", engine):
        ended = runs.end(tmp_path / each, each, *settings)
        assert all(e.code == 0 for e in ended), ended
        folders[each] = tmp_path / each
    rows = training_rows(folders[engine])
    assert [row["pairs_per_roi"] > 0 for row in rows] == [any(pair) for pair in pairs]
    assert_same_losses(folders[engine], folders["one"], 1e-12)


def nuclei_of_ranks(folder: Path, steps: int) -> list[tuple[bool, ...]]:
    """Per step whether each rank, with one ROI, has nuclei."""
    roiset = RoiSet(folder)
    named: dict[str, Any] = {"seed": 0, "batch_size": 2, "start_step": 0, "stop_step": steps, "world_size": 2}
    samplers = [StepSampler(roiset.select(""), **named, rank=rank) for rank in (0, 1)]
    return [tuple(len(roiset[roi].xy) > 0 for ((_, roi),) in step) for step in zip(*samplers, strict=True)]


def test_the_main_rank_alone_prints(runs: Runs, tmp_path: Path) -> None:
    main, other = runs.end(tmp_path / "quiet", "ddp", "optim.steps=6", "optim.warmup_steps=1")
    lines = main.out.splitlines()
    assert len(lines) == len(set(lines)) and [line.split()[0] for line in lines[4:10]] == ["step"] * 6
    assert (main.err, other.out, other.err) == ("", "", "")


# Failures that the ranks must share.


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_on_one_rank_stops_both_before_anything_changes(runs: Runs, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "nan"
    short = ["optim.steps=9", "train.log_every=3", "train.checkpoint_every=3", "optim.warmup_steps=2"]
    ended = runs.end(out, engine, *short, change=Change(poison=(3, 1)))
    assert [each.code for each in ended] == [pretrain.EXIT_NON_FINITE] * 2
    report = json.loads((out / "non_finite_step_4.json").read_text())
    (step,) = StepSampler(np.arange(5), seed=0, batch_size=4, start_step=3, stop_step=4)
    assert report["roi_ids"] == [roi for _, roi in step] and report["epochs"] == [epoch for epoch, _ in step]
    told = json.loads((out / "exit.json").read_text())
    assert told["code"] == pretrain.EXIT_NON_FINITE and told["step"] == 3 and "image loss" in told["reason"]
    assert checkpoint.steps(out) == [3]
    assert all(torch.isfinite(value).all() for value in weights(out).values())
    assert ended[1].out == ""


# Micro-batches.


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches(runs: Runs, tmp_path: Path, engine: str) -> None:
    """BatchNorm and Sinkhorn see a micro-batch of all ranks: of four ROIs on two ranks 0 and 2, then 1 and 3."""
    short = [
        "optim.accumulate=2",
        "optim.steps=10",
        "optim.freeze_prototypes_steps=5",
        "optim.lr=1e-4",
        "model.drop_path=0",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    for out, each, change in ((one, "one", Change(order=(0, 2, 1, 3))), (two, engine, Change())):
        ended = runs.end(out, each, *short, change=change)
        assert all(e.code == 0 for e in ended), ended
    assert_same_losses(two, one, 1e-12)
    assert_same_weights(two, one, 1e-11)  # a bias is little more than its few steps, which Adam divides by a gradient


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_exchange_gradients_once(runs: Runs, engine: str) -> None:
    sent = []
    for accumulate in (1, 2):
        argv = runs.argv(Path("unused"), f"train.parallel={engine}", f"optim.accumulate={accumulate}")
        ours, theirs = runs.ranks(gradients_sent, [(argv,)] * 2)
        assert ours == theirs
        sent.append(ours)
    assert sent[0] == sent[1] > 0


def gradients_sent(argv: Sequence[str]) -> int:
    """By DDP the numbers in all its buckets, by FSDP the reductions, of one step."""
    trainer, batches = trainer_and_batches(argv)
    sizes: list[int] = []

    def counting(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and no postponed ones
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    if trainer.config.train.parallel == "ddp":
        trainer.student_forward.register_comm_hook(None, counting)
    with counted_collectives() as names:
        trainer.train_step(*next(batches))
    if sizes:
        assert sum(sizes) == sum(p.numel() for p in trainer.student.parameters())
    return sum(sizes) or names.count("reduce_scatter_tensor")


# torchrun, on the network as it is.

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
