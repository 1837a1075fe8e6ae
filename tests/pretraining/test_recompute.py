"""Recomputing or compiling gives the same gradients; recomputing uses less memory."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from muse_fast.config import RECOMPUTE
from muse_fast.models.backbone import build_backbone
from muse_fast.models.vit import kept
from muse_fast.pretraining.drop_path import draw_scales
from muse_fast.pretraining.trainer import Trainer
from muse_fast.training.report import read_back
from tests.pretraining.test_trainer import toy, toy_views


class Stored(TorchDispatchMode):
    """Counts the bytes of tensors created inside that are still alive, which a backward keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in inputs:
                self.made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def learn(recompute: str) -> tuple[list[Tensor], int]:
    """Return outputs and gradients of an encoder with drop path, and the bytes its backward keeps."""
    torch.manual_seed(0)
    model = build_backbone("vit_tiny", drop_path=0.3, image_size=96, recompute=recompute).train()
    images = [torch.randn(2, 3, 96, 96).requires_grad_(), torch.randn(3, 3, 64, 64)]
    scales = draw_scales(model.encoder.drop_rates, 0, 0, 1, 5).flatten(1)
    with Stored() as stored:
        cls, tokens = model.encoder(images, scales)
    kept = stored.bytes()
    sum((tap * torch.linspace(-1, 1, tap.numel()).view_as(tap)).sum() for tap in tokens.taps).backward()
    return [cls.detach(), images[0].grad, *(p.grad for p in model.encoder.parameters())], kept


def test_attention_of_any_kind_is_stored_by_selective_recomputation() -> None:
    importlib.import_module("torch.nn.attention.varlen")  # registers its operation

    stored = [str(op) for op in kept()]
    assert "torch_attn._varlen_attn.default" in stored
    assert sum("attention" in op or "attn" in op for op in stored) == 5


def test_gradients_are_bit_identical_and_memory_is_less() -> None:
    results = {recompute: learn(recompute) for recompute in RECOMPUTE}
    expected, bytes_of_none = results["none"]
    for recompute in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(results[recompute][0], expected, strict=True))
    assert results["selective"][1] < 0.7 * bytes_of_none
    assert results["full"][1] < 0.1 * bytes_of_none


def test_nothing_is_recomputed_without_gradients() -> None:
    model, images = build_backbone("vit_tiny", image_size=96, recompute="full"), torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        features = model.cls(images)
    assert torch.equal(features, model.cls(images).detach())


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_training_is_the_same(recompute: str) -> None:
    runs = [Trainer(toy(f"model.recompute={r}"), torch.device("cpu")) for r in ("none", recompute)]
    steps = [[read_back(trainer.train_step(toy_views(seed))) for seed in range(2)] for trainer in runs]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("recompute", "backend"),
    [
        ("selective", "aot_eager"),  # the same graphs, whose operations run as they are
        *(pytest.param(name, "inductor", marks=pytest.mark.heavy) for name in RECOMPUTE),
    ],
)
def test_compiled_layers_train_alike(recompute: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    counters.clear()
    settings = [f"model.recompute={recompute}"]
    eager, compiled = (Trainer(toy(*settings, *more), torch.device("cpu")) for more in ((), ("train.compile=true",)))
    for seed in range(3):
        expected, got = (read_back(trainer.train_step(toy_views(seed))) for trainer in (eager, compiled))
        for name in ("loss", "loss_image", "loss_nucleus", "grad_norm"):
            assert got[name] == pytest.approx(expected[name], rel=1e-4), (seed, name)
    # Of student and teacher, one for layers that add a branch first, one for those after a tapped layer. If all of a
    # student's layer is computed again, its sum is stored, and no layer of the student adds a branch first.
    assert counters["stats"]["unique_graphs"] == (3 if recompute == "full" else 4)
    assert not counters["graph_break"]
