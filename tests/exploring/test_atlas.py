from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.exploring.atlas import check_method, draw_atlas, fill_grid, place
from muse_fast.exploring.components import fit_colours, fit_components
from muse_fast.exploring.vectors import open_vectors
from tests.support.vector_files import draw_slide, some_files, write_vectors


@pytest.mark.parametrize(("count", "cells"), [(1, 1), (2, 2), (50, 1), (300, 7), (301, 20)])
def test_each_cell_has_the_nucleus_nearest_to_its_middle(count: int, cells: int) -> None:
    positions = np.random.default_rng(count).normal(size=(count, 2)) * (3, 0.1) + 7
    column, row, chosen = fill_grid(positions, cells)
    low, high = np.quantile(positions, (0.005, 0.995), axis=0)
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for index, position in enumerate(positions):
        if count == 1:
            x = y = cells / 2
        else:
            x, y = (np.clip((position - low) / (high - low), 0, 1) * cells).tolist()
            y = cells - y  # upwards
        cell = min(int(x), cells - 1), min(int(y), cells - 1)
        distance = math.dist((x, y), (cell[0] + 0.5, cell[1] + 0.5))
        if distance < best.get(cell, (9.0, 0))[0] - 1e-12:
            best[cell] = distance, index
    assert {(c, r): i for c, r, i in zip(column.tolist(), row.tolist(), chosen.tolist(), strict=True)} == {
        cell: index for cell, (_, index) in best.items()
    }


def test_all_at_one_place_is_one_crop() -> None:
    column, row, chosen = fill_grid(np.full((9, 2), 3.0), 3)
    assert (column.tolist(), row.tolist(), chosen.tolist()) == ([1], [1], [0])


def test_the_sheet_has_the_crops_in_the_frames_of_their_colours(tmp_path: Path) -> None:
    """Four vectors at the corners of a square, so each has a cell of its own."""
    xy = np.array([[40.0, 40], [140, 40], [240, 40], [340, 40]])
    paints = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [90, 90, 0]])
    vectors = np.array([[0.0, 0, 0], [2, 0, 0], [0, 1, 0], [2, 1, 0]], np.float32)
    draw_slide(tmp_path / "a.png", xy, paints)
    files = open_vectors([write_vectors(tmp_path / "a.h5ad", vectors, xy)])
    components, sample = fit_components(files)
    colours = fit_colours(components, sample)
    drawn = draw_atlas(files, sample, colours, "pca")
    assert (drawn.method, drawn.shown, drawn.problems) == ("PCA", 4, {})
    pixels = np.asarray(drawn.sheet.canvas)
    for index, (column, row) in enumerate([(0, 1), (1, 1), (0, 0), (1, 0)]):
        cell = pixels[10 + 44 * row :, 10 + 44 * column :][:44, :44]
        np.testing.assert_array_equal(cell[22, 22], paints[index])
        np.testing.assert_array_equal(cell[1, 22], colours(vectors[index : index + 1])[0])


def test_umap_places_the_nuclei_if_it_is_asked_for(tmp_path: Path) -> None:
    """With a package of that name which only doubles two of the numbers."""
    files = some_files(tmp_path, {"a": 31})
    components, sample = fit_components(files)
    colours = fit_colours(components, sample)
    given = {}

    class UMAP:
        def __init__(self, **settings: object) -> None:
            given.update(settings)

        def fit_transform(self, vectors: np.ndarray) -> np.ndarray:
            return 2 * vectors[:, :2]

    with mock.patch.dict(sys.modules, umap=SimpleNamespace(UMAP=UMAP)):
        positions, method = place(sample, colours, "umap")
        small, plain = place(type(sample)(*(column[:30] for column in sample)), colours, "umap")
        assert place(sample, colours, "pca")[1] == "PCA"
    assert method == "UMAP" and given["metric"] == "cosine" and given["random_state"] == 0
    np.testing.assert_array_equal(positions, 2 * sample.vectors[:, :2])
    assert plain == "PCA" and small.shape == (30, 2)


def test_umap_that_is_missing_is_said_at_once() -> None:
    with mock.patch.dict(sys.modules, umap=None):
        check_method("pca")
        with pytest.raises(UserError, match="atlas=umap needs umap-learn: pip install umap-learn"):
            check_method("umap")
