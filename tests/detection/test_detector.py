"""The detector: proposals, windows, non-maximum suppression, saving and loading."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from muse_fast.detection.detector import (
    STEM,
    Detector,
    DetectorSpec,
    Proposals,
    grid,
    load_detector,
    suppress,
    windows,
)
from muse_fast.errors import UserError
from muse_fast.images.points import Points
from muse_fast.models.backbone import build_backbone
from muse_fast.runtime import checkpoint

SPEC = DetectorSpec(arch="vit_tiny", class_names=("a", "b"), mpp=0.5, sample_size=64)


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(build_backbone("vit_tiny"), SPEC).eval()


class DarkPixels(Detector):
    """Finds a nucleus of class 0 at every black pixel."""

    def forward(self, images: Tensor) -> Proposals:
        side = images.shape[-1]
        dark = images[:, 0] < -2
        xy = grid(side, 1)
        logits = torch.full((len(images), side, side, 3), -9.0)
        logits[..., 2] = torch.where(dark, -9.0, 9.0)
        logits[..., 0] = torch.where(dark, 5.0, -9.0)
        return Proposals(xy, xy.expand(len(images), -1, 2), logits.flatten(1, 2))


def dark_pixels(surroundings: str = "reflect", nms_um: float = 0.0) -> Detector:
    spec = {**asdict(SPEC), "surroundings": surroundings, "nms_um": nms_um}
    return DarkPixels(build_backbone("vit_tiny"), DetectorSpec(**spec))


def test_proposals_are_on_the_grid_and_sample_the_unified_map(detector: Detector) -> None:
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        found = detector(images)
        dense = detector.backbone.dense_map(images)
        assert found.xy.shape == (64, 2) and found.points.shape == (2, 64, 2) and found.logits.shape == (2, 64, 3)
        assert found.xy[:3].tolist() == [[4, 4], [12, 4], [20, 4]] and found.xy[8].tolist() == [4, 12]
        assert torch.equal(found.points, found.xy.expand(2, -1, 2))  # offsets of a new head are 0
        where = found.xy / 64 * 2 - 1
        rows = torch.nn.functional.grid_sample(dense, where.expand(2, 1, -1, 2), align_corners=True)[:, :, 0]
        expected = detector.type_head(rows.transpose(1, 2))
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 129, 1000])
def test_windows_partition_the_whole_length(length: int) -> None:
    found = windows(length, 64, 16)
    assert [first for _, first, _ in found] == [0, *(end for _, _, end in found[:-1])] and found[-1][2] == length
    for number, (start, first, end) in enumerate(found):
        assert start <= first < end <= start + 64
        assert number == 0 or first - start >= 16  # a margin on both sides, except at the border of the image
        assert number == len(found) - 1 or start + 64 - end >= 16
        assert length <= 64 or 0 <= start <= length - 64


@pytest.mark.parametrize("surroundings", ["reflect", "mask"])
@pytest.mark.parametrize(("height", "width"), [(40, 50), (64, 64), (70, 300), (1, 5)])
def test_every_nucleus_is_found_once_in_its_place(height: int, width: int, surroundings: str) -> None:
    images = torch.full((2, 3, height, width), 255, dtype=torch.uint8)
    dark = torch.rand(2, height, width) < 0.1
    images[dark[:, None].expand(-1, 3, -1, -1)] = 0
    found = dark_pixels(surroundings).detect(images)
    for points, where in zip(found, dark, strict=True):
        expected = {(float(x) + 0.5, float(y) + 0.5) for y, x in where.nonzero().tolist()}
        assert len(points.xy) == len(expected) and {tuple(xy) for xy in points.xy.tolist()} == expected
        assert (points.label == 0).all() and (points.score > 0.9).all()
        assert (points.xy.dtype, points.label.dtype, points.score.dtype) == (np.float32, np.int64, np.float32)


def test_suppression_is_in_um() -> None:
    images = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    images[0, :, 10, [10, 15]] = 0  # 5 px = 2.5 um apart
    assert [len(dark_pixels(nms_um=um).detect(images)[0].xy) for um in (0.0, 2.4, 2.5, 3.0)] == [2, 2, 1, 1]


def brute_force(xy: np.ndarray, score: np.ndarray, radius: float) -> list[int]:
    kept: list[int] = []
    for i in np.argsort(-score, kind="stable"):
        if radius == 0 or all(((xy[i] - xy[j]) ** 2).sum() > radius**2 for j in kept):
            kept.append(int(i))
    return kept


@pytest.mark.parametrize("count", [0, 1, 2, 50, 300])
def test_suppression_against_brute_force(count: int) -> None:
    rng = np.random.default_rng(count)
    xy = rng.integers(0, 40, (count, 2)).astype(np.float32)  # many ties, also in position
    points = Points(xy, np.arange(count), rng.integers(0, 5, count) / 5)
    for radius in (0.0, 1.0, 5.0, 100.0):
        expected = (
            brute_force(xy, points.confidence(), radius) if radius else np.argsort(-points.confidence(), kind="stable")
        )
        assert suppress(points, radius).label.tolist() == list(expected)


def test_detect_runs_in_evaluation_mode_and_restores_the_mode(detector: Detector) -> None:
    image = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8)
    detector.train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    found = detector.detect(image)[0]
    assert detector.training and all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    again = detector.eval().detect(image.expand(3, -1, -1, -1))
    assert not detector.training
    for one in again:
        np.testing.assert_allclose(one.xy, found.xy, atol=1e-3)
    assert ((found.xy >= 0) & (found.xy < 64)).all() and (np.diff(found.score) <= 0).all()


def test_a_saved_detector_loads_again(detector: Detector, tmp_path: Path) -> None:
    state = {STEM: asdict(SPEC), "step": 3}
    folder = checkpoint.save(tmp_path / "run", 3, {STEM: detector.state_dict()}, state, keep_every=0)
    image = torch.randint(0, 255, (1, 3, 90, 70), dtype=torch.uint8)
    for path in (folder, tmp_path / "run", str(folder)):
        loaded = load_detector(path)
        assert loaded.spec == SPEC and not loaded.training and loaded.class_names == ("a", "b")
        assert (loaded.mpp, loaded.tile_size, loaded.reach_um) == (0.5, 64, 8.0)
        assert np.array_equal(loaded.detect(image)[0].xy, detector.eval().detect(image)[0].xy)


@pytest.mark.parametrize("rule", ["scale_factor", "size", None])
def test_a_detector_keeps_the_rule_of_its_position_embedding(rule: str | None, tmp_path: Path) -> None:
    """None: a checkpoint from before the rule could be chosen."""
    expected = rule or "size"
    spec = {name: value for name, value in asdict(SPEC).items() if name != "pos_embed_resize"}
    detector = Detector(build_backbone("vit_tiny", pos_embed_resize=expected), SPEC).eval()
    state = {STEM: spec | ({"pos_embed_resize": rule} if rule else {}), "step": 3}
    folder = checkpoint.save(tmp_path, 3, {STEM: detector.state_dict()}, state, keep_every=0)
    loaded, images = load_detector(folder), torch.randn(1, 3, 64, 64)
    assert loaded.spec.pos_embed_resize == expected
    with torch.inference_mode():
        assert torch.equal(loaded(images).logits, detector(images).logits)


def test_invalid_input_is_refused(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"uint8 \[B, 3, H, W\], got torch.float32"):
        detector.detect(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="no such folder"):
        load_detector(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run"):
        load_detector(tmp_path)
    folder = checkpoint.save(tmp_path / "pretraining", 1, {"teacher": {}}, {"step": 1, "config": {}}, keep_every=0)
    with pytest.raises(UserError, match="checkpoint of pretraining, not a detector; run muse"):
        load_detector(folder)
    with pytest.raises(UserError, match="stride=5: expected a divisor"):
        DetectorSpec(**{**asdict(SPEC), "stride": 5})
    with pytest.raises(UserError, match=r"^sample_size=100: expected a multiple of 16 from 32 to 1024 .* nearest is"):
        DetectorSpec(**{**asdict(SPEC), "sample_size": 100})
    patches_of_14 = {"arch": "timm:vit_small_patch14_dinov2:depth=1:embed_dim=24:num_heads=2", "sample_size": 1024}
    with pytest.raises(UserError, match=r"a multiple of 112 from 112 to 1008 for timm:vit.*; the nearest is 1008$"):
        DetectorSpec(**{**asdict(SPEC), **patches_of_14})
