"""Messages when memory runs out; ``torture`` starves real runs (row T7)."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from muse_fast.config import load_config
from muse_fast.detection import memory as detection_memory
from muse_fast.detection.config import FinetuneConfig
from muse_fast.errors import UserError
from muse_fast.models.archs import find_arch
from muse_fast.pretraining.memory import remedies, situation
from muse_fast.pretraining.trainer import Trainer
from muse_fast.runtime.options import load_settings
from muse_fast.training.memory import explained_out_of_memory
from tests.pretraining.test_trainer import toy


@pytest.mark.parametrize(
    ("settings", "rois", "ranks", "first"),
    [
        ([], 256, 1, ["model.recompute=selective", "optim.accumulate=2", "optim.batch_size=128"]),
        (["model.recompute=selective"], 256, 1, ["model.recompute=full", "optim.accumulate=2", "optim.batch_size=128"]),
        (["model.recompute=full", "loss.logit_free=false"], 32, 8,
         ["loss.logit_free=true", "train.parallel=fsdp", "optim.accumulate=2"]),
        (["model.recompute=full", "loss.logit_free=false", "head.prototypes=1024"], 32, 8,
         ["train.parallel=fsdp", "optim.accumulate=2", "optim.batch_size=128"]),
        (["model.arch=resnet50", "optim.batch_size=1"], 1, 1,
         ["views.num_locals=4", "head.prototypes=32768", "a smaller views.global_size"]),
        (["model.arch=resnet50", "optim.batch_size=24"], 3, 8,
         ["train.parallel=fsdp", "optim.batch_size=8", "views.num_locals=4"]),
    ],
)  # fmt: skip
def test_three_settings_to_lower(settings: list[str], rois: int, ranks: int, first: list[str]) -> None:
    found = remedies(load_config(None, settings), rois, ranks)
    assert [setting.partition(" (")[0] for setting in found[:3]] == first


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
        MemoryError(),
    ],
)
def test_an_allocators_error_is_explained(error: Exception) -> None:
    trainer = Trainer(toy(), torch.device("cpu"))
    said = r"out of memory at step 1 on cpu .*peak was \d+ MiB.*Set one of: "
    with pytest.raises(UserError, match=said), explained_out_of_memory(trainer.device, partial(situation, trainer)):
        raise error


@pytest.mark.parametrize(
    ("arch", "settings", "ranks", "device", "found"),
    [
        ("vit_tiny", [], 1, "cuda", ["model.recompute=selective", "optim.accumulate=2", "optim.batch_size=2"]),
        ("vit_tiny", ["model.recompute=selective", "optim.batch_size=6"], 2, "cuda",
         ["model.recompute=full", "train.parallel=fsdp", "optim.batch_size=2"]),
        ("resnet50", ["train.precision=fp32", "optim.accumulate=4"], 1, "cuda",
         ["train.precision=bf16", "optim.batch_size=2", "data.sample_size=512"]),
        ("resnet50", ["optim.batch_size=1", "data.sample_size=48", "detector.stride=16"], 1, "cpu",
         ["weights of a smaller architecture"]),
        ("vit_tiny",
         ["model.recompute=full", "optim.batch_size=1", "data.sample_size=80", "train.precision=fp32"], 1, "cpu",
         ["data.sample_size=32", "detector.stride=16", "weights of a smaller architecture"]),
    ],
)  # fmt: skip
def test_settings_to_lower_in_fine_tuning(
    arch: str, settings: list[str], ranks: int, device: str, found: list[str]
) -> None:
    config = load_settings(FinetuneConfig, None, settings)
    held, supports = config.optim.batch_size // ranks // config.optim.accumulate, find_arch(arch).supports
    ours = [one.partition(" (")[0] for one in detection_memory.remedies(config, held, ranks, supports, device)[:3]]
    assert ours == found
    for change in ours:
        if "=" in change:
            load_settings(FinetuneConfig, None, [*settings, change])  # does not raise


def test_other_errors_pass_through() -> None:
    trainer = Trainer(toy(), torch.device("cpu"))
    with (
        pytest.raises(RuntimeError, match="a bug"),
        explained_out_of_memory(trainer.device, partial(situation, trainer)),
    ):
        raise RuntimeError("a bug")
