"""Without a process group there is one rank, which does not communicate and copies nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from muse_fast.pretraining.distill import build_student_and_teacher
from muse_fast.pretraining.trainer import Trainer
from muse_fast.runtime import distributed
from muse_fast.training.parallel import gradient_sync, parallelise
from muse_fast.training.sharding import full, like, local
from tests.pretraining.test_trainer import toy, toy_views
from tests.support.ranks import counted_collectives

CPU = torch.device("cpu")


def test_numbers_and_sums_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.is_main() and not distributed.launched()
    tensor = torch.randn(2, 3)
    assert distributed.sum_over_ranks(tensor) is tensor
    gathered = distributed.gather_over_ranks(tensor)
    assert gathered.shape == (1, 2, 3) and torch.equal(gathered[0], tensor)
    assert distributed.any_rank(True, CPU) and not distributed.any_rank(False, CPU)
    distributed.wait_for_all()


@pytest.mark.parametrize("size", ["1", None])
def test_a_job_of_one_process_creates_no_group(size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    with distributed.process_group(CPU, 60, lambda message, step: None):
        assert not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.launched()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_network_is_not_wrapped(engine: str) -> None:
    network, _ = build_student_and_teacher(toy())
    assert parallelise(network, engine, "fp32") is network
    with gradient_sync(network, False):
        pass
    weight = nn.Parameter(torch.randn(3, 2, 1, 1).to(memory_format=torch.channels_last))
    assert full(weight) is weight
    assert local([weight])[0].data_ptr() == weight.data_ptr()
    laid_out = like(torch.ones(3, 2, 1, 1, dtype=torch.float64), weight)
    assert laid_out.stride() == weight.stride() and laid_out.dtype == torch.float64


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_step_runs_no_collectives(engine: str) -> None:
    settings = ("head.input_norm=true", "loss.centering=sinkhorn", f"train.parallel={engine}")
    trainer = Trainer(toy(*settings), CPU)
    with counted_collectives() as collectives:
        trainer.train_step(toy_views())
        trainer.check()
    assert collectives == []
    assert trainer.teacher_backbone() is trainer.teacher.backbone
