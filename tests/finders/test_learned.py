"""Finders: peaks, tiling, files, and the shipped weights on real images."""

from __future__ import annotations

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from muse_fast.detection.train_finder import Labelled, scored
from muse_fast.errors import UserError
from muse_fast.finders import learned as module
from muse_fast.finders.classical import detect_nuclei
from muse_fast.finders.learned import (
    SHIPPED,
    LearnedFinder,
    heatmap_peaks,
    load_finder,
    read_finder,
    write_finder,
)
from muse_fast.finders.network import NucleusNet
from muse_fast.images.image_files import resampled
from muse_fast.images.synthetic import synthetic_image
from muse_fast.sources import open_source


@pytest.fixture(scope="module")
def shipped() -> LearnedFinder:
    return read_finder(SHIPPED["resnet18"])


# ----------------------------------------------------------------------------------------------------------- peaks


def bumps(xy: np.ndarray, heights: np.ndarray, shape: tuple[int, int] = (40, 50)) -> np.ndarray:
    """Logits whose maxima are parabolas at ``xy`` pixels (cells of 2 px)."""
    v, u = (np.mgrid[: shape[0], : shape[1]] + 0.5) * 2
    hills = [h - ((u - x) ** 2 + (v - y) ** 2) / 8 for (x, y), h in zip(xy, heights, strict=True)]
    return np.max(hills, axis=0).astype(np.float32)


def test_peaks_to_a_fraction_of_a_cell() -> None:
    xy = np.array([[20.3, 31.9], [60.0, 12.7], [81.1, 70.0]])
    heights = np.array([2.0, 1.0, 3.0])
    found, score = heatmap_peaks(bumps(xy, heights), 4.0, 0.5)
    np.testing.assert_allclose(found, xy[[2, 0, 1]], atol=0.02)
    # The score is that of the cell, at most sqrt(2) px from the peak.
    np.testing.assert_allclose(score, 1 / (1 + np.exp(-heights[[2, 0, 1]])), atol=0.06)
    assert (found.dtype, score.dtype) == (np.float32, np.float32)


def test_peaks_nearer_than_the_minimum_distance() -> None:
    """Peaks 8 px apart: a higher one removes its neighbours, and a removed one does not remove others."""
    xy = np.array([[20.0, 20.0], [28.0, 20.0], [36.0, 20.0], [44.0, 20.0]])
    heat = bumps(xy, np.array([3.0, 2.5, 2.0, 2.2]))
    for distance, left in ((7.9, [0, 1, 3, 2]), (8.2, [0, 3]), (20.0, [0, 3]), (30.0, [0])):
        np.testing.assert_allclose(heatmap_peaks(heat, distance, 0.1)[0], xy[left], atol=0.05)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2)])
def test_peaks_of_tiny_heatmaps(shape: tuple[int, int]) -> None:
    heat = np.full(shape, -5, np.float32)
    assert heatmap_peaks(heat, 4.0, 0.1)[0].shape == (0, 2)
    heat[-1, -1] = 4
    xy, score = heatmap_peaks(heat, 4.0, 0.1)
    assert len(score) == 1 and (np.abs(xy[0] - 2 * np.array(shape[::-1]) + 1) <= 1).all()


def test_a_higher_threshold_equals_filtering_by_score(shipped: LearnedFinder) -> None:
    """The choice of a threshold on val relies on this."""
    image, _, _ = synthetic_image(0)
    found, higher = (shipped(image, 0.25, threshold=threshold) for threshold in (0.05, 0.5))
    assert found.score is not None and 0 < len(higher) < len(found)
    np.testing.assert_array_equal(higher.xy, found.xy[found.score >= 0.5])
    assert (np.diff(found.score) <= 0).all()


# ---------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("tile", [96, 160])
def test_heatmap_does_not_depend_on_tiles(shipped: LearnedFinder, tile: int) -> None:
    image = synthetic_image(1, 341, 0.5)[0][:, :225]
    whole = shipped.heatmap(image, tile=1024)
    assert whole.shape == (171, 113)
    np.testing.assert_allclose(shipped.heatmap(image, tile), whole, atol=1e-3)  # logits; the order of sums differs


def test_heatmap_does_not_depend_on_threads(shipped: LearnedFinder) -> None:
    """The same slides yield the same set, bit for bit, on any number of cores."""
    image = synthetic_image(1, 341, 0.5)[0]
    before = torch.get_num_threads()
    try:
        heats = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            heats.append(shipped.heatmap(image))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(heats[0], heat) for heat in heats)


def test_a_roi_read_with_the_margin_has_the_nuclei_of_the_whole(shipped: LearnedFinder) -> None:
    """Callers rely on this. The numbers are exactly equal only if the border is on the network's grid of 16 px."""
    image, _, _ = synthetic_image(2, 448, 0.5)
    margin = round(shipped.reach_um / 0.5)
    corner, side = margin + 16, 112
    block = image[corner - margin : corner + side + margin, corner - margin : corner + side + margin]
    assert corner + side + margin < 448
    mine = shipped(block, 0.5).within(margin, margin, side)
    theirs = shipped(image, 0.5).within(corner, corner, side)
    assert len(theirs) > 10
    np.testing.assert_allclose(mine.xy, theirs.xy, atol=0.01)
    np.testing.assert_allclose(mine.confidence(), theirs.confidence(), atol=1e-3)


@pytest.mark.parametrize(("sides", "mpp"), [((33, 47), 0.5), ((2084, 1001), 0.25), ((50, 64), 0.4)])
def test_points_at_the_borders_lie_inside(
    shipped: LearnedFinder, monkeypatch: pytest.MonkeyPatch, sides: tuple[int, int], mpp: float
) -> None:
    """A heatmap that rises towards the last column and row peaks on the border or beyond."""

    def rising(image: np.ndarray) -> np.ndarray:
        rows, columns = (-(-side // 2) for side in image.shape[:2])
        return np.add.outer(np.arange(rows), np.arange(columns)).astype(np.float32)

    monkeypatch.setattr(shipped, "heatmap", rising)
    found = shipped(np.zeros((*sides, 3), np.uint8), mpp)
    xy = found.xy
    assert len(found) == 1 and found.confidence()[0] > 0.9
    assert (xy >= 0).all() and (xy < sides[::-1]).all() and (xy > np.array(sides[::-1]) - 1 - 1 / mpp).all()
    assert xy.dtype == np.float32


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (37, 211), (97, 16)])
@pytest.mark.parametrize("grey", [255, 230])
@pytest.mark.parametrize("name", ["classical", "resnet18"])
def test_no_nuclei_in_empty_images(shape: tuple[int, int], grey: int, name: str) -> None:
    found = load_finder(name)(np.full((*shape, 3), grey, np.uint8), 0.25)
    assert found.score is not None and found.xy.shape == (0, 2) and found.score.shape == (0,)
    assert (found.xy.dtype, found.score.dtype) == (np.float32, np.float32)


@pytest.mark.parametrize("mpp", [0.25, 0.4, 0.5, 1.0])
def test_synthetic_nuclei_are_found_at_any_mpp(shipped: LearnedFinder, mpp: float) -> None:
    """The network has never seen these images."""
    images = [Labelled(image, mpp, xy) for image, xy, _ in (synthetic_image(s, round(128 / mpp), mpp) for s in (0, 1))]
    assert scored(shipped, images).f1 > 0.95


def test_too_coarse_is_refused(shipped: LearnedFinder) -> None:
    with pytest.raises(UserError, match="5 um/px is too coarse for this nucleus detector, expected at most 1"):
        shipped(np.zeros((10, 10, 3), np.uint8), 5.0)


def test_resampled() -> None:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    np.testing.assert_array_equal(resampled(image, 1.0), image)
    half = image.reshape(2, 2, 3, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(resampled(image, 0.5), half, atol=0.5)
    assert resampled(image, 0.01).shape == (1, 1, 3)
    assert resampled(image, 2.0).shape == (8, 12, 3)


def test_the_classical_finder_returns_what_detect_nuclei_does() -> None:
    image, _, _ = synthetic_image(0, 200, 0.5)
    for threshold in (None, 0.1):
        found = load_finder("classical")(image, 0.5, threshold=threshold)
        expected = detect_nuclei(image, 0.5, **({} if threshold is None else {"threshold": threshold}))
        for ours, theirs in zip((found.xy, found.score), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# ----------------------------------------------------------------------------------------------------------- files


def test_write_and_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NucleusNet().half().float().eval()
    path = tmp_path / "detector.safetensors"
    write_finder(path, LearnedFinder(network, 0.4, 0.3, 2.5), {"training_data": "synthetic", "test": {"f1": 0.5}})
    again = load_finder(str(path))
    assert isinstance(again, LearnedFinder)
    assert (again.mpp, again.threshold, again.min_distance_um) == (0.4, 0.3, 2.5)
    assert again.reach_um == pytest.approx(57.6)
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name
    assert path.stat().st_size < 6_000_000


def test_bad_files_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"

    def message() -> str:
        with pytest.raises(UserError) as caught:
            read_finder(bad)
        assert str(caught.value).startswith(f"{bad}: ")
        return str(caught.value)

    assert "no such file" in message()
    intact = SHIPPED["resnet18"].read_bytes()
    for damaged in (b"", b"version https://git-lfs", intact[:-1000], b"\xff" * 64 + intact[64:]):
        bad.write_bytes(damaged)
        assert "not a readable .safetensors file" in message()
    tensors = load_file(SHIPPED["resnet18"])
    save_file(tensors, bad)
    assert "not a muse_fast nucleus detector" in message()
    save_file(tensors, bad, {"kind": module.KIND, "mpp": "0.5"})
    assert "no number 'threshold'" in message()
    settings = {"kind": module.KIND, "mpp": "0.5", "threshold": "0.3", "min_distance_um": "2"}
    save_file({name: t for name, t in tensors.items() if name != "head.bias"}, bad, settings)
    assert "1 missing: head.bias" in message()
    save_file(tensors | {"head.bias": torch.zeros(2)}, bad, settings)
    assert "head.bias [2] instead of [1]" in message()


def test_unknown_detectors() -> None:
    with pytest.raises(UserError, match=r"detector=resnet: expected one of default, .*did you mean 'resnet18'"):
        load_finder("resnet")
    with pytest.raises(UserError, match=r"no/such\.safetensors: no such file"):
        load_finder("no/such.safetensors")


def _in_worker(name: str) -> tuple[int, set[int]]:
    """Number of nuclei, and of threads that the network ran with."""
    image, _, _ = synthetic_image(0, 256, 0.5)
    finder, threads = load_finder(name), set()
    assert isinstance(finder, LearnedFinder)
    finder.network.register_forward_pre_hook(lambda *_: threads.add(torch.get_num_threads()))
    return len(finder(image, 0.5)), threads


def test_a_spawned_worker_finds_the_same_with_one_thread() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        count, threads = pool.submit(_in_worker, "resnet18").result()
    assert (count, threads) == _in_worker("resnet18") and threads == {1} and count > 0


# -------------------------------------------------------------------------------------------------- shipped weights


def test_shipped_weights_on_test_images(shipped: LearnedFinder, shared_data: Path) -> None:
    """Every fifth of the test images, six in all: the F1 measured when the weights were trained."""
    source = open_source(f"brcam2c:{shared_data / 'brcam2c'}")
    test = [item for item in source if item.split == "test"]
    images = [Labelled(item.image, item.mpp, item.xy) for item in itertools.islice(test, 0, None, 5)]
    ours = scored(shipped, images).f1
    assert ours == pytest.approx(0.8397, abs=0.004)
    assert scored(load_finder("classical"), images).f1 == pytest.approx(0.7286, abs=0.004)
