"""Tiles, with every pixel in exactly one core and a margin around every core; tissue."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.images.slide import Lost, Overview
from muse_fast.predicting.tiles import ALIGNMENT, Grid, Tissue


@pytest.mark.parametrize(("width", "height"), [(1, 1), (95, 96), (97, 140), (128, 500), (1000, 129), (333, 262)])
def test_cores_cover_the_page_once(width: int, height: int) -> None:
    tile, margin = 96, 19
    owners = np.zeros((height, width), int)
    for number, one in enumerate(Grid(SimpleNamespace(width=width, height=height), tile, margin).tiles()):
        assert one.number == number
        owners[one.y.core : one.y.end, one.x.core : one.x.end] += 1
        for span, side in ((one.x, width), (one.y, height)):
            assert 0 <= span.start <= span.core < span.end <= span.stop <= side
            assert span.start % ALIGNMENT == 0 and span.length == min(tile, side - span.start)
            assert span.start == 0 or span.core - span.start >= margin
            assert span.stop == side or span.stop - span.end >= margin
    assert (owners == 1).all()


def test_tiles_too_small_for_a_core_are_refused() -> None:
    with pytest.raises(UserError, match=r"tile=64: expected at least 96, as 32 px around a nucleus affect it"):
        Grid(SimpleNamespace(width=100, height=100), 64, 32)


def test_tissue() -> None:
    thumbnail = np.full((50, 60, 3), 245, np.uint8)
    thumbnail[10:30, 20:50] = (200, 90, 150)
    page = SimpleNamespace(width=960, height=800, mpp=0.5, overview=lambda um, limit: Overview(thumbnail, Lost()))
    tissue = Tissue(page, everywhere=False, max_unreadable=0)
    assert tissue.area_mm2 == pytest.approx(20 * 30 * 64e-6)
    xy = np.array([[320, 160], [799.9, 479.9], [288, 200], [287.9, 200], [500, 511.9], [500, 512], [959.9, 799.9]])
    assert tissue.contains(xy).tolist() == [True, True, True, False, True, False, False]  # a rim of 2 mask pixels
    assert tissue.overlaps(0, 0, 289, 200)
    assert not tissue.overlaps(0, 0, 288, 800)
    everywhere = Tissue(page, everywhere=True, max_unreadable=0)
    assert everywhere.area_mm2 == pytest.approx(0.48 * 0.4)
    assert everywhere.contains(xy).all() and everywhere.overlaps(0, 0, 1, 1)
