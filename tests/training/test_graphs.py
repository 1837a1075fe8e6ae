"""CUDA graphs: a step that replays them gives the same bits as one that does not. Here recordings run their work again;
``bench plan`` replays what torch records on a stand-in for a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from muse_fast.batch import Views
from muse_fast.errors import UserError
from muse_fast.pretraining.trainer import Trainer
from muse_fast.training import graphs
from muse_fast.training.graphs import Choice, Graphed
from tests.pretraining.test_trainer import CPU, toy, toy_views
from tests.support.repeated import Repeater, repeated_graphs

CASES = {
    "recipe": ((), 20),
    "micro-batches": (("optim.accumulate=3", "optim.batch_size=6", "optim.clip=per_tensor"), 4),
    "selective": (("model.recompute=selective", "train.precision=bf16"), 4),
    "recomputed": (("model.recompute=full", "loss.centering=sinkhorn"), 4),
    "bf16": (("train.precision=bf16", "loss.lambda_koleo=0.1", "loss.logit_free=true"), 4),
    "input norm": (("head.input_norm=true", "optim.name=lars", "model.drop_path=0"), 4),
    "frozen encoder": (("optim.freeze_encoder=4", "model.decoder_dim=16"), 9),
    "BatchNorm": (("model.arch=resnet50",), 4),
    "timm, packed": (("model.arch=timm:vit_tiny_patch16_224:embed_dim=24:depth=4:num_heads=2",), 4),
    "timm, maps": (("model.arch=timm:resnet10t", "head.prototypes=8"), 4),
}


def run(settings: tuple[str, ...], steps: int, on: bool, views: Callable[[int], Views]) -> tuple[list[Tensor], Trainer]:
    """Train; return all measurements and the state that the next step depends on."""
    config = toy(*settings, f"train.cuda_graph={on}".lower())
    with repeated_graphs():
        trainer = Trainer(config, CPU)
    found: list[Any] = []
    for step in range(steps):
        batches = [views(step * config.optim.accumulate + number) for number in range(config.optim.accumulate)]
        found += trainer.train_step(*batches).values()
    state = [*trainer.student.state_dict().values(), *trainer.teacher.state_dict().values(), *trainer.centers.values()]
    return [torch.as_tensor(value) for value in found] + state, trainer


def compare(settings: tuple[str, ...], steps: int, views: Callable[[int], Views] = toy_views) -> Trainer:
    (expected, _), (got, trainer) = (run(settings, steps, on, views) for on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    return trainer


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("name", CASES)
def test_steps_are_bit_identical(name: str) -> None:
    trainer = compare(*CASES[name], lambda number: toy_views(number, nuclei_per_view=3 + number % 4))
    for network in (trainer.student, trainer.teacher):
        assert network.graphed is not None
        assert network.graphed.is_recorded


@pytest.mark.usefixtures("thin")
def test_a_batch_of_another_size_runs_as_usual_between_replays() -> None:
    trainer = compare((), 6, lambda step: toy_views(step, num_rois=1 if step == 3 else 2))
    assert trainer.student.graphed is not None
    assert trainer.student.graphed.is_recorded


@pytest.mark.usefixtures("thin")
def test_a_batch_without_nuclei() -> None:
    compare((), 5, lambda step: toy_views(step, nuclei_per_view=0 if step == 3 else 2))


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_nothing_of_a_steps_autograd_graph_outlives_it(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes of parameters belong to the stream on which they were made, so a recording must not meet older ones."""
    trainer = Trainer(toy(f"model.recompute={recompute}", "loss.lambda_koleo=0.1"), CPU)
    parameters, forward = list(trainer.student.parameters()), trainer._forward

    def marking(*arguments: Any) -> Any:
        results = forward(*arguments)
        for parameter in parameters:
            get_gradient_edge(parameter).node.metadata["old"] = True
        assert all("old" in get_gradient_edge(parameter).node.metadata for parameter in parameters)
        return results

    monkeypatch.setattr(trainer, "_forward", marking)
    gc.collect()
    gc.disable()
    try:
        trainer.train_step(toy_views())
        assert not any("old" in get_gradient_edge(parameter).node.metadata for parameter in parameters)
    finally:
        gc.enable()


class Weighted(nn.Module):
    """A weight that is also a result, and a sum of what it makes of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.unused = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.entered = 0

    def forward(self, rows: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        self.entered += 1
        self.calls += 1
        scaled = rows if scale is None else rows * scale
        return scaled @ self.weight, self.weight.view(2), rows.sum()


def test_gradients_buffers_and_results_of_a_function() -> None:
    module, plain = Weighted(), Weighted()
    graphed = Graphed(module, module, Repeater())
    for call in range(5):
        rows, scale = torch.arange(6.0).view(3, 2) + call, torch.tensor([1.0, call])
        for function, of in ((graphed, module), (plain, plain)):
            made, weight, total = function(rows, scale)
            assert not total.requires_grad
            ((made**2).sum() + (weight * made.sum().detach()).sum()).backward()
            assert of.unused.grad is None
        assert module.weight.grad is not None
        assert torch.equal(module.weight.grad, plain.weight.grad)  # summed over the calls so far
        assert module.calls == plain.calls == call + 1
    module.weight.grad = None
    (graphed(torch.ones(3, 2), torch.ones(2))[0]).sum().backward()
    assert module.weight.grad.tolist() == [3.0, 3.0]


def test_what_is_recorded_and_when() -> None:
    module, recorder = Weighted(), Repeater()
    graphed = Graphed(module, module, recorder, after=2)
    rows = torch.ones(3, 2)
    for _ in range(2):
        graphed(rows, None)
    assert recorder.recorded == 0
    graphed(rows, None)
    assert recorder.recorded == 2  # forward and backward
    with torch.no_grad():
        graphed(rows, None)
    graphed(torch.ones(4, 2), None)
    graphed(rows, torch.ones(2))
    assert recorder.recorded == 2
    graphed.reset()
    assert not graphed.is_recorded
    with torch.no_grad():
        for _ in range(3):
            graphed(rows, None)
    assert recorder.recorded == 3


class Refusing(Repeater):
    def record(self, work: graphs.Work) -> tuple[list[Tensor], Callable[[], None]]:
        work()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


def test_a_recording_that_fails_leaves_everything_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    module = Weighted()
    graphed = Graphed(module, module, Refusing())
    for call in range(1, 4):
        assert graphed(torch.ones(3, 2), None)[0].tolist() == [5.0] * 3
        assert module.calls == call
    said = "  note   CUDA graphs off: recording failed (CUDA error: operation not permitted when stream is capturing)\n"
    assert capsys.readouterr().out == said


def test_a_recording_that_is_required_and_fails_is_an_error() -> None:
    module = Weighted()
    graphed = Graphed(module, module, Refusing(), required=True)
    graphed(torch.ones(3, 2), None)
    with pytest.raises(UserError, match=r"train\.cuda_graph=true: recording failed \(CUDA error: operation not permi"):
        graphed(torch.ones(3, 2), None)


def test_where_they_run() -> None:
    gpu = torch.device("cuda")
    assert graphs.choose("auto", CPU) == Choice(False, False, "they need a CUDA GPU, and the run is on cpu")
    assert graphs.choose(False, gpu) == Choice(False, False)
    assert graphs.choose("auto", gpu) == Choice(True, False)
    assert graphs.choose(True, gpu) == Choice(True, True)
    with pytest.raises(UserError, match=r"train\.cuda_graph=true cannot run: they need a CUDA GPU"):
        graphs.choose(True, CPU)
    with mock.patch.object(graphs, "world_size", return_value=2):
        assert "2 ranks exchange BatchNorm's statistics" in graphs.choose("auto", gpu).reason
        with pytest.raises(UserError, match="2 ranks exchange"):
            graphs.choose(True, gpu)
