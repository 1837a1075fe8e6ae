"""The guard against values that are not finite: on the device, permanent, and naming the first bad step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from muse_fast.pretraining.trainer import Trainer
from muse_fast.training.guard import Guard, NonFiniteError
from tests.pretraining.test_trainer import changed, poison_gradient, snapshot, toy, toy_views
from tests.support.ranks import NoHostWait

pytestmark = pytest.mark.usefixtures("thin")
CPU = torch.device("cpu")


def look(guard: Guard, step: int, *terms: float) -> float:
    """Let it see a step; returns its verdict on all so far, 1 if one was bad."""
    with NoHostWait():
        guard.look(step, [torch.tensor(term) for term in terms], [(torch.tensor([step * 10]), torch.tensor([step]))])
    return guard.found_inf.item()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_is_recorded_and_stops_all_later_ones(bad: float) -> None:
    guard = Guard(["image loss", "nucleus loss", "gradient norm"], CPU)
    assert look(guard, 1, 1.0, 2.0, 3.0) == 0
    guard.check()
    assert look(guard, 2, 4.0, bad, 5.0) == 1
    assert look(guard, 3, 1.0, 2.0, 3.0) == 1  # permanently
    assert look(guard, 4, bad, bad, bad) == 1
    with pytest.raises(NonFiniteError, match=r"step 2: nucleus loss not finite \(image loss 4, nucleus loss") as raised:
        guard.check()
    assert (raised.value.step, raised.value.roi_ids, raised.value.epochs) == (2, [20], [2])


def test_all_bad_terms_are_named() -> None:
    guard = Guard(["image loss", "nucleus loss", "gradient norm"], CPU)
    look(guard, 7, math.nan, 1.0, math.inf)
    with pytest.raises(NonFiniteError, match="step 7: image loss and gradient norm not finite"):
        guard.check()


def test_large_values_are_finite() -> None:
    guard = Guard(["gradient norm"], CPU)
    assert look(guard, 1, torch.finfo(torch.float32).max) == 0
    guard.look(2, [torch.tensor(1e300, dtype=torch.float64)], [(torch.tensor([0]), torch.tensor([0]))])
    guard.check()


def test_memory_of_loader_processes_is_not_kept() -> None:
    """A kept tensor of theirs is an open file; with log_every=1000 there would be more than a process may open."""
    guard = Guard(["gradient norm"], CPU)
    shared = torch.tensor([3]).share_memory_(), torch.tensor([0]).share_memory_()
    guard.look(1, [torch.tensor(math.nan)], [shared, shared])
    assert not any(tensor.is_shared() for pair in guard._seen[1] for tensor in pair)
    with pytest.raises(NonFiniteError) as raised:
        guard.check()
    assert (raised.value.roi_ids, raised.value.epochs) == ([3, 3], [0, 0])


def test_checked_steps_are_forgotten() -> None:
    guard = Guard(["gradient norm"], CPU)
    for step in range(1, 100):
        look(guard, step, 1.0)
        if step % 10 == 0:
            guard.check()
    assert len(guard._seen) == 9


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return weights, centres, and the moments and counters of the optimiser."""
    moments = {f"{n}.{key}": value.clone() for n, p in trainer.student.named_parameters()
               for key, value in trainer.optimizer.state[p].items()}  # fmt: skip
    assert len(moments) >= len(trainer.optimizer.state) > 0
    return {**snapshot(trainer), **moments}


@pytest.mark.parametrize(
    ("bad", "optim"),
    [
        *((bad, ("optim.clip_grad=3.0",)) for bad in ("first image", "second image", "local image", "gradient")),
        *((bad, ("optim.clip_grad=0",)) for bad in ("second image", "gradient")),
        *((bad, ("optim.name=lars", "optim.clip=per_tensor")) for bad in ("first image", "gradient")),
    ],
)
def test_a_bad_micro_batch_changes_nothing(bad: str, optim: tuple[str, ...]) -> None:
    settings = ("optim.accumulate=2", "optim.batch_size=4", "optim.freeze_prototypes_steps=0", *optim)
    trainer = Trainer(toy(*settings), CPU)
    trainer.train_step(toy_views(0), toy_views(1))
    before = state_of(trainer)
    views = [toy_views(2), toy_views(3)]
    views[1].roi_ids.add_(10)
    if bad == "gradient":
        poison_gradient(trainer)
    else:
        micro_batch = views[0 if bad == "first image" else 1]
        (micro_batch.local_images if bad == "local image" else micro_batch.global_images)[0, 0, 0, 0] = math.nan
    trainer.train_step(*views)
    trainer.train_step(toy_views(4), toy_views(5))
    assert not changed(before, state_of(trainer))
    with pytest.raises(NonFiniteError, match="step 2") as raised:
        trainer.check()
    assert raised.value.roi_ids == [10, 11, 20, 21]
    assert "gradient norm" in str(raised.value).split(" not finite")[0]
    assert ("loss" in str(raised.value).split(" not finite")[0]) == (bad != "gradient")


def test_a_state_that_is_not_finite_is_not_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer(toy(), CPU)
    poison_gradient(trainer)
    trainer.train_step(toy_views())
    with pytest.raises(NonFiniteError):
        trainer.save(tmp_path)
    assert not list(tmp_path.iterdir())
