from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from muse_fast.exploring.neighbours import Place, describe, find_neighbours, nearest_nucleus
from muse_fast.exploring.vectors import VectorFile, open_vectors
from tests.support.vector_files import some_files, write_vectors


def naive(files: list[VectorFile], query: Place, top: int, apart_um: float) -> tuple[list[Place], list[float]]:
    """Nucleus by nucleus, with exact sums."""
    content = [next(file.blocks(), None) for file in files]
    mine, at = content[query.file].vectors[query.row].astype(float), content[query.file].xy[query.row]
    found = []
    for number, (file, block) in enumerate(zip(files, content, strict=True)):
        for row in range(file.count):
            place, other = Place(number, row), block.vectors[row].astype(float)
            near = number == query.file and math.dist(block.xy[row], at) * file.slide_mpp < apart_um
            if place == query or near:
                continue
            length = math.sqrt(math.fsum(mine**2)) * math.sqrt(math.fsum(other**2))
            found.append((-math.fsum(mine * other) / length if length else 0.0, place))
    found = sorted(found)[:top]
    return [place for _, place in found], [-value for value, _ in found]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[VectorFile]:
    """Whole numbers, whose sums are exact, so that vectors at equal angles tie: some are equal, or twice another."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    base = rng.integers(-2, 3, (6, 4)).astype(np.float16)
    for slide, count in {"a": 9, "b": 0, "c": 1, "d": 17}.items():
        vectors = base[rng.integers(0, len(base), count)] * rng.choice([1, 2, 4], (count, 1)).astype(np.float16)
        write_vectors(folder / f"{slide}.h5ad", vectors)
    vectors = np.concatenate([np.zeros((1, 4)), base])
    write_vectors(folder / "e.h5ad", vectors.astype(np.float16))
    return open_vectors(sorted(folder.glob("*.h5ad")))


@pytest.mark.parametrize("rows", [1, 3, None])
@pytest.mark.parametrize("top", [1, 5, 100])
@pytest.mark.parametrize("apart_um", [0.0, 45.0, math.inf])
def test_neighbours_are_those_of_a_naive_search(
    files: list[VectorFile], rows: int | None, top: int, apart_um: float
) -> None:
    queries = [Place(0, 0), Place(0, 8), Place(2, 0), Place(3, 5), Place(4, 1)]
    found = find_neighbours(files, queries, top, apart_um=apart_um, rows=rows)
    for query, neighbours in zip(queries, found, strict=True):
        places, similarity = naive(files, query, top, apart_um)
        assert neighbours.places == places
        np.testing.assert_allclose(neighbours.similarity, similarity, atol=1e-12)


def test_similarities_do_not_depend_on_the_block(tmp_path: Path) -> None:
    """To the last bit, or nuclei with equal vectors would come in an order of their own."""
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(1, 383)), 21, axis=0).astype(np.float32)
    vectors[0] = rng.normal(size=383)
    files = open_vectors([write_vectors(tmp_path / "a.h5ad", vectors)])
    found = [find_neighbours(files, [Place(0, 0)], 20, rows=rows)[0] for rows in (1, 4, 7, None)]
    assert all(one.places == [Place(0, row) for row in range(1, 21)] for one in found)
    assert len({value for one in found for value in one.similarity.tolist()}) == 1


def test_of_a_single_nucleus_there_are_no_neighbours(tmp_path: Path) -> None:
    (found,) = find_neighbours(some_files(tmp_path, {"a": 1}), [Place(0, 0)], 5)
    assert found.places == [] and len(found.similarity) == 0


def test_nuclei_are_described_in_the_given_order(files: list[VectorFile]) -> None:
    places = [Place(3, 5), Place(0, 2), Place(3, 1), Place(3, 5)]
    assert [nucleus.name for nucleus in describe(files, places)] == ["d:5", "a:2", "d:1", "d:5"]


def test_nearest_nucleus(files: list[VectorFile]) -> None:
    assert nearest_nucleus(files[0], 101, 20) == (2, 1.0)
    assert nearest_nucleus(files[0], 40, 20) == (0, 20.0)  # as near as the next
    assert nearest_nucleus(files[1], 0, 0) == (-1, math.inf)
