"""Windows over ROIs, features of their nuclei, choice of a region, and neighbours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from muse_fast.config import ViewsConfig
from muse_fast.images.imagenet import normalise
from muse_fast.images.synthetic import synthetic_image
from muse_fast.models.backbone import build_backbone
from muse_fast.pretraining import regions
from muse_fast.pretraining.regions import NucleusTable
from muse_fast.roiset.records import Roi, encode_jpeg
from muse_fast.roiset.roiset import RoiSet, RoiSetWriter

VIEWS = ViewsConfig(global_size=96, global_mpp_min=0.4, global_mpp_max=0.6)


def roi_of(width: int, height: int, xy: np.ndarray, mpp: float = 0.5, image: np.ndarray | None = None) -> Roi:
    jpeg, none = b"" if image is None else encode_jpeg(image), np.zeros(len(xy), np.int16)
    return Roi(0, jpeg, width, height, mpp, "slide", "", (0, 0), xy.astype(np.float32), none, none, Path())


@pytest.mark.parametrize(
    ("width", "height", "count"), [(288, 288, 1), (289, 288, 2), (1000, 577, 4 * 3), (100, 300, 3), (1, 1, 1)]
)
def test_windows_cover_the_roi_evenly(width: int, height: int, count: int) -> None:
    boxes = regions.windows(roi_of(width, height, np.zeros((0, 2))), 288, 0.5)
    assert len(boxes) == count and {box.size for box in boxes} == {288}
    side = min(288, width, height)
    assert {box.side for box in boxes} == {side}
    covered = np.zeros((height, width), int)
    for box in boxes:
        assert box.x + side <= width and box.y + side <= height
        covered[box.y : box.y + side, box.x : box.x + side] += 1
    assert covered.min() == 1


@pytest.mark.parametrize(("side", "size"), [(400, 288), (231, 288), (230, 192), (80, 96)])
def test_windows_are_as_large_as_the_smallest_roi_allows(side: int, size: int, tmp_path: Path) -> None:
    """288 px, three global views, are 115.2 um at the finest scale: 230.4 px of a ROI at 0.5 um/px."""
    with RoiSetWriter(tmp_path / "rois", provenance={}) as writer:
        for width in (400, side):
            writer.add(np.zeros((400, width, 3), np.uint8), mpp=0.5, xy=np.zeros((0, 2)), slide="slide")
    assert regions.window_size(RoiSet(tmp_path / "rois"), VIEWS) == size


def test_a_window_has_its_scale_and_is_in_the_middle() -> None:
    box = regions.middle_window(roi_of(2048, 2000, np.zeros((0, 2)), mpp=0.25), 288, 0.5)
    assert box.mpp(0.25) == pytest.approx(0.5) and (box.x, box.y) == ((2048 - 576) // 2, (2000 - 576) // 2)


def test_features_are_those_of_the_window_in_whose_middle_a_nucleus_is(thin: None) -> None:
    image, _, _ = synthetic_image(0, 400, 0.5)
    xy = np.array([[399.5, 5.25], [60.0, 210.0], [200.0, 200.0], [0.0, 0.0]])
    roi = roi_of(400, 400, xy, image=image)
    backbone = build_backbone("vit_tiny", image_size=64).eval()
    boxes = regions.windows(roi, 256, 0.5)
    table = regions.nucleus_tables({"it": backbone}, [roi, roi], [boxes, boxes[:1]])["it"]
    assert table.roi.tolist() == [0] * 4 + [1] * 3  # the first window, 256 px at the corner, lacks one
    numbers = [2, 3, 0, 1]  # window after window: those at 0 and at 144 px
    pixels = torch.from_numpy(roi.decode()).permute(2, 0, 1)
    for row, number in enumerate(numbers):
        x, y = (int(144 * (value > 200)) for value in xy[number])
        crop = normalise(pixels[None, :, y : y + 256, x : x + 256])
        point = torch.tensor(xy[number] - (x, y), dtype=torch.float32)[None]
        expected = backbone.nucleus_features(crop, point, torch.tensor([0]))
        torch.testing.assert_close(table.features[row], expected[0], rtol=1e-4, atol=1e-4)
        assert table.xy[row].tolist() == xy[number].tolist()


def test_a_roi_without_nuclei_has_no_rows(thin: None) -> None:
    image, _, _ = synthetic_image(0, 64, 0.5)
    roi = roi_of(64, 64, np.zeros((0, 2)), image=image)
    networks = {"it": build_backbone("vit_tiny").eval()}
    table = regions.nucleus_tables(networks, [roi], [regions.windows(roi, 64, 0.5)])["it"]
    assert len(table.roi) == len(table.xy) == 0 and table.features.shape == (0, 32)


def test_a_region_is_in_the_middle_of_the_largest_slide_and_does_not_overlap(tmp_path: Path) -> None:
    image = np.full((40, 40, 3), 200, np.uint8)
    grid = [(40 * column, 40 * row) for row in range(5) for column in range(5)]
    with RoiSetWriter(tmp_path / "rois", provenance={}) as writer:
        for origin in [*grid, (85, 85)]:  # the last one overlaps others
            writer.add(image, mpp=1.0, xy=np.zeros((0, 2)), slide="large", origin=origin)
        for origin in grid[:20]:
            writer.add(image, mpp=1.0, xy=np.zeros((0, 2)), slide="small", origin=origin)
    roiset = RoiSet(tmp_path / "rois")
    ids = np.random.default_rng(0).permutation(len(roiset))
    assert regions.neighbouring_rois(roiset, ids, 1000) == list(range(25))
    assert regions.neighbouring_rois(roiset, ids, 120) == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert regions.neighbouring_rois(roiset, ids, 10) == [12]  # at least one
    assert regions.neighbouring_rois(roiset, ids[ids >= 26], 1000) == list(range(26, 46))


def random_table(counts: list[int]) -> NucleusTable:
    roi = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    return NucleusTable(roi, np.zeros((len(roi), 2), np.float32), torch.randn(len(roi), 6))


def test_neighbours_are_those_of_sklearn() -> None:
    table = random_table([20, 7, 13])
    queries = torch.tensor([0, 25, 39])
    cosines, nearest = regions.nearest_elsewhere(table, queries, 5)
    for query, values, rows in zip(queries.tolist(), cosines, nearest, strict=True):
        others = np.flatnonzero(table.roi != table.roi[query])
        search = NearestNeighbors(n_neighbors=5, metric="cosine").fit(table.features[others].double())
        distances, found = search.kneighbors(table.features[[query]].double())
        assert rows.tolist() == others[found[0]].tolist()
        np.testing.assert_allclose(values, 1 - distances[0], atol=1e-5)
    assert regions.nearest_elsewhere(table, queries, 30)[1].shape == (3, 20)  # as many as every query has
    assert regions.nearest_elsewhere(random_table([]), torch.tensor([], dtype=torch.long), 5)[1].shape == (0, 0)


def test_share_of_neighbours_in_other_rois() -> None:
    table = random_table([30, 10, 20])
    search = NearestNeighbors(n_neighbors=6, metric="cosine").fit(table.features.double())
    found = search.kneighbors(table.features.double(), return_distance=False)[:, 1:]  # the first is the nucleus itself
    roi = table.roi.numpy()
    expected = (roi[found] != roi[:, None]).mean()
    chance = (30 * 30 + 10 * 50 + 20 * 40) / (60 * 59)
    assert regions.share_elsewhere(table) == pytest.approx((expected, chance), abs=1e-12)
    by_roi = dataclasses.replace(table, features=torch.eye(3)[table.roi] + 0.01 * torch.randn(60, 3))
    assert regions.share_elsewhere(by_roi)[0] == 0
    assert regions.share_elsewhere(random_table([3, 2])) is None
    assert regions.share_elsewhere(random_table([])) is None
