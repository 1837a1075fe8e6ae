"""The finetune command as users run it, its training step, and the scores of its detectors."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from muse_fast.detection import memory
from muse_fast.detection import targets as targets_of_proposals
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detector import load_detector
from muse_fast.detection.finetuner import Finetuner
from muse_fast.detection.run import new_detector
from muse_fast.detection.samples import ANNOTATED, LfovBatch, LfovDataset, known_nuclei, read_labelled
from muse_fast.detection.score_detector import detect_images
from muse_fast.detection.targets import Targets, assign, proposal_places
from muse_fast.errors import UserError
from muse_fast.evaluate import main as evaluate_main
from muse_fast.finetune import main
from muse_fast.images.imagenet import normalise
from muse_fast.images.points_csv import read_points
from muse_fast.images.synthetic import synthetic_image
from muse_fast.predict import main as predict
from muse_fast.roiset.roiset import RoiSetWriter
from muse_fast.runtime import checkpoint, exit_codes
from muse_fast.runtime.cli import run as run_command
from muse_fast.runtime.options import load_settings
from muse_fast.scoring.scores import evaluate
from muse_fast.sources import open_source
from muse_fast.training.report import read_metrics

TOY = """
data: {sample_size: 64, workers: 0}
detector: {hidden_dim: 16}
loss: {confidence: 0.3}
optim: {epochs: 3, batch_size: 3}
train: {precision: fp32, log_every: 1}
"""
SOURCE = ["--data", "synthetic:7", "source.size=96"]
CLASSES = ("lymphocyte", "tumour", "stromal")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "toy.yaml").write_text(TOY)
    return folder


def arguments(workplace: Path, out: Path, *overrides: str) -> list[str]:
    return [
        "--config",
        str(workplace / "toy.yaml"),
        *SOURCE,
        "--weights",
        "random:vit_tiny",
        "--out",
        str(out),
        *overrides,
    ]


def interrupt_at_step(
    step: int, argv: list[str], monkeypatch: pytest.MonkeyPatch, how: type[BaseException] = SystemExit
) -> None:
    """Run the command until ``step`` begins, then crash."""
    train_step = Finetuner.train_step

    def crashing(tuner: Finetuner, batch: LfovBatch, *, measure: bool) -> Mapping[str, Any]:
        if tuner.step == step:
            raise how("crash")
        return train_step(tuner, batch, measure=measure)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "train_step", crashing)
        with pytest.raises(how, match="crash"):
            main(argv)


def rows(out: Path) -> list[dict[str, Any]]:
    varying = ("images_per_second", "data_wait", "peak_memory_gib")
    return [{k: v for k, v in row.items() if k not in varying} for row in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def unbroken(workplace: Path) -> Path:
    out = workplace / "unbroken"
    assert main(arguments(workplace, out)) == 0
    return out


def test_a_run_writes_its_results(unbroken: Path) -> None:
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["steps"] == 5 and summary["losses_finite"] and set(summary["val"]) >= {"ocelot", "max-matching"}
    assert Path(summary["picture"]).stat().st_size > 5_000
    assert [row["step"] for row in rows(unbroken)] == [1, 2, 2, 3, 4, 4, 5, 5]  # 5 images to train on, 3 per step
    detector = load_detector(unbroken)
    assert detector.class_names == CLASSES and detector.mpp == 0.5
    best = checkpoint.folder_of(unbroken / "best", summary["best"]["step"])
    for name, value in checkpoint.read_tensors(best, "detector").items():
        assert torch.equal(value, detector.state_dict()[name])
    weights = [row["lambda_cons"] for row in rows(unbroken) if "loss" in row]
    assert (
        weights[0] == 0
        and weights == sorted(weights)
        and weights[-1] == pytest.approx(0.1 * (1 - np.cos(np.pi * 2 / 3)) / 2)
    )


def test_a_run_from_an_encoder_of_timm(workplace: Path, tmp_path: Path) -> None:
    """Weights with another image size, patches of 14 px, and a detector that predict applies to a picture."""
    name = "vit_small_patch14_reg4_dinov2"
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    stored = timm.create_model(name, num_classes=5, img_size=112, **options).state_dict()
    save_file(stored, tmp_path / "w.safetensors")
    arch = f"timm:{name}:depth=1:embed_dim=24:num_heads=2"
    weights = f"{arch}@{tmp_path}/w.safetensors"
    out = tmp_path / "run"
    argv = arguments(workplace, out, "data.sample_size=112", "optim.epochs=1", "detector.min_score=0.01")
    assert main([*argv, "--weights", weights]) == 0
    detector = load_detector(out)
    assert detector.spec.arch == arch and detector.tile_size == 112
    learned = detector.backbone.encoder.encoder.state_dict()
    assert all((learned[key] - stored[key]).abs().max() < 0.01 for key in ("cls_token", "blocks.0.mlp.fc1.weight"))
    Image.fromarray(synthetic_image(3, 120, 0.5)[0]).save(tmp_path / "x.png")
    (tmp_path / "mpp.csv").write_text("image,mpp\nx.png,0.5\n")
    found = ["--out", str(tmp_path / "found"), str(tmp_path / "x.png"), "tissue=false"]
    assert predict(["--weights", str(out), *found]) == 0
    assert len((tmp_path / "found" / "x" / "cells.csv").read_text().splitlines()) > 1
    assert run_command(main, [*argv, "--weights", weights, "--out", str(tmp_path / "b"), "data.sample_size=96"]) == 2


def test_a_resumed_run_ends_bit_identical(workplace: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = workplace / "crashed"
    interrupt_at_step(3, arguments(workplace, out), monkeypatch)  # a step after a checkpoint
    assert main(arguments(workplace, out)) == 0
    assert rows(out) == rows(unbroken)
    for stem in ("detector", "optimizer"):
        ours, theirs = (checkpoint.read_tensors(checkpoint.latest(run)[0] or run, stem) for run in (out, unbroken))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_sigterm_saves_and_the_run_resumes(workplace: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = workplace / "stopped"
    train_step = Finetuner.train_step

    def terminated(tuner: Finetuner, batch: LfovBatch, *, measure: bool) -> Mapping[str, Any]:
        if tuner.step == 0:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(tuner, batch, measure=measure)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "train_step", terminated)
        assert main(arguments(workplace, out)) == exit_codes.STOPPED
    assert checkpoint.steps(out) == [1] and json.loads((out / "exit.json").read_text())["reason"] == "SIGTERM"
    assert main(arguments(workplace, out)) == 0
    assert rows(out) == rows(unbroken) and not (out / "exit.json").exists()


def test_a_non_finite_loss_stops_the_run_unchanged(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = workplace / "poisoned"
    train_step = Finetuner.train_step

    def poisoned(tuner: Finetuner, batch: LfovBatch, *, measure: bool) -> Mapping[str, Any]:
        if tuner.step == 2:
            tuner.detector.type_head[0].bias.data[0] = torch.nan
        return train_step(tuner, batch, measure=measure)

    monkeypatch.setattr(Finetuner, "train_step", poisoned)
    assert main(arguments(workplace, out)) == exit_codes.NON_FINITE
    report = json.loads((out / "non_finite_step_3.json").read_text())
    assert "type loss" in report["error"] and len(report["roi_ids"]) == 3
    found, problems = checkpoint.latest(out)
    assert found == checkpoint.folder_of(out, 2) and not problems
    assert all(torch.isfinite(t).all() for t in checkpoint.read_tensors(found, "detector").values())


def test_refusals(workplace: Path, unbroken: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    new = tmp_path / "new"
    for argv, said in (
        (arguments(workplace, unbroken), "finished run"),
        (arguments(workplace, new, "optim.lrr=1"), "did you mean 'optim.lr'?"),
        (arguments(workplace, new, "data.sample_size=100"), "data.sample_size=100: expected a multiple of 16"),
        (arguments(workplace, new, "data.surroundings=mirror"), "reflect or mask"),
        (arguments(workplace, new, "train.protocol=ocelo"), "ocelot"),
        (arguments(workplace, new, "detector.stride=5"), "detector.stride=5: expected 4, 8 or 16"),
        (arguments(workplace, new, "data.train=training"), "no image in the split 'training'"),
        (arguments(workplace, new, "source.siz=9"), "did you mean 'size'?"),
        (arguments(workplace, new, "source.size"), "'source.size': expected key=value"),
        ([*arguments(workplace, new), "--weights", str(tmp_path / "none.pth")], "do not exist"),
    ):
        assert run_command(main, argv) == 2
        err = capsys.readouterr().err
        assert said in err and "Traceback" not in err
    assert not new.exists()


def test_a_run_that_cannot_fit_is_refused_before_it_writes(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "room_on", lambda device: 1 << 20)
    said = r"a step needs .* GiB at its peak .* and cpu has 0\.000977 GiB; even model\.recompute=full needs"
    with pytest.raises(UserError, match=said):
        main(arguments(workplace, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_other_settings_or_data_do_not_continue_a_run(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = workplace / "other"
    interrupt_at_step(2, arguments(workplace, out), monkeypatch)
    assert run_command(main, arguments(workplace, out, "optim.lr=0.5")) == 2
    assert "optim.lr=0.5 (was 0.0001)" in capsys.readouterr().err
    assert run_command(main, [*arguments(workplace, out), "--data", "synthetic:9"]) == 2
    assert re.search("trained on 5 images.*has 7", capsys.readouterr().err)


def test_tables_of_rois(unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of ROIs have no suffix, though the folder of their set may have a dot."""
    image, xy, _ = synthetic_image(0, 96, 0.5)
    names = load_detector(unbroken).class_names
    for folder in ("v1.5", "b/v1.5"):
        with RoiSetWriter(tmp_path / folder, provenance={}, label_names=names) as writer:
            for _ in range(2):
                writer.add(image, mpp=0.5, xy=xy, label=[0] * len(xy), slide="s", split="test")
    argv = ["detect", "--weights", str(unbroken), "--draws", "20", "--device", "cpu", "--csv", str(tmp_path / "csv")]
    both = f"roiset:{tmp_path / 'v1.5'},{tmp_path / 'b' / 'v1.5'}"
    assert run_command(evaluate_main, [*argv, "--data", both]) == 2
    assert "has 2 images whose points would be in v1.5-000000.csv; leave out --csv" in capsys.readouterr().err
    assert run_command(evaluate_main, [*argv, "--data", f"roiset:{tmp_path / 'v1.5'}"]) == 0
    assert sorted(path.name for path in (tmp_path / "csv").iterdir()) == ["v1.5-000000.csv", "v1.5-000001.csv"]


def test_scores_of_the_run(unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["detect", "--weights", str(unbroken), *SOURCE, "--split", "val", "--draws", "20", "--device", "cpu"]
    argv += ["--json", str(tmp_path / "s.json"), "--csv", str(tmp_path / "csv")]
    assert evaluate_main(argv) == 0
    report = json.loads((tmp_path / "s.json").read_text())
    summary = json.loads((unbroken / "summary.json").read_text())
    for name, one in report["protocols"].items():
        assert one["mean_f1"] == pytest.approx(summary["val"][name]["mean_f1"], abs=1e-9), name
    assert "max-matching" in capsys.readouterr().out
    images = [image for image in open_source("synthetic:7", size=96) if image.split == "val"]
    points = [read_points(tmp_path / "csv" / f"{image.name}.csv", 96, 96, 3) for image in images]
    assert sum(map(len, points)) == report["detected"]
    assert run_command(evaluate_main, argv) == 2 and "exists already" in capsys.readouterr().err
    assert run_command(evaluate_main, [*argv[:-4], "--split", "tst"]) == 2
    assert "no images in the split 'tst'" in capsys.readouterr().err
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.csv").write_text("x,y\n")
    import PIL.Image

    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "p" / "a.png")
    assert run_command(evaluate_main, [*argv[:3], "--data", f"points:{tmp_path / 'p'}", "source.mpp=0.5"]) == 2
    assert "has the classes nucleus, but" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the step


def tuner_and_batch(*overrides: str, size: int = 96) -> tuple[Finetuner, LfovBatch]:
    config = load_settings(
        FinetuneConfig, None, ["data.sample_size=64", "train.precision=fp32", "optim.batch_size=2", *overrides]
    )
    images = read_labelled(open_source("synthetic:4", size=size), ("train",), config.data.mpp)["train"]
    detector = new_detector(config, CLASSES, "random:vit_tiny", None, None)
    tuner = Finetuner(config, detector, torch.device("cpu"), len(images))
    data = config.data
    dataset = LfovDataset(
        images, size=data.sample_size, surroundings=data.surroundings, turns=False, colours=data.colours(), seed=0
    )
    batch = dataset[[(0, 0), (0, 1)]]
    assert isinstance(batch, LfovBatch)
    return tuner, batch


def test_targets_are_in_the_annotated_region() -> None:
    tuner, batch = tuner_and_batch()
    places = proposal_places(batch.places, 8)
    with torch.no_grad():
        proposals = tuner.detector(torch.randn(2, 3, 64, 64))
    batch = batch._replace(label=torch.where(torch.arange(len(batch.label)) == 0, -1, batch.label))
    targets = assign(proposals.points, proposals.logits.softmax(dim=-1), places, batch, 0.05)
    annotated = (places == ANNOTATED).flatten()
    assert (targets.type[~annotated] == -1).all() and annotated[targets.matched].all()
    assert len(targets.matched) == len(batch.xy) == len(set(targets.matched.tolist()))
    background = int((targets.type == 3).sum())
    assert background == int(annotated.sum()) - len(batch.xy)
    assert int((targets.type >= 0).sum()) == int(annotated.sum()) - 1  # without the nucleus of unknown class
    for row, xy, kind in zip(targets.matched.tolist(), targets.nuclei, targets.type[targets.matched], strict=True):
        own = (batch.xy == xy).all(dim=1).nonzero()
        assert kind in batch.label[own] and (row < 64) == bool(own[0] < batch.counts[0])


def test_nothing_outside_the_region_matters_without_the_consistency_loss() -> None:
    """The ablation: only the consistency loss changes the gradient of the type head outside the annotated region."""
    gradients = {}
    cases = {"off": ["loss.lambda_cons=0"], "on": [], "mask": ["data.surroundings=mask"]}
    for name, overrides in cases.items():
        tuner, batch = tuner_and_batch("optim.epochs=2", "loss.confidence=0", *overrides)
        tuner.step = 2  # of 3, in the second epoch
        values = tuner.train_step(batch)
        gradients[name] = tuner.detector.type_head[-1].weight.grad
        assert (float(values["lambda_cons"]) > 0) == (name != "off")
        assert (float(values["pseudo_labelled"]) > 0) == (name != "mask")
        assert (float(values["loss_cons"]) > 0) == (name != "mask")
    assert not torch.allclose(gradients["off"], gradients["on"], rtol=1e-3)


def test_without_a_large_field_of_view_nothing_is_unlabelled() -> None:
    tuner, batch = tuner_and_batch("data.sample_size=48")
    values = tuner.train_step(batch)
    assert float(values["annotated"]) == 1 and float(values["loss_cons"]) == 0


def test_both_pseudo_views() -> None:
    for view, modes in (("plain", [True, False]), ("same", [True])):
        tuner, batch = tuner_and_batch("optim.epochs=2", f"loss.pseudo_view={view}", "loss.confidence=0")
        seen: list[bool] = []
        tuner.detector.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(module.training))
        tuner.step = 2
        tuner.train_step(batch)
        assert seen == modes and tuner.detector.training


def test_pseudo_labels_come_from_the_network_before_the_step_while_nuclei_are_matched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The matching ends only after the plain samples were seen, with the statistics from before this step."""
    tuner, batch = tuner_and_batch("optim.epochs=2", "loss.confidence=0")
    tuner.train_step(batch)
    with torch.no_grad():
        expected = tuner.detector.eval()(normalise(batch.plain)).logits.flatten(0, 1)
    plain_logits, seen, began = tuner.plain_forward, list[torch.Tensor](), threading.Event()

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(plain_logits(*arguments))
        began.set()
        return seen[0]

    def late(*arguments: Any) -> Targets:
        assert began.wait(60)
        return assign(*arguments)

    monkeypatch.setattr(tuner, "plain_forward", watched)
    monkeypatch.setattr(targets_of_proposals, "assign", late)
    tuner.step = 2  # of 3, in the second epoch
    tuner.train_step(batch)
    assert torch.equal(seen[0], expected)


def test_training_on_images_without_nuclei() -> None:
    tuner, batch = tuner_and_batch()
    batch = batch._replace(xy=batch.xy[:0], label=batch.label[:0], counts=torch.zeros_like(batch.counts))
    values = tuner.train_step(batch)
    tuner.check()
    assert float(values["loss_reg"]) == 0 and float(values["loss_type"]) > 0


@pytest.mark.slow
def test_a_small_set_can_be_learnt() -> None:
    tuner, _ = tuner_and_batch("optim.lr=1e-3", "optim.epochs=30", "data.sample_size=96", size=192)
    images = read_labelled(open_source("synthetic:4", size=192), ("train",), 0.5)["train"][:2]
    colours = tuner.config.data.colours()
    dataset = LfovDataset(images, size=96, surroundings="reflect", turns=False, colours=colours, seed=0)

    def f1() -> float:
        truths = [known_nuclei(one.xy, one.label) for one in images]
        return evaluate(detect_images(tuner.detector, images), truths, 0.5, 3).mean_f1

    before, offsets = f1(), []
    for epoch in range(60):
        batch = dataset[[(epoch, 0), (epoch, 1)]]
        assert isinstance(batch, LfovBatch)
        offsets.append(float(tuner.train_step(batch)["loss_reg"]))
    assert before < 0.3 and f1() > 0.5
    assert offsets[-1] < 0.2 * offsets[0]
