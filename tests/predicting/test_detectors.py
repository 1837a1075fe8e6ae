"""Detectors of tiles by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from muse_fast.errors import UserError
from muse_fast.finders.learned import load_finder
from muse_fast.images.synthetic import synthetic_image
from muse_fast.predicting.detectors import detector_sha256, open_detector

CPU = torch.device("cpu")


@pytest.mark.parametrize(("weights", "name"), [("nuclei", "default"), ("classical", "classical")])
def test_a_batch_is_detected_tile_by_tile(weights: str, name: str) -> None:
    detector = open_detector(weights, CPU)
    images = np.stack([synthetic_image(seed, 160, 0.5)[0] for seed in range(3)])
    found = detector.detect(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert detector.mpp == 0.5 and detector.class_names == ("nucleus",)
    assert len(found) == 3
    for image, points in zip(images, found, strict=True):
        expected = load_finder(name)(image, 0.5)
        assert len(points) > 5
        np.testing.assert_array_equal(points.xy, expected.xy)
        np.testing.assert_array_equal(points.score, expected.score)
        assert points.classes().tolist() == [0] * len(points)


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.safetensors: no such file"):
        open_detector(str(tmp_path / "nothing.safetensors"), CPU)
    pytest.importorskip("muse_fast.detection.detector")
    with pytest.raises(UserError, match=r"run: no such folder"):
        open_detector(str(tmp_path / "run"), CPU)


def test_the_hash_is_of_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of folders that have the name of a shipped detector, and not of other checkpoints of a run."""
    for name in ("nuclei", "run/best", "run/checkpoints/step-00000001"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "detector.safetensors").write_text(name)
    monkeypatch.chdir(tmp_path)
    assert detector_sha256("nuclei") == detector_sha256("classical") == ""
    before = detector_sha256("run")
    assert before == detector_sha256("run/best") != detector_sha256("./nuclei")
    shutil.rmtree("run/checkpoints")
    assert detector_sha256("run") == before
    Path("run/best/detector.safetensors").write_text("other")
    assert detector_sha256("run") != before
