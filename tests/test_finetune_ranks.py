"""Fine-tuning on two ranks against one: the same command must give the same run, with DDP and FSDP2."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from muse_fast import finetune
from muse_fast.detection.detector import load_detector
from muse_fast.detection.finetuner import Finetuner, unused_weights
from muse_fast.images.points_csv import write_points
from muse_fast.images.synthetic import synthetic_image
from muse_fast.runtime import checkpoint, exit_codes
from muse_fast.runtime.distributed import rank
from muse_fast.training.report import Metrics, read_metrics
from muse_fast.views.loader import StepSampler
from tests.support.ranks import Ranks
from tests.support.toy_runs import (
    Change,
    Ended,
    Runs,
    assert_same_losses,
    assert_same_weights,
    run_command,
    training_rows,
    weights,
)

# Side in pixels, and whether nuclei are annotated. A sample of the largest image has no unlabelled tissue.
TRAIN, VAL = ((160, True), (40, True), (48, False), (56, True), (64, False)), ((64, True), (48, True), (40, False))
STEPS, LONG_STEPS = 15, 40  # five in two epochs
LONG = ("optim.epochs=16", "train.eval_every=8")
TOY = """
data: {sample_size: 64}
detector: {hidden_dim: 16, min_score: 0.1}
loss: {confidence: 0.3}
optim: {epochs: 6, batch_size: 2, lr: 1e-3, clip_grad: 1.0}
train: {precision: fp64, device: cpu, log_every: 1, eval_every: 3}
"""
LOSSES = ("loss", "loss_reg", "loss_type", "loss_cons")
MEANS = ("distance", "distance_of_proposals", "nuclei_per_image", "annotated", "pseudo_labelled", "grad_norm")
ENGINES = ("ddp", "fsdp")
ONLY_DDP = ("ddp", pytest.param("fsdp", marks=pytest.mark.heavy))  # in `make test`
ONLY_FSDP = ("fsdp", pytest.param("ddp", marks=pytest.mark.heavy))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks) -> Runs:
    return make(tmp_path_factory.mktemp("finetune_ranks"), two_ranks)


def make(folder: Path, two_ranks: Ranks) -> Runs:
    folder.mkdir(exist_ok=True)
    (folder / "toy.yaml").write_text(TOY)
    (folder / "images").mkdir()
    rows = ["image,mpp,split"]
    for number, (split, (side, has_nuclei)) in enumerate([("train", x) for x in TRAIN] + [("val", x) for x in VAL]):
        image, xy, label = synthetic_image(number, side, 0.5)
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        count = len(xy) if has_nuclei else 0
        write_points(folder / "images" / f"{number}.csv", xy[:count], label[:count], np.ones(count))
        rows.append(f"{number}.png,0.5,{split}")
    (folder / "images" / "mpp.csv").write_text("\n".join(rows) + "\n")
    source = ["--data", f"points:{folder / 'images'}", "source.labels=a,b,c", "--weights", "random:vit_tiny"]
    return Runs(folder, two_ranks, finetune.main, source)


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if "val_f1" in row]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one(runs: Runs, engine: str) -> None:
    """Unequal numbers of nuclei, ranks without any or without unlabelled tissue, pseudo-labels, clipping."""
    assert_two_equal_one(runs, "fp64", engine)


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one_over_40_steps(runs: Runs, engine: str) -> None:
    assert_two_equal_one(runs, "long-fp64", engine, *LONG)


def assert_two_equal_one(runs: Runs, name: str, engine: str, *more: str) -> None:
    one, two = runs(name, "one", *more), runs(name, engine, *more)
    assert_same_losses(two, one, 1e-12, (*LOSSES, *MEANS))
    assert_same_weights(two, one, 1e-12, "detector")
    rows = training_rows(one)
    assert len(rows) == (LONG_STEPS if more else STEPS) and all(row["grad_norm"] > 0.1 for row in rows)
    assert any(row["loss_reg"] == 0 for row in rows) and any(row["loss_cons"] > 0.1 for row in rows)
    assert len(evaluations(one)) == 2 and evaluations(two) == evaluations(one)
    ours, theirs = (json.loads((out / "summary.json").read_text()) for out in (two, one))
    assert (ours["best"], ours["val"]) == (theirs["best"], theirs["val"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ONLY_DDP)
def test_two_ranks_equal_one_in_single_precision(runs: Runs, engine: str) -> None:
    assert_close_in_single_precision(runs, "fp32", "fp64", engine)


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one_over_40_steps_in_single_precision(runs: Runs, engine: str) -> None:
    assert_close_in_single_precision(runs, "long-fp32", "long-fp64", engine, *LONG)


def assert_close_in_single_precision(runs: Runs, name: str, exact_name: str, engine: str, *more: str) -> None:
    """Two ranks add in another order, which makes 1e-7 in a step; they are as near to the run in float64 as one is."""
    one, two = (runs(name, each, "train.precision=fp32", *more) for each in ("one", engine))
    assert_same_losses(two, one, 2e-5 if more else 1e-5, LOSSES)
    assert_same_losses(two, one, 5e-3 if more else 1e-5, ["grad_norm"])  # ReLUs near 0 decide differently in the end
    assert_same_weights(two, one, 5e-3 if more else 1e-3, "detector")
    exact = runs(exact_name, "one", *more)
    assert 0 < distance(two, exact) <= 3 * distance(one, exact)


@pytest.mark.slow
def test_two_ranks_are_close_to_one_in_bf16(runs: Runs) -> None:
    """The first step rounds alike. Later, differences of 1e-7 decide roundings to 8 bits: two ranks then differ from
    one by no more than bf16 differs from float32, half a percent."""
    one, two = (runs("bf16", each, "train.precision=bf16") for each in ("one", "ddp"))
    first, theirs = training_rows(two)[0], training_rows(one)[0]
    assert all(first[key] == pytest.approx(theirs[key], rel=1e-5) for key in LOSSES)
    exact = runs("fp32", "one", "train.precision=fp32")
    assert 0 < distance(two, one) <= min(0.01, 1.5 * distance(one, exact))


def distance(ours: Path, theirs: Path) -> float:
    """Mean relative difference of the loss over all steps."""
    losses = [np.array([row["loss"] for row in training_rows(out)]) for out in (ours, theirs)]
    return float((np.abs(losses[0] - losses[1]) / losses[1]).mean())


def test_ranks_see_what_this_file_says(runs: Runs) -> None:
    """Of each step, whether the image of each rank has nuclei and unlabelled tissue."""
    named: dict[str, Any] = {"seed": 0, "batch_size": 2, "start_step": 0, "stop_step": STEPS, "world_size": 2}
    samplers = [StepSampler(np.arange(len(TRAIN)), **named, rank=number) for number in (0, 1)]
    seen = {tuple(TRAIN[image] for ((_, image),) in step) for step in zip(*samplers, strict=True)}
    nuclei = {tuple(has_nuclei for _, has_nuclei in step) for step in seen}
    assert nuclei == {(True, False), (False, True), (False, False), (True, True)}
    assert {tuple(side > 64 for side, _ in step) for step in seen} >= {(True, False), (False, True)}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ONLY_FSDP)
def test_a_run_goes_from_two_ranks_to_one_and_back(runs: Runs, tmp_path: Path, engine: str) -> None:
    """It is stopped twice, within an epoch, and each number of ranks continues what the other has saved."""
    out = tmp_path / "run"
    for each, step in ((engine, 4), ("one", 9)):
        for ended in stopped(runs, out, each, step, culprit=1 if each == engine else 0):
            assert ended.code == exit_codes.STOPPED, ended
        assert checkpoint.steps(out)[-1] == step
    for ended in runs.end(out, engine):
        assert ended.code == 0, ended
    unbroken = runs("fp64", "one")
    assert [row["step"] for row in training_rows(out)] == list(range(1, STEPS + 1))
    assert_same_losses(out, unbroken, 1e-12, (*LOSSES, *MEANS))
    assert_same_weights(out, unbroken, 1e-12, "detector")
    assert evaluations(out) == evaluations(unbroken)


@pytest.mark.slow
def test_sigterm_at_any_rank_saves_and_the_run_ends_bit_identical(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for culprit, step, reason in ((1, 4, "another rank was asked to stop"), (0, 9, "SIGTERM")):
        for ended in stopped(runs, out, "ddp", step, culprit):
            assert ended.code == exit_codes.STOPPED, ended
        assert checkpoint.steps(out)[-1] == step
        assert json.loads((out / "exit.json").read_text())["reason"] == reason
    for ended in runs.end(out, "ddp"):
        assert ended.code == 0, ended
    unbroken = runs("fp64", "ddp")
    assert_same_losses(out, unbroken, 0.0, (*LOSSES, *MEANS))
    for stem in ("detector", "optimizer"):
        ours, theirs = (checkpoint.read_tensors(checkpoint.folder_of(run, STEPS), stem) for run in (out, unbroken))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), stem


def stopped(runs: Runs, out: Path, engine: str, step: int, culprit: int) -> list[Ended]:
    """Start or continue a run, in whose ``step`` the rank ``culprit`` receives SIGTERM."""
    if engine == "one":
        return [run_and_stop(runs.argv(out), step, culprit)]
    return runs.ranks(run_and_stop, [(runs.argv(out, f"train.parallel={engine}"), step, culprit)] * 2)


def run_and_stop(argv: Sequence[str], step: int, culprit: int) -> Ended:
    train_step = Finetuner.train_step

    def step_and_stop(tuner: Finetuner, *micro_batches: Any, measure: bool) -> Metrics:
        if (tuner.step + 1, rank()) == (step, culprit):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(tuner, *micro_batches, measure=measure)

    with mock.patch.object(Finetuner, "train_step", step_and_stop):
        return run_command(argv, command=finetune.main)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ONLY_FSDP)
def test_micro_batches_and_recomputation(runs: Runs, tmp_path: Path, engine: str) -> None:
    """Of four images on two ranks, a micro-batch has 0 and 2, then 1 and 3; BatchNorm and losses see both ranks."""
    short = ["optim.batch_size=4", "optim.accumulate=2", "optim.epochs=2", "model.recompute=full"]
    one, two = tmp_path / "one", tmp_path / "two"
    for out, each, change in ((one, "one", Change(order=(0, 2, 1, 3))), (two, engine, Change())):
        for ended in runs.end(out, each, *short, change=change):
            assert ended.code == 0, ended
    assert_same_losses(two, one, 1e-12, (*LOSSES, *MEANS))
    assert_same_weights(two, one, 1e-11, "detector")


@pytest.mark.parametrize("engine", ONLY_DDP)
def test_nan_on_one_rank_stops_both_before_anything_changes(runs: Runs, tmp_path: Path, engine: str) -> None:
    out = tmp_path / "nan"
    for ended in runs.ranks(run_with_nan, [(runs.argv(out, f"train.parallel={engine}"), 3)] * 2):
        assert ended.code == exit_codes.NON_FINITE, ended
    report = json.loads((out / "non_finite_step_4.json").read_text())
    (step,) = StepSampler(np.arange(len(TRAIN)), seed=0, batch_size=2, start_step=3, stop_step=4)
    assert report["roi_ids"] == [image for _, image in step] and "offset" not in report["error"]
    assert checkpoint.steps(out) == [3]
    assert all(torch.isfinite(value).all() for value in weights(out, "detector").values())


def run_with_nan(argv: Sequence[str], step: int) -> Ended:
    """Run, and on rank 1 see NaNs in ``step``, counted from 0."""
    to_network = Finetuner._to_network

    def poisoned(tuner: Finetuner, images: torch.Tensor) -> torch.Tensor:
        return to_network(tuner, images) * (torch.nan if (tuner.step, rank()) == (step, 1) else 1)

    with mock.patch.object(Finetuner, "_to_network", poisoned):
        return run_command(argv, command=finetune.main)


def test_only_the_main_rank_prints(runs: Runs, tmp_path: Path) -> None:
    main, other = runs.end(tmp_path / "quiet", "ddp", "optim.epochs=1")
    assert sum(line.startswith("step ") for line in main.out.splitlines()) == 3
    assert "3 steps of 2 images over 2 ranks (ddp)" in main.out
    assert (main.err, other.out, other.err) == ("", "", "")


def test_a_batch_that_does_not_divide_is_refused(runs: Runs, tmp_path: Path) -> None:
    for ended in runs.end(tmp_path / "odd", "ddp", "optim.batch_size=3"):
        assert ended.code == exit_codes.USER_ERROR and "multiple of 2 ranks x 1 micro-batches" in ended.err
    assert not (tmp_path / "odd").exists()


def test_weights_that_the_detector_does_not_use(runs: Runs, tmp_path: Path) -> None:
    """The image feature of this network has weights of its own; DDP would wait for their gradients."""
    arch = "timm:vit_base_patch16_siglip_224:depth=2:embed_dim=24:num_heads=2"
    for ended in runs.end(tmp_path / "siglip", "ddp", "--weights", f"random:{arch}", "optim.epochs=1"):
        assert ended.code == 0, ended
    detector = load_detector(tmp_path / "siglip")
    unused = {id(weight) for weight in unused_weights(detector.backbone)}
    names = [name for name, weight in detector.backbone.named_parameters() if id(weight) in unused]
    assert names and all("attn_pool" in name for name in names)
