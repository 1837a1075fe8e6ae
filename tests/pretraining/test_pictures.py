"""Pictures of pretraining: marks are where the tensors say, and the matches shown are the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from muse_fast.batch import PackedNuclei, Pairs, Views
from muse_fast.images.drawing import PALETTE
from muse_fast.images.imagenet import normalise
from muse_fast.ops.reference import match_nuclei
from muse_fast.pretraining import pictures
from muse_fast.pretraining.regions import NucleusTable
from muse_fast.roiset.records import Roi
from muse_fast.roiset.roiset import RoiSet, RoiSetWriter


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def has_colour(area: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((np.abs(area - np.array(colour)).max(axis=-1) <= 8).any())


def grey(count: int, side: int) -> Tensor:
    return normalise(torch.full((count, 3, side, side), 120, dtype=torch.uint8))


def pack(rows: list[list[tuple[float, float, int]]]) -> PackedNuclei:
    """Nuclei (x, y, index) per image."""
    flat = [row for image in rows for row in image]
    return PackedNuclei(
        torch.tensor([row[:2] for row in flat], dtype=torch.float32).reshape(-1, 2),
        torch.tensor([row[2] for row in flat], dtype=torch.int32),
        torch.tensor([0, *np.cumsum([len(image) for image in rows])], dtype=torch.int32),
    )


def two_rois(nuclei: PackedNuclei) -> tuple[Views, Pairs]:
    """Two ROIs, two globals of 64 px and one local of 32 px."""
    rows = int(nuclei.offsets[4])
    roi_ids, epochs = torch.tensor([7, 9]), torch.zeros(2).long()
    views = Views(grey(4, 64), grey(2, 32), nuclei, rows, torch.full((6,), 0.3), roi_ids, epochs)
    return views, Pairs(*match_nuclei(nuclei.index, nuclei.offsets, 2, 2))


def cell_at(sheet: np.ndarray, roi: int, view: int, cell: int) -> np.ndarray:
    """The inside of one cell of a contact sheet, without its frame."""
    top = 10 + roi * (22 + cell + 22 + 10) + 22
    left = 10 + view * (cell + 10)
    return sheet[top + 4 : top + cell - 4, left + 4 : left + cell - 4]


def test_contact_sheet_gives_a_nucleus_one_colour_in_all_views(tmp_path: Path) -> None:
    # Images: global 0 of ROI 0 and 1, global 1 of both, local 0 of both. ROI 0: nucleus 3 in all views, 5 only in
    # globals 0 and 1, 8 only in global 0. ROI 1 has no pairs.
    nuclei = pack(
        [
            [(16, 16, 3), (48, 48, 5), (48, 16, 8)], [(32, 32, 0)],
            [(40, 20, 3), (10, 50, 5)], [],
            [(8, 24, 3)], [(5, 5, 1)],
        ]
    )  # fmt: skip
    views, pairs = two_rois(nuclei)
    pictures.contact_sheet(tmp_path / "sub" / "sheet.png", views, pairs, cell=160)
    sheet = read(tmp_path / "sub" / "sheet.png")
    assert sheet.shape == (10 + 2 * (22 + 160 + 22 + 10), 10 + 3 * 170, 3)

    first, second = PALETTE[:2]
    shown = [[has_colour(cell_at(sheet, 0, view, 160), colour) for view in range(3)] for colour in (first, second)]
    assert shown == [[True, True, True], [True, True, False]]
    assert not any(has_colour(cell_at(sheet, 1, view, 160), colour) for view in range(3) for colour in (first, second))
    # Nucleus 3 is at (8, 24) of 32 px in the local view: (40, 120) of 160 px, minus the frame of 4.
    rows, columns = np.nonzero(np.abs(cell_at(sheet, 0, 2, 160) - np.array(first)).max(axis=-1) <= 8)
    ring = (np.hypot(columns + 4 - 40, rows + 4 - 120) < 9).sum()
    assert ring > 40
    assert not has_colour(cell_at(sheet, 0, 2, 160)[:80], first)
    # Frames distinguish globals and locals.
    assert tuple(sheet[10 + 22, 10]) == pictures.GLOBAL_COLOUR
    assert tuple(sheet[10 + 22, 10 + 2 * 170]) == pictures.LOCAL_COLOUR


def test_contact_sheet_without_nuclei_or_locals(tmp_path: Path) -> None:
    nuclei = pack([[], [], [], []])
    views = Views(
        grey(4, 64), torch.empty(0, 3, 32, 32), nuclei, 0, torch.ones(4), torch.tensor([0, 1]), torch.zeros(2).long()
    )
    none = torch.empty(0, dtype=torch.int64)
    pictures.contact_sheet(tmp_path / "sheet.png", views, Pairs(none, none), rois_shown=1, cell=96)
    assert read(tmp_path / "sheet.png").shape == (10 + 22 + 96 + 22 + 10, 10 + 2 * 106, 3)


def test_numbers_go_to_nuclei_that_most_views_share(tmp_path: Path) -> None:
    """With more nuclei than colours, those in three views come before those in two."""
    grid = [(float(x), float(y)) for y in range(4, 64, 8) for x in range(4, 64, 8)]
    everywhere = set(range(0, 16, 2))
    globals_ = [(x, y, i) for i, (x, y) in enumerate(grid[:16])]
    local = [(x / 2, y / 2, i) for x, y, i in globals_ if i in everywhere]
    views, pairs = two_rois(pack([globals_, [], globals_, [], local, []]))
    numbers = pictures._numbered_rows(views, pairs, 0)
    in_global_0 = {row for row in numbers if row < 16}
    assert len(in_global_0) == len(PALETTE)
    assert everywhere <= in_global_0
    index = views.nuclei.index.tolist()
    for number in range(len(PALETTE)):
        assert len({index[row] for row, value in numbers.items() if value == number}) == 1


def test_colours_are_principal_components() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 3)) * (9, 5, 3) @ rng.normal(size=(3, 20)) + rng.normal(size=(200, 20))
    truth = PCA(3).fit_transform(StandardScaler().fit_transform(features))
    low, high = np.quantile(truth, (0.02, 0.98), axis=0)
    expected = np.clip((truth - low) / (high - low), 0, 1)
    colours = pictures.principal_colours(torch.from_numpy(features))
    flipped = np.abs(colours - expected).max(0) > np.abs(1 - colours - expected).max(0)  # a component has no sign
    np.testing.assert_allclose(np.where(flipped, 1 - colours, colours), expected, atol=1e-8)


def test_colours_of_none_one_and_equal_rows() -> None:
    assert pictures.principal_colours(torch.zeros(0, 8)).shape == (0, 3)
    for rows in (torch.randn(1, 8), torch.ones(5, 8)):
        colours = pictures.principal_colours(rows)
        assert colours.shape == (len(rows), 3) and np.ptp(colours, axis=0).max() < 1e-6


def test_pca_picture_separates_what_the_map_separates(tmp_path: Path) -> None:
    """Left and right halves of the first network's map differ along one direction, so both maps show two flat colours;
    in the second network's map, top and bottom do."""
    noise = torch.randn(2, 2, 16, 8, 8)
    direction, side = torch.randn(16)[None, :, None, None], torch.where(torch.arange(8) < 4, -10.0, 10.0)
    maps = {"after": direction * side + 0.01 * noise[0], "before": direction * side[:, None] + 0.01 * noise[1]}
    pictures.pca_picture(tmp_path / "pca.png", torch.full((2, 3, 32, 32), 120, dtype=torch.uint8), maps, cell=64)
    sheet = read(tmp_path / "pca.png")
    assert sheet.shape == (10 + 22 + 2 * 74, 10 + 3 * 66 + 10, 3)

    def halves(row: int, column: int, axis: int) -> tuple[float, float]:
        area = sheet[32 + row * 74 :, 10 + column * 66 :][:64, :64, 0]
        first, second = (np.moveaxis(area, axis, 0)[part] for part in (slice(24), slice(40, None)))
        assert max(first.std(), second.std()) < 3
        return first.mean(), second.mean()

    for column, axis in ((1, 1), (2, 0)):
        first, second = halves(0, column, axis)
        assert abs(first - second) > 240
        assert halves(1, column, axis) == pytest.approx((first, second), abs=2)  # one colour scheme for all maps
    assert np.abs(sheet[32:96, 10:74] - 120).max() <= 1  # the view next to them


def rois_in_a_row(tmp_path: Path, nuclei: Sequence[Sequence[tuple[float, float]]]) -> list[Roi]:
    """ROIs of 40 px at 1 um/px, side by side on a slide; the pixels of a ROI are all of one grey, 100, 120, ..."""
    with RoiSetWriter(tmp_path / "rois", provenance={}) as writer:
        for number, xy in enumerate(nuclei):
            image = np.full((40, 40, 3), 100 + 20 * number, np.uint8)
            writer.add(image, mpp=1.0, xy=xy, slide="slide", origin=(1000 + 40 * number, 500))
    return list(RoiSet(tmp_path / "rois"))


def table_of(rois: Sequence[Roi], features: Tensor) -> NucleusTable:
    counts = torch.tensor([len(roi.xy) for roi in rois])
    return NucleusTable(
        torch.arange(len(rois)).repeat_interleave(counts), np.concatenate([roi.xy for roi in rois]), features
    )


def test_retrieval_sheet_shows_the_nearest_nuclei_of_other_rois(tmp_path: Path) -> None:
    # The nucleus at (2, 2) is too close to the border for a crop. Each other nucleus is its ROI's only one.
    rois = rois_in_a_row(tmp_path, [[(20, 20), (2, 2)], [(20, 20)], [(20, 20)]])
    tables = {
        "after": table_of(rois, torch.tensor([[1.0, 0, 0], [0, 0.9, 1], [0, 0.2, 1], [0, 1, 0.1]])),
        "before": table_of(rois, torch.tensor([[1.0, 0.2, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]])),
    }
    pictures.retrieval_sheet(tmp_path / "r.png", rois, tables, queries=1, neighbours=3, crop_um=10, cell=80)
    sheet = read(tmp_path / "r.png")
    assert sheet.shape == (10 + 22 + 112, 20 + 84 + 2 * (3 * 84 + 20), 3)
    greys = sheet[32 + 2, [10 + 2, *(134 + 272 * network + 84 * place for network in (0, 1) for place in (0, 1, 2))], 0]
    # The query is the middle one of the three nuclei, in ROI 1; a ROI of one nucleus has two of others.
    assert greys == pytest.approx([120, 140, 100, 255, 100, 140, 255], abs=1)


def test_region_picture_puts_nuclei_where_they_are(tmp_path: Path) -> None:
    rois = rois_in_a_row(tmp_path, [[(10, 30)], [], [(30, 10), (35, 35)]])
    table = table_of(rois, torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]))
    pictures.region_picture(tmp_path / "region.png", rois, {"after": table}, side=240)
    sheet = read(tmp_path / "region.png")
    assert sheet.shape == (10 + 22 + 80 + 10, 10 + 2 * 250, 3)  # 120 x 40 px, twice as large
    tissue, painted = sheet[32:112, 10:250], sheet[32:112, 260:500]
    assert tissue[40, [40, 120, 200], 0] == pytest.approx([100, 120, 140], abs=1)
    coloured = painted.min(axis=2) < 60  # on pale grey
    y, x = np.mgrid[:80, :240] + 0.5
    away = np.min([np.hypot(x - left, y - top) for left, top in ((20, 60), (220, 20), (230, 70))], axis=0)
    assert coloured[away < 7].all() and not coloured[away > 9.5].any()  # discs of 8 px, 4 um


def test_pictures_of_rois_without_nuclei(tmp_path: Path) -> None:
    rois = rois_in_a_row(tmp_path, [[], []])
    tables = {"after": table_of(rois, torch.zeros(0, 8))}
    pictures.retrieval_sheet(tmp_path / "retrieval.png", rois, tables)
    pictures.region_picture(tmp_path / "region.png", rois, tables, side=100)
    assert read(tmp_path / "region.png").shape[0] == 10 + 22 + 50 + 10
