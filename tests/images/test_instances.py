"""Centroids and classes from instance maps, against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from muse_fast.errors import UserError
from muse_fast.images.instances import instance_centroids, instance_types, integer_map


def test_against_scipy() -> None:
    rng = np.random.default_rng(0)
    instances = rng.integers(0, 40, (37, 53)) * 7  # ids with gaps, instances in pieces
    numbers, xy = instance_centroids(instances)
    np.testing.assert_array_equal(numbers, np.unique(instances)[1:])
    expected = ndimage.center_of_mass(np.ones_like(instances), instances, numbers)
    np.testing.assert_allclose(xy, np.array(expected)[:, ::-1] + 0.5, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_one_pixel_one_row_and_empty(dtype: type) -> None:
    instances = np.zeros((3, 5), dtype)
    assert [part.shape for part in instance_centroids(instances)] == [(0,), (0, 2)]
    instances[0, 0], instances[2, 1:5] = 9, 200
    numbers, xy = instance_centroids(instances)
    assert numbers.tolist() == [9, 200]
    assert xy.tolist() == [[0.5, 0.5], [3.0, 2.5]]


def test_types_by_majority() -> None:
    instances = np.array([[5, 5, 5, 0], [5, 8, 8, 8], [0, 8, 9, 9]])
    types = np.array([[2, 2, 1, 4], [1, 3, 0, 0], [4, 0, 0, 0]])
    numbers, _ = instance_centroids(instances)
    # 5: a tie of 1 and 2; 8: background except for one pixel; 9: only background; type 4 is outside all instances.
    assert instance_types(instances, types, numbers).tolist() == [1, 3, 0]
    empty = np.zeros((2, 2), int)
    assert instance_types(empty, empty, np.zeros(0, np.int64)).tolist() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 3)), r"here has the shape \[2, 3\], expected \[2, 2\]"),
        (np.full((2, 2), 0.5), r"here contains float64 from 0.5 to 0.5, expected whole numbers from 0 to 9"),
        (np.full((2, 2), 10), r"here contains int64 from 10 to 10"),
        (np.full((2, 2), -1), r"here contains int64 from -1"),
        (np.full((2, 2), np.inf), r"here contains float64 from inf"),
        (np.full((2, 2), "a"), r"here contains <U1"),
    ],
)
def test_invalid_maps_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        integer_map(values, (2, 2), 9, "here")


def test_maps_stored_as_floats() -> None:
    found = integer_map(np.array([[0.0, 9.0]]), (1, 2), 9, "here")
    assert found.dtype == np.int64
    assert found.tolist() == [[0, 9]]
