"""Two ranks against one: the same command must give the same run, with DDP and FSDP2."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from muse_fast.config import load_config
from muse_fast.models.timm.networks import parse_spec
from muse_fast.pretraining.trainer import Trainer
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime import checkpoint, exit_codes
from muse_fast.training.loop import sampler_of
from muse_fast.training.report import read_metrics
from muse_fast.views.loader import StepSampler, ViewDataset, load_views
from tests.support.ranks import Ranks, counted_collectives
from tests.support.toy_runs import (
    MIDWAY,
    STEPS,
    Change,
    Runs,
    assert_same_bits,
    assert_same_losses,
    assert_same_weights,
    run_command,
    toy_runs,
    training_rows,
    weights,
    write_rois,
)
from tests.training.test_optim import stepped

# The other choice of each setting. In single precision only a gentle run is comparable: see `Change.smooth`.
PLAIN = ("loss.centering=ema", "loss.logit_free=false", "head.input_norm=false", "head.hidden_dim=256", "optim.lr=1e-5")
ENGINES = ("ddp", "fsdp")
ONLY_DDP = ("ddp", pytest.param("fsdp", marks=pytest.mark.heavy))  # in `make test`
ONLY_FSDP = ("fsdp", pytest.param("ddp", marks=pytest.mark.heavy))
STEMS = ("student", "teacher", "state")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks) -> Runs:
    return toy_runs(tmp_path_factory.mktemp("distributed"), two_ranks)


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if "retrieval_at_1" in row]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one(runs: Runs, engine: str) -> None:
    """Double precision, Sinkhorn, norm before the heads, drop path, clipping, prototypes frozen and then free."""
    one, two = runs("fp64", "one"), runs("fp64", engine)
    assert_same_losses(two, one, 1e-13)
    assert_same_weights(two, one, 1e-12, *STEMS)
    assert all(row["grad_norm"] > 0.3 for row in training_rows(one))
    assert evaluations(two) == evaluations(one)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ONLY_DDP)
def test_two_ranks_equal_one_in_single_precision(runs: Runs, engine: str) -> None:
    """Centres as running means, stored logits. Rounding is 1e-7 from the first step on, and Adam multiplies it."""
    one, two = (
        runs("fp32", each, "train.precision=fp32", *PLAIN, change=Change(smooth=True)) for each in ("one", engine)
    )
    assert_same_losses(two, one, 5e-6)
    assert_same_weights(two, one, 5e-3, *STEMS)  # biases start from 0: this is a share of their steps
    if STEPS >= 60:  # in fewer the loss of so gentle a run changes less than from batch to batch
        assert training_rows(one)[-1]["loss"] < 0.99 * training_rows(one)[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ONLY_DDP)
def test_resnet50_on_two_ranks(runs: Runs, engine: str) -> None:
    """With LARS and gradients clipped one by one. BatchNorm sees more than one value of each local view."""
    views = ("model.arch=resnet50", "views.local_size=64", "head.hidden_dim=256")
    steps = ("optim.steps=4", "optim.warmup_steps=2", "optim.freeze_prototypes_steps=2")
    optim = ("optim.name=lars", "optim.clip=per_tensor", "optim.lr=0.3", *steps)
    one, two = (runs("resnet50", each, *views, *optim) for each in ("one", engine))
    assert_same_losses(two, one, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("dinov3", "fsdp"),
        ("resnet10t", "ddp"),
        pytest.param("dinov3", "ddp", marks=pytest.mark.heavy),
        pytest.param("resnet10t", "fsdp", marks=pytest.mark.heavy),
    ],
)
def test_networks_of_timm_on_two_ranks(runs: Runs, name: str, engine: str) -> None:
    arch = {
        "dinov3": "timm:vit_small_patch16_dinov3:depth=2:embed_dim=24:num_heads=2",
        "resnet10t": "timm:resnet10t:channels=[4,8,16,32]:stem_width=4:zero_init_last=false",
    }[name]
    settings = (f"model.arch={arch}", "views.local_size=64", "optim.steps=4", "optim.lr=1e-5", "optim.warmup_steps=2")
    one, two = (runs(name, each, *settings, "optim.freeze_prototypes_steps=2") for each in ("one", engine))
    assert_same_losses(two, one, 1e-12)
    assert_same_weights(two, one, 1e-9, *STEMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "arch"),
    [
        ("ddp", "timm:resnet10t:channels=[4,8,16,32]:stem_width=4:zero_init_last=false"),
        ("fsdp", "timm:vit_tiny_patch16_224:depth=2:embed_dim=24:num_heads=2"),
    ],
)
def test_an_encoder_from_a_file_is_frozen_and_then_learns_on_two_ranks(
    runs: Runs, engine: str, arch: str, tmp_path: Path
) -> None:
    spec = parse_spec(arch)
    torch.manual_seed(7)
    torch.save(timm.create_model(spec.name, num_classes=0, **spec.options).state_dict(), tmp_path / "a.pth")
    rates = ("optim.name=sgd", "optim.lr=0.01", "optim.layer_decay=0.7", "optim.encoder_lr_scale=0.5")
    settings = (f"model.arch={arch}", f"model.init={arch}@{tmp_path / 'a.pth'}", "views.local_size=64", "optim.steps=4")
    frozen = ("optim.freeze_encoder=2", "optim.freeze_prototypes_steps=3", "optim.warmup_steps=2")
    one, two = (runs(f"frozen-{engine}", each, *settings, *rates, *frozen) for each in ("one", engine))
    assert_same_losses(two, one, 1e-12)
    assert_same_weights(two, one, 1e-9, *STEMS)
    assert [row["encoder_lr"] > 0 for row in training_rows(two)] == [False, False, True, True]


def trainer_and_batches(argv: Sequence[str]) -> tuple[Trainer, Iterator[Any]]:
    """Build trainer and batches as the command does from its arguments."""
    _, path, _, _, *overrides = argv
    config = load_config(path, overrides)
    roiset = RoiSet(Path(config.data.roiset))
    trainer = Trainer(config, torch.device("cpu"))
    sampler = sampler_of(trainer, roiset.select(""))
    views = load_views(ViewDataset(roiset, config.views, config.seed), sampler, workers=0)
    return trainer, zip(*[views] * config.optim.accumulate, strict=True)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one", "fsdp"),
        ("fsdp", "ddp"),
        ("ddp", "one"),
        *(pytest.param(*pair, marks=pytest.mark.heavy) for pair in (("one", "ddp"), ("fsdp", "one"), ("ddp", "fsdp"))),
    ],
)
def test_a_checkpoint_continues_on_any_number_of_ranks(runs: Runs, tmp_path: Path, before: str, after: str) -> None:
    unbroken = runs("fp64", before)
    resumed = resume(runs, unbroken, after, tmp_path)
    assert [row["step"] for row in training_rows(resumed)] == list(range(MIDWAY + 1, STEPS + 1))
    assert_same_losses(resumed, unbroken, 1e-12)
    assert_same_weights(resumed, unbroken, 1e-12, *STEMS)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ONLY_DDP)
def test_the_same_number_of_ranks_continues_bit_for_bit(runs: Runs, tmp_path: Path, engine: str) -> None:
    unbroken = runs("fp64", engine)
    assert_same_bits(resume(runs, unbroken, engine, tmp_path), unbroken)


def resume(runs: Runs, unbroken: Path, engine: str, folder: Path) -> Path:
    """Repeat the end of a run from its checkpoint midway."""
    start = checkpoint.folder_of(unbroken, MIDWAY)
    ended = runs.end(folder / "resumed", engine, "--resume", str(start))
    assert all(each.code == 0 for each in ended), ended
    return folder / "resumed"


def test_ranks_that_see_different_checkpoints_do_not_start(runs: Runs, tmp_path: Path) -> None:
    """This happens if each node has the run folder on a local disk."""
    out = tmp_path / "seen"
    runs.end(out, "one", "optim.steps=6", "optim.freeze_prototypes_steps=0")
    (out / "summary.json").unlink()
    argv = ["optim.steps=6", "optim.freeze_prototypes_steps=0"]
    ended = runs.ranks(run_command, [(runs.argv(out, *argv),), (runs.argv(tmp_path / "other", *argv),)])
    for each in ended:
        assert each.code == exit_codes.USER_ERROR and "different steps, [6, -1]" in each.err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_optimisers_step_sharded_weights_like_whole_ones(name: str, two_ranks: Ranks) -> None:
    """Norms for clipping and LARS are those of whole tensors, of which a rank may have no row; state is reloaded."""
    expected = stepped(name, 3.0)
    for of_rank in two_ranks(stepped, [(name, 3.0, True)] * 2):
        for key, weight in of_rank.items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------- differences between the ranks


@pytest.mark.parametrize("engine", ONLY_FSDP)
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
    """Return, per step, whether the ROI of each rank has nuclei."""
    roiset = RoiSet(folder)
    named: dict[str, Any] = {"seed": 0, "batch_size": 2, "start_step": 0, "stop_step": steps, "world_size": 2}
    samplers = [StepSampler(roiset.select(""), **named, rank=rank) for rank in (0, 1)]
    return [tuple(len(roiset[roi].xy) > 0 for ((_, roi),) in step) for step in zip(*samplers, strict=True)]


def test_only_the_main_rank_prints(runs: Runs, tmp_path: Path) -> None:
    main, other = runs.end(tmp_path / "quiet", "ddp", "optim.steps=6", "optim.warmup_steps=1")
    lines = main.out.splitlines()
    assert len(lines) == len(set(lines)) and sum(line.startswith("step ") for line in lines) == 6
    assert (main.err, other.out, other.err) == ("", "", "")


# ------------------------------------------------------------------------------------------------------ shared failures


@pytest.mark.parametrize("engine", ONLY_FSDP)
def test_nan_on_one_rank_stops_both_before_anything_changes(runs: Runs, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "nan"
    short = ["optim.steps=9", "train.log_every=3", "train.checkpoint_every=3", "optim.warmup_steps=2"]
    ended = runs.end(out, engine, *short, change=Change(poison=(3, 1)))
    assert [each.code for each in ended] == [exit_codes.NON_FINITE] * 2
    report = json.loads((out / "non_finite_step_4.json").read_text())
    (step,) = StepSampler(np.arange(5), seed=0, batch_size=4, start_step=3, stop_step=4)
    assert report["roi_ids"] == [roi for _, roi in step] and report["epochs"] == [epoch for epoch, _ in step]
    written = json.loads((out / "exit.json").read_text())
    assert written["code"] == exit_codes.NON_FINITE and written["step"] == 3 and "image loss" in written["reason"]
    assert checkpoint.steps(out) == [3]
    assert all(torch.isfinite(value).all() for value in weights(out, *STEMS).values())
    assert ended[1].out == ""


# -------------------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("engine", ONLY_FSDP)
def test_micro_batches(runs: Runs, tmp_path: Path, engine: str) -> None:
    """BatchNorm and Sinkhorn see a micro-batch of all ranks: of four ROIs on two ranks, 0 and 2, then 1 and 3."""
    short = [
        "optim.accumulate=2",
        "optim.steps=5",
        "optim.warmup_steps=2",
        "optim.freeze_prototypes_steps=3",
        "optim.lr=1e-4",
        "model.drop_path=0",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    for out, each, change in ((one, "one", Change(order=(0, 2, 1, 3))), (two, engine, Change())):
        ended = runs.end(out, each, *short, change=change)
        assert all(e.code == 0 for e in ended), ended
    assert_same_losses(two, one, 1e-12)
    assert_same_weights(two, one, 1e-11, *STEMS)  # biases are small: little more than these few steps of Adam


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
    """Return what one step exchanges: for DDP the numbers in all buckets, for FSDP the number of reductions."""
    trainer, batches = trainer_and_batches(argv)
    sizes: list[int] = []

    def counting(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, but not postponed ones
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    if trainer.config.train.parallel == "ddp":
        trainer.student_forward.register_comm_hook(None, counting)
    with counted_collectives() as names:
        trainer.train_step(*next(batches))
    if sizes:
        assert sum(sizes) == sum(p.numel() for p in trainer.student.parameters())
    return sum(sizes) or names.count("reduce_scatter_tensor")
