"""Training of the detector: the loss against its formula, planted nuclei, the command and its results."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from muse_fast import train_detector
from muse_fast.detection.crops import Crops
from muse_fast.detection.train_finder import (
    DISTANCES_UM,
    THRESHOLDS,
    Labelled,
    TrainDetectorConfig,
    best_threshold,
    choose_settings,
    heatmap_loss,
    scored,
    scores_at,
    train,
)
from muse_fast.errors import UserError
from muse_fast.finders.learned import ClassicalFinder, LearnedFinder, read_finder
from muse_fast.images.points import Points
from muse_fast.images.synthetic import synthetic_image
from muse_fast.runtime.cli import run

main = partial(run, train_detector.main)
TINY = {"batch_size": 2, "crop": 64, "precision": "fp32"}


def synthetic(*seeds: int) -> list[Labelled]:
    return [Labelled(image, 0.5, xy) for image, xy, _ in (synthetic_image(seed, 192, 0.5) for seed in seeds)]


def silent(step: int, values: object) -> None:
    pass


def test_loss_against_the_formula_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target, weight = (torch.rand(2, 5, 7, generator=generator) for _ in range(3))
    logits, weight = 8 * logits - 4, (weight > 0.3).float()
    z, t, w = (one.double().numpy() for one in (logits, target, weight))
    p = 1 / (1 + np.exp(-z))
    terms = (t - p) ** 2 * -(t * np.log(p) + (1 - t) * np.log(1 - p))
    loss = heatmap_loss(logits, Crops(torch.empty(0), target, weight))
    assert loss.item() == pytest.approx((w * terms).sum() / (w * t).sum(), rel=1e-5)


def test_loss_is_minimal_at_the_target_and_finite_without_nuclei() -> None:
    target = torch.full((1, 2, 2), 0.3)
    crops = Crops(torch.empty(0), target, torch.ones_like(target))
    logits = torch.logit(target).requires_grad_()
    heatmap_loss(logits, crops).backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6
    none = Crops(torch.empty(0), torch.zeros(1, 2, 2), torch.ones(1, 2, 2))
    assert 0 < heatmap_loss(torch.zeros(1, 2, 2), none).item() < 1
    assert heatmap_loss(torch.zeros(1, 2, 2), Crops(torch.empty(0), target, torch.zeros(1, 2, 2))).item() == 0


def test_planted_nuclei_are_found_after_a_few_steps() -> None:
    options = TrainDetectorConfig(steps=30, batch_size=2, crop=96, precision="fp32", lr=3e-3)
    detector = train(synthetic(*range(4)), options, silent)
    choose_settings(detector, synthetic(10))
    assert scored(detector, synthetic(11, 12)).f1 > 0.78  # measured 0.84


def test_same_seed_same_weights() -> None:
    weights = []
    for seed in (0, 0, 1):
        detector = train(synthetic(0), TrainDetectorConfig(seed=seed, steps=2, **TINY), silent)
        weights.append(torch.cat([p.flatten() for p in detector.network.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_scores_are_those_of_weights_in_half_precision() -> None:
    detector = train(synthetic(0), TrainDetectorConfig(steps=1, **TINY), silent)
    for name, tensor in detector.network.state_dict().items():
        assert torch.equal(tensor, tensor.half().to(tensor.dtype)), name
    assert not detector.network.training


class Fixed:
    """Finds the true points and, with lower scores, others far away."""

    reach_um, threshold = 0.0, 0.5

    def __init__(self, true: np.ndarray) -> None:
        self.xy = np.concatenate([true, true + np.float32(1000)])
        self.score = np.repeat(np.float32([0.9, 0.3]), len(true))

    def __call__(self, image: object, mpp: float, *, threshold: float | None = None) -> Points:
        kept = self.score >= (self.threshold if threshold is None else threshold)
        return Points(self.xy[kept], score=self.score[kept])


def test_choice_of_a_threshold() -> None:
    (image,) = synthetic(0)
    detector = Fixed(image.xy)
    count = len(image.xy)
    scores = scores_at(detector, [image, image], [0.2, 0.5, 0.95])
    assert [(s.tp, s.fp, s.fn) for s in scores] == [(2 * count, 2 * count, 0), (2 * count, 0, 0), (0, 0, 2 * count)]
    assert best_threshold(detector, [image], [0.2, 0.5, 0.95]) == (1.0, 0.5)


def test_chosen_settings_are_on_the_grid() -> None:
    detector = train(synthetic(0), TrainDetectorConfig(steps=1, **TINY), silent)
    choose_settings(detector, synthetic(1))
    assert detector.threshold in THRESHOLDS and detector.min_distance_um in DISTANCES_UM
    best, threshold = best_threshold(detector, synthetic(1), THRESHOLDS)
    assert threshold == detector.threshold and scored(detector, synthetic(1)).f1 == pytest.approx(best)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    argv = [
        "--data",
        "synthetic:7",
        "--out",
        str(out),
        "steps=4",
        "source.size=224",
        "log_every=2",
        *(f"{k}={v}" for k, v in TINY.items()),
    ]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "step 2/4" in shown and "resnet18" in shown and "classical" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert [row["detector"] for row in summary["detectors"]] == ["resnet18", "classical", "classical"]
    assert summary["detectors"][1]["threshold"] == ClassicalFinder().threshold
    assert summary["source_options"] == {"size": "224"}
    assert summary["options"]["steps"] == 4 and summary["images_and_nuclei"]["train"][0] == 5
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    detector = read_finder(out / "detector.safetensors")
    assert isinstance(detector, LearnedFinder) and detector.threshold == summary["detectors"][0]["threshold"]
    assert main(argv) == 2
    assert "contains a finished run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "synthetic:2"], "no image in the split 'val'"),
        (["--data", "synthetic:7", "crop=100"], "crop=100: expected a multiple of 16"),
        (["--data", "synthetic:7", "stepps=100"], "did you mean 'steps'"),
        (["--data", "synthetic:7", "precision=fp16"], "expected bf16 or fp32"),
        (["--data", "brcam2c:nowhere"], "is not a folder"),
        (["--data", "synthetic:7", "lr=1e30", "steps=20", "crop=32", "precision=fp32"], "the loss is"),
    ],
)
def test_mistakes(tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


def test_options_are_checked() -> None:
    for wrong in ({"steps": 0}, {"sigma_um": 0}, {"weight_decay": -1}, {"seed": -1}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
            TrainDetectorConfig(**wrong)  # type: ignore[arg-type]
