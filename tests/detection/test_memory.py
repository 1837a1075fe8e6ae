"""The memory of a fine-tuning step, counted before it runs: against what a real step takes, and as users see it."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch

from bench.measure import held_and_peak
from muse_fast.detection import memory
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detector import Detector, grid
from muse_fast.detection.finetuner import Finetuner
from muse_fast.detection.run import new_detector
from muse_fast.detection.samples import LfovBatch
from muse_fast.errors import UserError
from muse_fast.models.archs import find_arch
from muse_fast.runtime.options import load_settings
from muse_fast.training import footprint

pytestmark = pytest.mark.usefixtures("thin")
CPU = torch.device("cpu")
MICRO_BATCHES = ("optim.batch_size=2", "optim.accumulate=2", "loss.pseudo_view=same")


def settings(*more: str) -> FinetuneConfig:
    return load_settings(FinetuneConfig, None, ["train.precision=fp32", "optim.batch_size=1", *more])


def detector(config: FinetuneConfig, arch: str = "vit_tiny") -> Detector:
    return new_detector(config, ("a", "b", "c"), f"random:{arch}", None, None)


def batch(config: FinetuneConfig) -> LfovBatch:
    """A micro-batch with a nucleus at every tenth proposal."""
    count, side = config.optim.batch_size // config.optim.accumulate, config.data.sample_size
    empty = memory._empty_batch(count, side)
    xy = grid(side // 2, config.detector.stride)[::10]
    return empty._replace(
        xy=xy.repeat(count, 1),
        label=torch.zeros(count * len(xy), dtype=torch.int64),
        counts=torch.full((count,), len(xy)),
    )


def measured(config: FinetuneConfig, arch: str) -> int:
    """Bytes allocated through torch at the peak of the second step of a run, by its profiler."""
    kept: list[Any] = []

    def first_step() -> None:
        tuner = Finetuner(config, detector(config, arch), CPU, config.optim.batch_size)
        tuner.step = tuner.steps - 2
        kept.extend([tuner, [batch(config) for _ in range(config.optim.accumulate)]])
        step()
        tuner.optimizer.zero_grad()

    def step() -> None:
        kept[0].train_step(*kept[1], measure=False)

    return held_and_peak(first_step, step, "cpu")[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "more"),
    [
        (256, ["model.recompute=none", *MICRO_BATCHES]),
        (256, ["model.recompute=full"]),
        (512, ["model.recompute=none"]),
        (512, ["model.recompute=selective", *MICRO_BATCHES]),
    ],
)
def test_the_count_is_what_a_step_takes(side: int, more: list[str]) -> None:
    agree("vit_tiny", side, *more)


def test_the_count_is_what_a_step_of_a_resnet_takes() -> None:
    agree("resnet50", 96, "optim.batch_size=2")


def agree(arch: str, side: int, *more: str) -> None:
    config = settings(f"data.sample_size={side}", *more)
    counted = memory.footprint(config, detector(config, arch), CPU).total
    assert counted == pytest.approx(measured(config, arch), rel=0.1)


def test_kinds_and_recomputation() -> None:
    plain, full = (
        memory.footprint(config, detector(config), CPU).kinds
        for config in (settings("data.sample_size=256", f"model.recompute={kind}") for kind in ("none", "full"))
    )
    assert plain.keys() >= {"attention", "MLP", "norms", "decoder", "heads", footprint.WEIGHTS, footprint.OPTIMISER}
    assert all(full.get(kind, 0) < 0.5 * plain[kind] for kind in ("MLP", "attention", "norms"))
    assert plain[footprint.OPTIMISER] >= 1.99 * plain[footprint.WEIGHTS]


def test_on_several_ranks() -> None:
    """DDP keeps all gradients; FSDP of four ranks keeps a quarter of the state, and gathers layers."""
    network, one = detector(settings()), footprint.Footprint({"weights": 4000, "optimiser": 8000, "MLP": 10})
    weights = sum(p.nbytes for p in network.parameters())
    layer = sum(p.nbytes for p in network.backbone.encoder.layers[0].parameters())
    assert footprint.on_a_rank(one, "fsdp", 1, network) == one
    assert footprint.on_a_rank(one, "ddp", 4, network).kinds == {**one.kinds, "gradients": weights}
    sharded = dict(footprint.on_a_rank(one, "fsdp", 4, network).kinds)
    assert 3 * layer <= sharded.pop("gathered weights") < 3 * weights
    assert sharded == {"weights": 1000, "optimiser": 2000, "gradients": -(-weights // 4), "MLP": 10}


def test_a_rank_holds_its_share_of_the_batch() -> None:
    network, small = detector(settings()), ["data.sample_size=64", "train.parallel=ddp"]
    alone = memory.footprint(settings(*small, "optim.batch_size=2"), network, CPU)
    of_four = memory.footprint(settings(*small, "optim.batch_size=8"), network, CPU, ranks=4)
    assert {**alone.kinds, "gradients": 0} == {**of_four.kinds, "gradients": 0}


def with_room(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "room_on", lambda device: size)


@pytest.mark.slow
def test_the_plan_names_a_setting_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("data.sample_size=128", "optim.batch_size=4")
    network, footprint_of = detector(config), memory.footprint
    counted = cache(lambda changed: footprint_of(changed, network, CPU))
    needed = {name: counted(changed).total for name, changed in memory.smaller(config, ("model.recompute",), 1)}
    monkeypatch.setattr(memory, "footprint", lambda changed, *_: counted(changed))
    assert list(needed) == [
        "model.recompute=selective",
        "model.recompute=full",
        "model.recompute=full optim.accumulate=2",
        "model.recompute=full optim.accumulate=4",
    ]
    assert sorted(needed.values(), reverse=True) == list(needed.values())
    for name, size in needed.items():
        with_room(monkeypatch, size)
        with pytest.raises(UserError, match=rf"cpu has .*; it fits with {name} \("):
            memory.plan(config, network, CPU)
    with_room(monkeypatch, size - 1)
    with pytest.raises(UserError, match=r"even model\.recompute=full optim\.accumulate=4 needs"):
        memory.plan(config, network, CPU)
    with_room(monkeypatch, 4 << 30)
    first, second = memory.plan(config, network, CPU)
    assert re.match(r"[\d.]+ of 4 GiB at the peak of a step: \w+ [\d.]+, ", first)
    assert re.fullmatch(r"[\d.]+ GiB with model\.recompute=full", second)
    with_room(monkeypatch, 400 << 30)
    (line,) = memory.plan(config, network, CPU)
    assert re.fullmatch(r"a step takes less than [\d.]+ of 400 GiB", line)


def test_settings_for_several_ranks() -> None:
    config = settings("optim.batch_size=8", "model.recompute=full")
    changes = [name for name, _ in memory.smaller(config, find_arch("vit_tiny").supports, 4)]
    assert changes == ["train.parallel=fsdp", "train.parallel=fsdp optim.accumulate=2"]
    assert [name for name, _ in memory.smaller(config, (), 8)] == ["train.parallel=fsdp"]
