"""The step never makes the host wait for the device, nor does the loop between two log lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_fast.batch import Views
from muse_fast.config import load_config
from muse_fast.images.synthetic import synthetic_image
from muse_fast.ops import backends
from muse_fast.pretraining.losses import LOSSES
from muse_fast.pretraining.run import pretrain
from muse_fast.pretraining.trainer import Trainer
from muse_fast.roiset.roiset import RoiSetWriter
from muse_fast.training.report import Metrics, read_metrics
from muse_fast.views.loader import load_views
from tests.pretraining.test_trainer import TOY, toy, toy_views
from tests.support.ranks import HostWaitError, NoHostWait

pytestmark = pytest.mark.usefixtures("thin", "without_pictures")
CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(backends.library_error() is not None, reason=str(backends.library_error()))

SETTINGS = [
    pytest.param(("loss.logit_free=true",), id="recipe"),
    pytest.param(("loss.logit_free=true", "loss.centering=sinkhorn"), id="sinkhorn"),
    pytest.param(("loss.logit_free=false",), id="stored-logits"),
    pytest.param(("loss.logit_free=false", "loss.centering=sinkhorn"), id="stored-logits-sinkhorn"),
    pytest.param(("head.input_norm=true",), id="input-norm"),
    pytest.param(("model.drop_path=0.0", "optim.clip_grad=0"), id="no-drop-path-no-clipping"),
    pytest.param(("optim.clip=per_tensor", "optim.name=lars"), id="lars-clipped-per-tensor"),
    pytest.param(("optim.accumulate=2", "optim.batch_size=4"), id="micro-batches"),
    *(pytest.param((f"loss.lambda_{name}=0.1",), id=name) for name, loss in LOSSES.items() if loss.optional),
    pytest.param(("model.recompute=selective",), id="selective"),
    pytest.param(("model.recompute=full",), id="full"),
    pytest.param(("model.arch=resnet50",), id="resnet50"),
    pytest.param(("model.arch=timm:vit_small_patch16_dinov3:depth=2:embed_dim=24:num_heads=2",), id="timm-rope"),
    pytest.param(("model.arch=timm:vit_tiny_patch16_224:depth=1:embed_dim=24:num_heads=2",), id="timm-positions"),
    pytest.param(("model.arch=timm:swin_tiny_patch4_window7_224:depths=[1,1,2,1]:embed_dim=24",), id="timm-swin"),
]


def micro_batches(trainer: Trainer, seed: int, nuclei: int) -> list[Views]:
    count = trainer.config.optim.accumulate
    return [toy_views(seed * count + part, nuclei_per_view=nuclei) for part in range(count)]


@needs_library  # the reference ops read values
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_does_not_wait(settings: tuple[str, ...]) -> None:
    """The first step fills caches. Later ones have and lack measurements, nuclei and frozen prototypes."""
    trainer = Trainer(toy("optim.freeze_prototypes_steps=2", *settings), CPU)
    trainer.train_step(*micro_batches(trainer, 0, nuclei=3))
    for seed, (measure, nuclei) in enumerate([(False, 3), (True, 4), (False, 0)], start=1):
        views = micro_batches(trainer, seed, nuclei)
        with NoHostWait():
            trainer.train_step(*views, measure=measure)
    trainer.check()
    assert trainer.step == 4


PLANTS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.item(),
    "bool": lambda x: bool(x > 0),
    "if": lambda x: 1 if x > 0 else 0,
    "int": lambda x: int(x),
    "float": lambda x: float(x),
    "format": lambda x: f"{x:.3f}",
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x[None].nonzero(),
    "where": lambda x: torch.where(x[None] > 0),
    "mask": lambda x: x[None][x[None] > 0],
    "masked-assignment": lambda x: x.clone()[None].__setitem__(x[None] > 0, torch.ones(1)),
    "masked-select": lambda x: torch.masked_select(x, x > 0),
    "unique": lambda x: torch.unique(x),
    "repeat": lambda x: torch.repeat_interleave(x[None].long().clamp(1, 2)),
    "equal": lambda x: torch.equal(x, x),
    "isnan-any": lambda x: bool(torch.isnan(x).any()),
    "max": lambda x: max(x, x + 1),
}


@needs_library
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_wait_is_found(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(toy(), CPU)
    forward = trainer._forward

    def planted(*arguments: Any) -> Any:
        losses, *others = forward(*arguments)
        PLANTS[plant](losses["image"].detach())
        return losses, *others

    monkeypatch.setattr(trainer, "_forward", planted)
    with pytest.raises(HostWaitError), NoHostWait():
        trainer.train_step(toy_views(), measure=False)


@needs_library
def test_a_wait_planted_in_the_backward_is_found() -> None:
    trainer = Trainer(toy(), CPU)
    trainer.student.image_head.mlp[0].weight.register_hook(lambda grad: grad * grad.norm().item())
    with pytest.raises(HostWaitError), NoHostWait():
        trainer.train_step(toy_views(), measure=False)


@pytest.fixture(scope="module")
def roiset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("waits") / "rois"
    with RoiSetWriter(folder, provenance={}) as writer:
        for seed in range(3):
            image, xy, _ = synthetic_image(seed, 160, 0.25)
            writer.add(image, mpp=0.25, xy=xy, slide=f"s{seed}")
    return folder


def run_watched(folder: Path, roiset: Path, watched: set[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretrain for 6 steps with log lines at 3 and 6, and return the steps of the log.

    In the ``watched`` steps, nothing may wait between receiving the views and asking for the next ones.
    """

    def watched_views(*arguments: Any, **options: Any) -> Iterator[Views]:
        for step, views in enumerate(load_views(*arguments, **options), start=1):
            with NoHostWait() if step in watched else nullcontext():
                yield views

    settings = [*TOY, "views.num_locals=1", "optim.steps=6", "train.log_every=3", "train.checkpoint_every=6"]
    monkeypatch.setattr("muse_fast.pretraining.run.load_views", watched_views)
    config = load_config(
        None, [*settings, "train.eval_every=0", "train.eval_rois=2", f"data.roiset={roiset}", "data.workers=0"]
    )
    assert pretrain(config, folder) == 0
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


@needs_library
def test_the_loop_does_not_wait_between_log_lines(
    roiset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_watched(tmp_path / "run", roiset, {2, 4, 5}, monkeypatch) == [0, 3, 6, 6]
    with pytest.raises(HostWaitError):  # a log line does wait
        run_watched(tmp_path / "log", roiset, {3}, monkeypatch)


@needs_library
def test_a_wait_planted_in_the_loop_is_found(roiset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = Trainer.train_step

    def planted(trainer: Trainer, *views: Views, measure: bool) -> Metrics:
        values = train_step(trainer, *views, measure=True)
        trainer.step += 0 * int(values["loss"])
        return values

    monkeypatch.setattr(Trainer, "train_step", planted)
    with pytest.raises(HostWaitError):
        run_watched(tmp_path / "run", roiset, {4}, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_does_not_wait_for_a_gpu(settings: tuple[str, ...], precision: str) -> None:
    """CUDA itself refuses to wait."""
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = Trainer(toy(f"train.precision={precision}", *settings), device)
    batches = [[views.pin_memory() for views in micro_batches(trainer, seed, nuclei=3)] for seed in range(4)]
    for views in batches[:2]:
        trainer.train_step(*views)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for views, measure in zip(batches[2:], (False, True), strict=True):
            trainer.train_step(*views, measure=measure)
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device=device).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.check()
