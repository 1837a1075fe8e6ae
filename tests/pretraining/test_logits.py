"""``loss.logit_free=auto``: the rule, its estimate of memory, and that a run keeps what it began with."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.step.timing import rows_per_roi, synthetic_views
from muse_fast import pretrain
from muse_fast.config import load_config
from muse_fast.ops import backends
from muse_fast.pretraining import logits, run
from muse_fast.pretraining.trainer import Trainer
from muse_fast.runtime import checkpoint
from tests.pretraining.test_trainer import changed, snapshot, toy, toy_views
from torture.toy import PRETRAIN, prepare

pytestmark = pytest.mark.usefixtures("thin")
CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(backends.library_error() is not None, reason=str(backends.library_error()))


@needs_library
@pytest.mark.parametrize(
    ("settings", "device", "logit_free", "reason"),
    [
        ([], "cpu", False, "this is faster on a CPU and takes about 0 MiB of the"),
        (["head.prototypes=65536", "optim.batch_size=128"], "cpu", False, "takes about 1390 MiB"),
        (["head.prototypes=65536", "optim.batch_size=256"], "cpu", True, "take about 2781 MiB .* at most a tenth"),
        (["head.prototypes=65536", "optim.batch_size=256", "optim.accumulate=2"], "cpu", False, "about 1390 MiB"),
        (["train.precision=bf16"], "cpu", True, "round"),
        (["train.precision=fp64"], "cpu", True, "C\\+\\+"),
        ([], "cuda", True, "GPU"),
        (["loss.logit_free=true"], "cpu", True, "^$"),
        (["loss.logit_free=false"], "cuda", False, "^$"),
        (["loss.logit_free=false", "train.precision=bf16"], "cpu", False, "^$"),
    ],
)
def test_the_rule(
    settings: list[str], device: str, logit_free: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "available_memory", lambda: 2**40)
    choice = logits.choose(toy(*settings), torch.device(device))
    assert choice.logit_free is logit_free
    assert re.search(reason, choice.reason)


def test_without_the_cpp_op_nothing_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, "dino_loss=reference")
    assert logits.choose(toy(), CPU).logit_free


@needs_library
@pytest.mark.parametrize(("ranks", "room", "logit_free"), [(1, 1.01, False), (1, 0.99, True), (2, 1.5, True)])
def test_logits_that_need_more_than_a_quarter_of_the_memory_are_not_stored(
    ranks: int, room: float, logit_free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy()
    monkeypatch.setattr(logits, "available_memory", lambda: int(4 * room * logits.logit_bytes(config)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert logits.choose(config, CPU).logit_free is logit_free


@pytest.mark.parametrize("settings", [[], ["views.num_locals=0"], ["views.global_size=512", "views.local_size=208"]])
def test_the_estimate_fits_views_of_dense_tissue(settings: list[str]) -> None:
    """`bench step` draws such views; student logits and their gradient, and teacher logits, of both heads."""
    config = load_config(None, ["optim.batch_size=8", "head.prototypes=100", *settings])
    views = synthetic_views(config)
    student, teacher = rows_per_roi(views)
    rows = 2 * (student + config.views.num_globals + config.views.num_locals) + teacher + config.views.num_globals
    assert logits.logit_bytes(config) == pytest.approx(4 * 100 * 8 * rows, rel=0.1)
    parts = load_config(None, ["optim.batch_size=8", "head.prototypes=100", "optim.accumulate=4", *settings])
    assert logits.logit_bytes(parts) == pytest.approx(logits.logit_bytes(config) / 4, abs=1)


@needs_library
def test_auto_has_the_bits_of_its_choice() -> None:
    runs = [Trainer(toy(*settings), CPU) for settings in ([], ["loss.logit_free=false"], ["loss.logit_free=true"])]
    for trainer in runs:
        trainer.train_step(toy_views())
    auto, stored, free = map(snapshot, runs)
    assert not changed(auto, stored) and changed(auto, free)


@needs_library
@pytest.mark.parametrize("began", ["unrecorded", "auto"])
def test_a_run_keeps_the_form_in_which_it_began(began: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine where a new run would choose the other one, and if it began before the choice was recorded."""
    first = Trainer(toy(*([] if began == "auto" else ["loss.logit_free=true"])), CPU)
    first.train_step(toy_views(0))
    folder = first.save(tmp_path)
    logit_free = began == "unrecorded"
    assert checkpoint.read_state(folder)["config"]["loss"]["logit_free"] is logit_free
    if logit_free:
        forget(folder)
    else:
        monkeypatch.setattr(logits, "available_memory", lambda: 0)
    second = Trainer(toy(), CPU)
    assert second.config.loss.logit_free is not logit_free
    second.load(folder)
    assert second.config.loss.logit_free is logit_free
    for trainer in (first, second):
        trainer.train_step(toy_views(1))
    assert not changed(snapshot(first), snapshot(second))


def forget(folder: Path) -> None:
    """Remove the setting from a checkpoint, as one from before it existed."""
    state = checkpoint.read_state(folder)
    del state["config"]["loss"]["logit_free"]
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    content = (folder / checkpoint.STATE).read_bytes()
    manifest[checkpoint.STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@needs_library
def test_a_setting_by_hand_wins_over_the_record(tmp_path: Path) -> None:
    folder = Trainer(toy(), CPU).save(tmp_path)
    other = Trainer(toy("loss.logit_free=true"), CPU)
    other.load(folder)
    assert other.config.loss.logit_free is True
    assert checkpoint.read_state(other.save(tmp_path / "b"))["config"]["loss"]["logit_free"] is True


@needs_library
def test_the_command_says_and_records_the_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace, out = prepare(tmp_path, nuclei=(None,) * 2), tmp_path / "run"

    def only_save(trainer: Trainer, *_: Any) -> int:
        trainer.save(out)
        return 0

    monkeypatch.setattr(run, "_run", only_save)
    for memory, said in (
        (2**40, r"loss   logits stored \(loss.logit_free=auto\): this is faster"),
        (0, r"logits stored \(loss.logit_free=auto\): as the run began"),
    ):
        monkeypatch.setattr(logits, "available_memory", lambda memory=memory: memory)
        assert pretrain.main(PRETRAIN.arguments(workplace, out)) == 0
        assert re.search(said, capsys.readouterr().out)
        assert load_config(out / "config.yaml").loss.logit_free is False
