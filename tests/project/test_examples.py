"""The examples run from a checkout without changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast import prepare, pretrain

ROOT = Path(__file__).parents[2]


def test_patch_dino_loss() -> None:
    """All three ways compute the published loss; the script fails otherwise."""
    script = ROOT / "examples" / "patch_dino_loss.py"
    finished = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    losses = {line.split()[0]: line.split()[1] for line in finished.stdout.splitlines()[3:7]}
    assert list(losses) == ["as_published", "by_function", "by_module", "without_logits"]
    assert max(map(float, losses.values())) - min(map(float, losses.values())) < 1e-3


def test_swap_dino_loss() -> None:
    """Losses stay the same and memory shrinks; the script fails otherwise."""
    command = [sys.executable, ROOT / "examples" / "swap_dino_loss.py", "6"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "+    dino_loss = kernels.DINOLoss(PROTOTYPES, CROPS)" in finished.stdout
    losses = [line.split() for line in finished.stdout.splitlines() if line.startswith("step")]
    assert [step for _, step, *_ in losses] == ["0:", "3:", "5:"]
    for _, _, _, before, _, after, _ in losses:
        assert abs(float(after) / float(before) - 1) < 1e-4
    memory = next(line.split() for line in finished.stdout.splitlines() if line.startswith("peak memory"))
    assert float(memory[8]) < 0.7 * float(memory[5])


@pytest.mark.slow
def test_nuclei_picture(tmp_path: Path) -> None:
    assert prepare.main(["synthetic:2", str(tmp_path / "rois"), "size=256"]) == 0
    settings = (f"data.roiset={tmp_path / 'rois'}", "train.device=cpu", "optim.steps=2", "optim.warmup_steps=1")
    command = ["--config", "demo", "--out", str(tmp_path / "run"), *settings, "optim.batch_size=2"]
    assert pretrain.main([*command, "views.global_mpp_min=0.2", "views.local_mpp_min=0.2"]) == 0
    script = ROOT / "examples" / "nuclei_picture.py"
    command = [sys.executable, str(script), str(tmp_path / "run"), str(tmp_path / "picture.png")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    pixels = np.asarray(Image.open(tmp_path / "picture.png")).astype(int)
    region, painted = pixels[34:, :420], pixels[34:, -420:]
    coloured = np.ptp(painted, axis=2) > 40  # on a grey region
    assert 0.005 < coloured.mean() < 0.5
    assert np.ptp(region, axis=2).mean() > 20
