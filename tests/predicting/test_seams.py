"""Every nucleus once at seams, whichever way two tiles disagree."""

from __future__ import annotations

import math

import numpy as np
import pytest

from muse_fast.predicting.seams import Found, Seams


def found(*points: tuple[float, float, float, int, bool]) -> Found:
    """Points (x, y, score, tile, owned)."""
    x, y, score, tile, owned = np.array(points, float).reshape(-1, 5).T
    number = tile.astype(int)
    return Found(np.stack([x, y], axis=1), np.zeros(len(x), int), score, number, owned.astype(bool), np.arange(len(x)))


def settled(*points: tuple[float, float, float, int, bool], radius: float = 3.0) -> list[tuple[float, float]]:
    return [tuple(xy) for xy in Seams(radius).settle([found(*points)], math.inf).xy.tolist()]


def test_the_owner_wins() -> None:
    assert settled((99, 5, 0.5, 0, True), (99.4, 5, 0.9, 1, False)) == [(99, 5)]


def test_claimed_by_both_the_higher_score_is_kept() -> None:
    assert settled((99.8, 5, 0.5, 0, True), (100.2, 5, 0.9, 1, True)) == [(100.2, 5)]


def test_claimed_by_neither_one_is_kept() -> None:
    assert settled((100.2, 5, 0.5, 0, False), (99.8, 5, 0.4, 1, False)) == [(100.2, 5)]


def test_a_single_witness_is_dropped() -> None:
    assert settled((101, 5, 0.9, 0, False)) == []


def test_neighbours_within_a_tile_are_both_kept() -> None:
    assert settled((50, 5, 0.5, 0, True), (51, 5, 0.9, 0, True)) == [(50, 5), (51, 5)]


def test_a_removed_point_removes_no_others() -> None:
    chain = (98, 5, 0.5, 0, True), (100, 5, 0.7, 1, True), (102, 5, 0.9, 2, True)
    assert settled(*chain) == [(98, 5), (102, 5)]


def test_a_witness_of_an_owned_nucleus_does_not_count_twice() -> None:
    points = (99, 5, 0.5, 0, True), (101, 5, 0.9, 0, False), (99.5, 5, 0.4, 1, False)
    assert settled(*points) == [(99, 5)]


@pytest.mark.parametrize("radius", [0.0, 2.0])
def test_no_points(radius: float) -> None:
    assert len(Seams(radius).settle([], math.inf)) == 0
    assert settled((1, 2, 0.5, 0, True), radius=radius) == [(1, 2)]


def test_row_by_row_equals_all_at_once() -> None:
    """The points are the same whether the page is settled in rows or at once."""
    rng = np.random.default_rng(0)
    rows, height = 12, 20.0
    parts = []
    for row in range(rows):
        y = rng.uniform(row * height - 3, (row + 1) * height + 3, 60)
        owned = (y >= row * height) & (y < (row + 1) * height)
        xy = np.stack([rng.uniform(0, 60, 60), y], axis=1)
        parts.append(
            Found(xy, np.zeros(60, int), rng.permutation(60) / 60 + row, np.full(60, row), owned, np.arange(60))
        )
    whole = Seams(3.0).settle(parts, math.inf)
    seams, pieces, most = Seams(3.0), [], 0
    for row, part in enumerate(parts):
        pieces.append(seams.settle([part], math.inf if row == rows - 1 else (row + 1) * height))
        most = max(most, len(seams._open))
    together = Found.concatenate(pieces)
    assert {tuple(p) for p in together.xy.tolist()} == {tuple(p) for p in whole.xy.tolist()}
    assert len(together) == len(whole) > 300
    assert 0 < most < 60  # what waits does not grow with the page
