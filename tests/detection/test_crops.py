"""Training crops: the heatmap against its formula, and points that stay on their nuclei."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from muse_fast.detection import crops as nucleus_crops
from muse_fast.detection.crops import Annotated, draw_crops, gaussian_target
from muse_fast.finders.network import STRIDE


def test_target_against_the_formula() -> None:
    xy = np.random.default_rng(0).uniform(-10, 74, (12, 2))
    target = gaussian_target(torch.tensor(xy, dtype=torch.float32), 64, 3.0)
    places = (np.arange(32) + 0.5) * STRIDE
    for row, y in enumerate(places):
        for column, x in enumerate(places):
            nearest = np.hypot(xy[:, 0] - x, xy[:, 1] - y).min()
            assert float(target[row, column]) == pytest.approx(np.exp(-(nearest**2) / 18), abs=4e-4)


def test_target_without_nuclei() -> None:
    assert not gaussian_target(torch.empty(0, 2), 32, 3.0).any()
    assert not gaussian_target(torch.tensor([[500.0, 500.0]]), 32, 3.0).any()


def dots(height: int, width: int, count: int) -> Annotated:
    """A white image with dark dots of 5 px around random points."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 1, (count, 2)) * (width, height)
    v, u = np.mgrid[:height, :width] + 0.5
    distance = np.hypot(u - xy[:, 0, None, None], v - xy[:, 1, None, None]).min(0)
    image = np.where(distance < 2.5, 40, 255).astype(np.uint8)
    return Annotated(torch.from_numpy(np.stack([image] * 3)), torch.from_numpy(xy.astype(np.float32)))


def test_points_follow_the_pixels() -> None:
    """Under any turn, mirror, zoom, stain and focus, exactly the places with a high target are dark."""
    images = [dots(200, 150, 30), dots(90, 260, 25)]
    for seed in range(8):
        crops = draw_crops(images, np.random.default_rng(seed), batch_size=4, size=96, sigma=2.0)
        dark = torch.nn.functional.avg_pool2d(crops.density.mean(1), STRIDE)
        inside = crops.weight > 0
        assert dark[inside & (crops.target > 0.8)].mean() > 0.4
        assert dark[inside & (crops.target < 0.05)].mean() < 0.02
        assert (dark[~inside] < 0.01).float().mean() > 0.95  # glass around the image


def test_shapes_and_ranges() -> None:
    crops = draw_crops([dots(40, 40, 3)], np.random.default_rng(0), batch_size=3, size=64, sigma=3.0)
    assert crops.density.shape == (3, 3, 64, 64)
    assert crops.target.shape == crops.weight.shape == (3, 32, 32)
    assert crops.density.min() >= 0 and crops.density.max() <= 2.4
    assert set(crops.weight.unique().tolist()) == {0.0, 1.0}
    assert crops.weight.mean() < 0.8  # crops of 64 px of an image of 40 px


def test_same_draw_same_crops() -> None:
    first, again, other = (
        draw_crops([dots(80, 80, 9)], np.random.default_rng(seed), batch_size=2, size=64, sigma=3.0)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.density, again.density) and torch.equal(first.target, again.target)
    assert not torch.equal(first.density, other.density)


def test_colours_vary_and_without_spread_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    spread = torch.stack([nucleus_crops._restaining(rng) for _ in range(200)])
    assert spread.std(0).diagonal().min() > 0.2
    monkeypatch.setattr(nucleus_crops, "COLOUR", 0.0)
    torch.testing.assert_close(nucleus_crops._restaining(rng), torch.eye(3), atol=1e-5, rtol=0)
