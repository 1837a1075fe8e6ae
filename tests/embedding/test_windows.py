"""Every nucleus in exactly one window, with enough tissue around it."""

from __future__ import annotations

import numpy as np
import pytest

from muse_fast.embedding.windows import Windows
from muse_fast.errors import UserError


@pytest.mark.parametrize(
    ("width", "height", "side", "margin"),
    [(1000, 700, 224, 32), (225, 224, 224, 0), (448, 96, 96, 32), (97, 5000, 96, 20), (50, 60, 224, 32), (1, 1, 32, 0)],
)
def test_each_nucleus_has_its_margin(width: int, height: int, side: int, margin: int) -> None:
    rng = np.random.default_rng(0)
    corners = [(0, 0), (width, height), (width, 0)]
    xy = np.concatenate([rng.uniform(0, 1, (300, 2)) * (width, height), np.array(corners, float)])
    windows = list(Windows(width, height, side, margin).occupied(xy))
    read = np.concatenate([window.nuclei for window in windows])
    assert sorted(read.tolist()) == list(range(len(xy)))
    for window in windows:
        for start, length, place in zip((window.left, window.top), (width, height), xy[window.nuclei].T, strict=True):
            first, last = max(start, 0), min(start + side, length)
            assert start < 0 or start + side <= length  # it shows no more beyond the page than it must
            assert first % 32 == 0 or last == length
            assert first == 0 or (place >= first + margin).all()
            assert last == length or (place <= last - margin).all()


def test_the_windows_do_not_depend_on_the_nuclei_or_their_order() -> None:
    xy = np.random.default_rng(1).uniform(0, 1000, (200, 2))
    grid = Windows(1000, 1000, 224, 32)
    number = grid.number(xy)
    assert len(np.unique(number)) > 20
    assert (grid.number(xy[::-1]) == number[::-1]).all()
    assert [len(window.nuclei) for window in grid.occupied(xy)] == np.unique(number, return_counts=True)[1].tolist()


def test_cores_cover_the_page_once() -> None:
    everywhere = np.stack(np.meshgrid(np.arange(0.5, 1000), np.arange(0.5, 300)), axis=2).reshape(-1, 2)
    windows = list(Windows(1000, 300, 224, 40).occupied(everywhere))
    assert [len(window.nuclei) for window in windows] == [window.area for window in windows]


def test_windows_without_a_core_are_refused() -> None:
    with pytest.raises(UserError, match="window=96: expected at least 112"):
        Windows(1000, 1000, 96, 40)
