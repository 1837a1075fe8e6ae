from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from muse_fast.exploring.components import Colours, fit_colours, fit_components
from muse_fast.exploring.vectors import VectorFile, open_vectors
from tests.support.vector_files import some_files, write_vectors


def everything(files: list[VectorFile]) -> np.ndarray:
    blocks = [block.vectors for file in files for block in file.blocks()]
    return np.concatenate([np.zeros((0, files[0].dim)), *blocks])


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("rows", [1, 7, None])
def test_components_are_those_of_the_svd(tmp_path: Path, rows: int | None, offset: float) -> None:
    """Also of vectors far from zero, whose squares would swamp their differences."""
    near = some_files(tmp_path, {"a": 30, "b": 0, "c": 11})
    far = [write_vectors(tmp_path / "far" / file.path.name, everything([file]) + offset) for file in near]
    files = open_vectors(far)
    vectors = everything(files)
    centred = vectors - vectors.mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    components, _ = fit_components(files, 3, rows=rows)
    np.testing.assert_allclose(components.mean, vectors.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(components.axes, axes[:3], atol=1e-8)
    np.testing.assert_allclose(components.share, singular[:3] ** 2 / (singular**2).sum(), rtol=1e-8)
    np.testing.assert_allclose(components.project(vectors), centred @ axes[:3].T, atol=1e-6)


def test_components_are_those_of_sklearn(tmp_path: Path) -> None:
    from sklearn.decomposition import PCA

    files = some_files(tmp_path, {"a": 60, "b": 33}, dim=9)
    pca = PCA(3, svd_solver="full").fit(everything(files))
    components, _ = fit_components(files, 3, rows=13)
    np.testing.assert_allclose(components.axes, pca.components_, atol=1e-7)
    np.testing.assert_allclose(components.share, pca.explained_variance_ratio_, rtol=1e-7)


@pytest.mark.parametrize(
    "vectors", [np.zeros((0, 4)), np.ones((1, 4)), np.ones((9, 4)), np.outer(np.arange(9.0), [3, 4, 0, 0]), np.eye(2)]
)
def test_fewer_dimensions_than_components(tmp_path: Path, vectors: np.ndarray) -> None:
    """A component that does not exist is zero and gets the same colour everywhere, not enlarged rounding errors."""
    files = open_vectors([write_vectors(tmp_path / "a.h5ad", vectors.astype(np.float32))])
    components, sample = fit_components(files, 3)
    rank = np.linalg.matrix_rank(vectors - vectors.mean(axis=0)) if len(vectors) else 0
    assert [bool(axis.any()) for axis in components.axes] == [number < rank for number in range(3)]
    assert components.share.sum() == pytest.approx(1 if rank else 0)
    assert (fit_colours(components, sample)(vectors)[:, rank:] == 128).all()


def test_colours_do_not_depend_on_the_order_of_slides(tmp_path: Path) -> None:
    files = some_files(tmp_path, {"a": 50, "b": 31, "c": 1}, dim=7)
    vectors = everything(files)
    expected = fit_colours(*fit_components(files))(vectors)
    for order in ((2, 0, 1), (1, 2, 0)):
        again = open_vectors([files[number].path for number in order])
        np.testing.assert_array_equal(fit_colours(*fit_components(again))(vectors), expected)


def test_a_colour_is_the_place_between_two_quantiles(tmp_path: Path) -> None:
    files = open_vectors([write_vectors(tmp_path / "a.h5ad", np.arange(101.0)[:, None] * [[0, 1]])])
    colours = fit_colours(*fit_components(files))
    assert isinstance(colours, Colours)
    shades = colours(np.array([[0, -50.0], [0, 2], [0, 50], [0, 98], [0, 500]]))
    np.testing.assert_array_equal(shades[:, 0], (0, 0, 128, 255, 255))


@pytest.mark.parametrize("rows", [1, 5, None])
@pytest.mark.parametrize(("most", "expected"), [(3, [("a", 0), ("a", 4), ("c", 2)]), (1, [("a", 0)]), (20, None)])
def test_the_sample_is_spread_over_all_nuclei(
    tmp_path: Path, most: int, expected: list[tuple[str, int]] | None, rows: int | None
) -> None:
    files = some_files(tmp_path, {"a": 6, "b": 0, "c": 3})
    sample = fit_components(files, most=most, rows=rows)[1]
    chosen = [(files[f].slide, r) for f, r in zip(sample.file.tolist(), sample.row.tolist(), strict=True)]
    assert chosen == (expected or [("a", r) for r in range(6)] + [("c", r) for r in range(3)])
    for (slide, row), vector, xy in zip(chosen, sample.vectors, sample.xy, strict=True):
        file = next(file for file in files if file.slide == slide)
        np.testing.assert_array_equal(vector, file.vector(row))
        assert tuple(xy) == file.nuclei([row])[0][-2:]
