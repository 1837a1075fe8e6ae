"""Pictures of pretraining: marks are where the tensors say, and the matches shown are the true ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from muse_fast.batch import PackedNuclei, Pairs, Views
from muse_fast.images.drawing import PALETTE
from muse_fast.images.imagenet import normalise
from muse_fast.ops.reference import match_nuclei
from muse_fast.pretraining import pictures


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


def test_pca_picture_separates_what_the_map_separates(tmp_path: Path) -> None:
    """Left and right halves of the map differ along one direction, so both maps show two flat colours."""
    generator = torch.Generator().manual_seed(0)
    direction, noise = torch.randn(16, generator=generator), torch.randn(2, 16, 8, 8, generator=generator)
    side = torch.where(torch.arange(8) < 4, -1.0, 1.0)
    dense = direction[None, :, None, None] * side * 10 + 0.01 * noise
    pictures.pca_picture(tmp_path / "pca.png", grey(2, 32), dense, cell=64)
    sheet = read(tmp_path / "pca.png")
    assert sheet.shape == (10 + 22 + 74, 10 + 2 * 148, 3)
    reds = []
    for i in range(2):
        area = sheet[10 + 22 : 10 + 22 + 64, 10 + i * 148 + 66 : 10 + i * 148 + 130]
        left, right = area[:, :24, 0], area[:, 40:, 0]
        assert abs(left.mean() - right.mean()) > 240
        assert max(left.std(), right.std()) < 3
        reds.append((left.mean(), right.mean()))
        assert np.abs(sheet[40:90, 14 + i * 148 : 60 + i * 148] - 120).max() <= 1  # the image next to it
    assert reds[0] == pytest.approx(reds[1], abs=2)  # one colour scheme for all maps


def test_retrieval_sheet_marks_the_same_nucleus(tmp_path: Path) -> None:
    # Four images: two views of two ROIs. Nucleus 0 of ROI 0 finds its partner first; nucleus 0 of ROI 1 finds a wrong
    # one first and its partner second.
    nuclei = pack([[(10, 10, 0)], [(20, 20, 0)], [(30, 30, 0)], [(40, 40, 0)]])
    features = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.95, 0.3, 0], [0, 0.2, 1.0]])
    roi_of_image = torch.tensor([0, 1, 0, 1])
    pictures.retrieval_sheet(
        tmp_path / "r.png", grey(4, 48), nuclei, features, roi_of_image, neighbours=3, patch=16, cell=80
    )
    sheet = read(tmp_path / "r.png")
    assert sheet.shape == (10 + 22 + 2 * 112, 560, 3)

    def frame(line: int, place: int) -> tuple[int, ...]:
        left = 10 + place * 90 + (10 if place else 0)
        return tuple(sheet[10 + 22 + line * 112 + 1, left + 40])

    assert [frame(0, place) for place in (1, 2, 3)] == [pictures.MATCH_COLOUR, *[pictures.MISS_COLOUR] * 2]
    assert [frame(1, place) for place in (1, 2)] == [pictures.MISS_COLOUR, pictures.MATCH_COLOUR]


def test_retrieval_sheet_of_nothing_and_of_one(tmp_path: Path) -> None:
    for rows in ([[], []], [[(3.0, 4.0, 2)], []]):
        nuclei = pack(rows)
        features = torch.ones(nuclei.xy.shape[0], 8)
        pictures.retrieval_sheet(tmp_path / "r.png", grey(2, 32), nuclei, features, torch.tensor([0, 1]))
        assert read(tmp_path / "r.png").shape[1] >= 560
