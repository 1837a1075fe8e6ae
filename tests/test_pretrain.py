"""The pretrain command as users run it: killed, stopped, with bad data, and twice."""

import gc
import json
import random
import signal
from pathlib import Path

import pytest
import torch

from muse_fast.batch import Views
from muse_fast.config import load_config
from muse_fast.errors import UserError
from muse_fast.pretrain import main
from muse_fast.pretraining.flops import step_flops
from muse_fast.pretraining.trainer import Trainer
from muse_fast.runtime import checkpoint, exit_codes
from muse_fast.runtime.cli import run as run_command
from muse_fast.training.report import Metrics, read_metrics
from tests.support.toy_runs import with_nan
from torture import paced
from torture.processes import Child
from torture.toy import ARCH, PRETRAIN, log_of, losses, prepare, wait_for_step

arguments = PRETRAIN.arguments

pytestmark = pytest.mark.usefixtures("without_pictures")  # but those of `unbroken`, which starts earlier


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("pretrain"))


def start(workplace: Path, out: Path, *overrides: str) -> Child:
    return Child(paced.main, ["pretrain", *arguments(workplace, out, *overrides)], log=log_of(out))


def crash_at_step(step: int, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command in this process until ``step`` begins, then crash."""
    train_step = Trainer.train_step

    def crashing(trainer: Trainer, *views: Views, measure: bool) -> Metrics:
        if trainer.step == step:
            raise SystemExit("crash")
        return train_step(trainer, *views, measure=measure)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", crashing)
        with pytest.raises(SystemExit, match="crash"):
            main(argv)


@pytest.fixture(scope="module")
def unbroken(workplace: Path) -> Path:
    out = workplace / "unbroken"
    torch.set_num_threads(1)
    assert main(arguments(workplace, out)) == 0
    return out


def test_a_run_writes_its_results(unbroken: Path) -> None:
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["losses_finite"] and summary["rois_per_second"] > 0
    for figure in ("retrieval_at_1", "neighbours_in_other_rois"):
        assert set(summary[figure]) == {"before", "after"} and all(0 <= v <= 1 for v in summary[figure].values())
    assert set(summary["pictures"]) == {"contact_sheet", "pca", "retrieval", "region"}
    assert all(0 <= v <= 1.0001 for v in summary["mean_entropy_share_of_ln_k"].values())
    for picture in summary["pictures"].values():
        assert Path(picture).stat().st_size > 10_000
    assert checkpoint.steps(unbroken) == [10, 12]
    steps = [row["step"] for row in read_metrics(unbroken / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12]
    assert list((unbroken / "tensorboard").iterdir())


def test_the_run_loads_as_a_backbone(unbroken: Path) -> None:
    from muse_fast import load_backbone

    backbone = load_backbone(ARCH, weights=unbroken)
    images, xy = torch.randn(2, 3, 64, 64), torch.tensor([[3.0, 4.0], [60.0, 10.0], [5.0, 5.0]])
    assert backbone.nucleus_features(images, xy, torch.tensor([0, 0, 1])).shape == (3, 32)


def test_a_run_killed_twice_ends_with_the_same_losses(workplace: Path, unbroken: Path) -> None:
    rng = random.Random(0)
    out = workplace / "killed"
    for low in (2, 6):
        with start(workplace, out) as process:
            wait_for_step(out, rng.randint(low, low + 2), process)
            process.kill()
    with start(workplace, out) as process:
        assert process.wait() == 0, process.output()
    assert losses(out) == losses(unbroken)
    for stem in ("student", "teacher", "optimizer", "state"):
        ours = checkpoint.read_tensors(checkpoint.folder_of(out, 12), stem)
        theirs = checkpoint.read_tensors(checkpoint.folder_of(unbroken, 12), stem)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_workers_do_not_change_the_numbers(workplace: Path, unbroken: Path) -> None:
    out = workplace / "workers"
    assert main(arguments(workplace, out, "data.workers=2", "optim.steps=12")) == 0
    assert losses(out) == losses(unbroken)


def test_views_by_dali_have_the_same_pairs_and_nearly_the_same_loss(workplace: Path, unbroken: Path) -> None:
    pytest.importorskip("nvidia.dali")
    out = workplace / "dali"
    assert main(arguments(workplace, out, "data.backend=dali", "optim.steps=3")) == 0
    dali, cpu = ([row for row in read_metrics(f / "metrics.jsonl") if "loss" in row][:3] for f in (out, unbroken))
    assert [row["pairs_per_roi"] for row in dali] == [row["pairs_per_roi"] for row in cpu]
    assert dali[0]["loss"] != cpu[0]["loss"]
    assert dali[0]["loss"] == pytest.approx(cpu[0]["loss"], rel=0.01)


def test_sigterm_saves_and_exits_with_a_known_code(workplace: Path, unbroken: Path) -> None:
    out = workplace / "terminated"
    with start(workplace, out, "train.checkpoint_every=1000") as process:
        wait_for_step(out, 3, process)
        process.signal(signal.SIGTERM)
        assert process.wait() == exit_codes.STOPPED, process.output()
    written = json.loads((out / "exit.json").read_text())
    assert written["code"] == exit_codes.STOPPED and written["reason"] == "SIGTERM"
    assert checkpoint.steps(out) == [written["step"]]
    assert main(arguments(workplace, out)) == 0
    assert losses(out) == losses(unbroken)
    assert not (out / "exit.json").exists()


def test_a_damaged_checkpoint_is_named_and_skipped(
    workplace: Path, unbroken: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = workplace / "damaged"
    crash_at_step(7, arguments(workplace, out), monkeypatch)
    newest = checkpoint.folder_of(out, checkpoint.steps(out)[-1]) / "student.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert main(arguments(workplace, out)) == 0
    assert f"skipped: {newest}" in capsys.readouterr().out
    assert losses(out) == losses(unbroken)


def test_non_finite_stops_with_the_roi_ids_and_clean_checkpoints(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = workplace / "nan"
    step = Trainer.train_step

    def poisoned(trainer: Trainer, *views: Views, measure: bool) -> Metrics:
        if trainer.step == 4:
            views = (with_nan(views[0]), *views[1:])
        return step(trainer, *views, measure=measure)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    assert main(arguments(workplace, out)) == exit_codes.NON_FINITE
    report = json.loads((out / "non_finite_step_5.json").read_text())
    assert len(report["roi_ids"]) == 2 and "image loss" in report["error"]
    found, problems = checkpoint.latest(out)
    assert found == checkpoint.folder_of(out, 4) and not problems
    assert all(torch.isfinite(t).all() for t in checkpoint.read_tensors(found, "student").values())


def expect_error(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    assert run_command(main, argv) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_refusals(workplace: Path, unbroken: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    expect_error(capsys, arguments(workplace, unbroken), "finished run")
    expect_error(capsys, arguments(workplace, tmp_path / "a", "optim.lrr=1"), "did you mean 'optim.lr'?")
    expect_error(capsys, arguments(workplace, tmp_path / "a", "data.split=tran"), "tran")
    expect_error(capsys, arguments(workplace, tmp_path / "a", "views.global_size=512"), "too small")
    expect_error(capsys, ["--config", str(workplace / "toy.yaml"), "--out", str(tmp_path / "a")], "data.roiset")
    expect_error(capsys, arguments(workplace, tmp_path / "a", f"data.roiset={tmp_path / 'none'}"), "none")
    said = "data.backend=cuda: it runs only on CUDA GPUs, and the run is on cpu"
    expect_error(capsys, arguments(workplace, tmp_path / "a", "data.backend=cuda", "train.device=cpu"), said)
    assert not (tmp_path / "a").exists()


def test_other_settings_do_not_continue_a_run(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = workplace / "other"
    crash_at_step(3, arguments(workplace, out), monkeypatch)
    expect_error(capsys, arguments(workplace, out, "optim.lr=0.5"), "optim.lr=0.5 (was 0.001)")
    expect_error(capsys, [*arguments(workplace, out), "--resume", "never"], "contains checkpoints")


def test_a_warm_up_in_epochs_is_recorded_in_steps(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of five ROIs in batches of two are five steps; the same command continues the run."""
    out = workplace / "epochs"
    argv = arguments(workplace, out, "loss.teacher_temp_epochs=2", "optim.steps=4", "train.eval_every=0")
    crash_at_step(3, argv, monkeypatch)
    assert main(argv) == 0
    recorded = load_config(out / "config.yaml").loss
    assert (recorded.teacher_temp_steps, recorded.teacher_temp_epochs) == (5, None)
    temps = [row["teacher_temp"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert temps == pytest.approx([0.04, 0.042, 0.044, 0.046])


def test_after_a_crash_before_the_first_checkpoint_the_run_starts_over_with_one_row_per_measurement(
    workplace: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = workplace / "early"
    crash_at_step(1, arguments(workplace, out), monkeypatch)
    assert not checkpoint.steps(out)
    assert main(arguments(workplace, out)) == 0
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl")]
    assert steps == [row["step"] for row in read_metrics(unbroken / "metrics.jsonl")]
    assert losses(out) == losses(unbroken)


def test_a_run_can_start_from_the_checkpoint_of_another(workplace: Path, unbroken: Path) -> None:
    out = workplace / "continued"
    origin = checkpoint.folder_of(unbroken, 10)
    assert main([*arguments(workplace, out), "--resume", str(origin)]) == 0
    assert losses(out) == losses(unbroken)[10:]
    assert (out / "pictures" / "contact_sheet.png").exists()


def test_a_run_with_larger_views_starts_from_another(
    workplace: Path, unbroken: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start from a run folder or a checkpoint; after a kill, the run resumes from its own checkpoints."""
    larger = ["views.global_size=96", "optim.steps=4", f"model.init={unbroken}"]
    out, broken, other = workplace / "larger", workplace / "larger-broken", workplace / "larger-other"
    assert main(arguments(workplace, out, *larger)) == 0
    assert f"from   {unbroken}\n         loaded: backbone.encoder (" in capsys.readouterr().out
    record = json.loads((out / "init.json").read_text())
    assert (record["init"], record["new"]) == (str(unbroken), [])
    assert "nucleus_head.prototypes_v" in record["loaded"]
    assert record["resized"] == ["backbone.encoder.encoder.pos_embed"]
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]

    newest = checkpoint.folder_of(unbroken, 12)
    crash_at_step(3, arguments(workplace, broken, *larger[:2], f"model.init={newest}"), monkeypatch)
    assert main(arguments(workplace, broken, *larger)) == 0
    assert losses(broken) == losses(out)
    assert main(arguments(workplace, other, *larger[:2])) == 0
    assert losses(other)[0] != losses(out)[0]


def test_refused_starts(workplace: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = workplace / "refused"
    for settings, said in (
        ([f"model.init={workplace / 'nowhere'}"], f"model.init={workplace / 'nowhere'}: no such file or folder"),
        (["optim.freeze_encoder=1"], "optim.freeze_encoder=1: expected 0 for a run without model.init"),
        ([f"model.init={unbroken}", "head.prototypes=32"], "head.prototypes=16 (here 32)"),
        ([f"model.init={unbroken}", "model.arch=vit_small"], f"model.arch={ARCH} (here vit_small)"),
    ):
        expect_error(capsys, arguments(workplace, out, *settings), said)
    assert not out.exists()


def test_a_run_in_micro_batches(workplace: Path) -> None:
    out = workplace / "micro"
    assert main(arguments(workplace, out, "optim.accumulate=2", "optim.steps=3")) == 0
    assert [step for step, _ in losses(out)] == [1, 2, 3]
    with pytest.raises(UserError, match=r"optim\.batch_size=2: expected a multiple of 1 ranks x 3 micro-batches"):
        main(arguments(workplace, workplace / "uneven", "optim.accumulate=3", "optim.steps=3"))


def test_every_row_has_speed_waits_and_memory(unbroken: Path) -> None:
    rows = [row for row in read_metrics(unbroken / "metrics.jsonl") if "loss" in row]
    for row in rows:
        assert row["rois_per_second"] > 0 and 0 <= row["data_wait"] <= 1 and row["peak_memory_gib"] > 0.05
        assert "mfu" not in row  # the peak of a CPU is not known
    assert json.loads((unbroken / "summary.json").read_text())["peak_memory_gib"] == max(
        row["peak_memory_gib"] for row in rows
    )


def test_mfu_is_the_flops_of_a_row_over_the_peak(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a peak of 1 FLOP/s, the MFU is the FLOPs per ROI times the ROIs per second."""
    out, seen = workplace / "mfu", []
    train_step = Trainer.train_step

    def counting(trainer: Trainer, *views: Views, measure: bool) -> Metrics:
        offsets = views[0].nuclei.offsets
        images = 2 * views[0].num_rois  # two global views per ROI
        seen.append((int(offsets[-1]) / 2, int(offsets[images]) / 2))
        return train_step(trainer, *views, measure=measure)

    monkeypatch.setattr(Trainer, "train_step", counting)
    monkeypatch.setattr("muse_fast.training.loop.peak_flops", lambda device: 1.0)
    assert main(arguments(workplace, out, "optim.steps=3")) == 0
    config = load_config(workplace / "toy.yaml")
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    for row, per_roi in zip(rows, seen, strict=True):
        assert row["mfu"] == pytest.approx(step_flops(config, per_roi) * row["rois_per_second"])
    assert json.loads((out / "summary.json").read_text())["mfu"] == pytest.approx(sum(r["mfu"] for r in rows) / 3)


def test_the_garbage_collector_is_off_during_steps(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled = []
    train_step = Trainer.train_step

    def watched(trainer: Trainer, *views: Views, measure: bool) -> Metrics:
        enabled.append(gc.isenabled())
        if trainer.step == 2:
            raise KeyboardInterrupt
        return train_step(trainer, *views, measure=measure)

    monkeypatch.setattr(Trainer, "train_step", watched)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(workplace, workplace / "collected"))
    assert enabled == [False] * 3 and gc.isenabled() and gc.get_freeze_count() == 0
