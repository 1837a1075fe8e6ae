from __future__ import annotations

import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.exploring import vectors
from muse_fast.exploring.components import fit_colours, fit_components
from muse_fast.exploring.neighbours import Place, find_neighbours, nearest_nucleus
from muse_fast.exploring.overview import colour_nuclei
from muse_fast.exploring.vectors import find_vectors, open_vectors
from tests.support.vector_files import some_files, write_vectors


@pytest.mark.parametrize("rows", [1, 3, 7, None])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_blocks_are_the_whole_file(tmp_path: Path, count: int, rows: int | None) -> None:
    rng = np.random.default_rng(0)
    stored, xy = rng.normal(size=(count, 4)).astype(np.float16), rng.uniform(0, 99, (count, 2))
    (file,) = open_vectors([write_vectors(tmp_path / "a.h5ad", stored, xy)])
    blocks = list(file.blocks(rows))
    assert (file.slide, file.count, file.dim, file.slide_mpp) == ("a", count, 4, 0.5)
    assert [block.first for block in blocks] == list(range(0, count, rows or 100))
    assert all(block.vectors.dtype == np.float16 and len(block.vectors) <= (rows or 100) for block in blocks)
    np.testing.assert_array_equal(np.concatenate([stored[:0], *(block.vectors for block in blocks)]), stored)
    np.testing.assert_array_equal(np.concatenate([xy[:0], *(block.xy for block in blocks)]), xy)
    np.testing.assert_array_equal(np.concatenate([xy[:0], *(part for _, part in file.positions())]), xy)


def test_what_the_file_says_about_a_nucleus(tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "ä.h5ad", np.eye(3), kinds=["tumour", None, "stroma"])
    (file,) = open_vectors([path])
    last, second = file.nuclei([2, 1])
    assert last == ("ä:2", "stroma", 1.0, 100.0, 20.0)
    assert (second.name, second.kind, second.score) == ("ä:1", "", 0.75)
    assert file.classes == {"stroma": 1, "tumour": 1}
    np.testing.assert_array_equal(file.vector(2), (0, 0, 1))


def test_the_order_of_the_paths_does_not_matter(tmp_path: Path) -> None:
    files = some_files(tmp_path, {"b": 2, "c": 0, "a": 3})
    assert [file.slide for file in files] == ["a", "b", "c"]
    assert open_vectors([file.path for file in files]) == files


def test_files_in_folders(tmp_path: Path) -> None:
    some_files(tmp_path / "one", {"a": 1, "b": 1})
    some_files(tmp_path / "two" / "deeper", {"c": 1})
    found = find_vectors([tmp_path / "one" / "a.h5ad", tmp_path])
    assert {path.name for path in found} == {"a.h5ad", "b.h5ad", "c.h5ad"} and len(found) == 3


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (
            {},
            {"weights_sha256": "b" * 64, "weights": "b.pth"},
            f"random:vit_tiny and b.pth, sha256 {'a' * 64} and {'b' * 64}",
        ),
        ({"weights_sha256": ""}, {"weights_sha256": "", "weights": "random:resnet50"}, "vit_tiny and random:resnet50"),
        ({}, {"weights_sha256": ""}, f"sha256 {'a' * 64} and none"),
        ({}, {"protocol": "crop"}, "protocols are map and crop"),
        ({}, {"mpp": 0.53}, "0.5 and 0.53 um/px"),
        ({}, {"dim": 4}, "vectors have 3 and 4 numbers"),
    ],
)
def test_files_that_cannot_be_compared(
    tmp_path: Path, ours: dict[str, object], theirs: dict[str, object], said: str
) -> None:
    dim = {"a": 3, "b": theirs.get("dim", 3)}
    record = {"a": ours, "b": {key: value for key, value in theirs.items() if key != "dim"}}
    paths = [write_vectors(tmp_path / f"{name}.h5ad", np.ones((2, dim[name])), **record[name]) for name in "ab"]
    with pytest.raises(UserError, match=said) as error:
        open_vectors(paths)
    assert all(str(path) in str(error.value) for path in paths)


def test_slides_read_at_almost_the_same_scale_can_be_compared(tmp_path: Path) -> None:
    paths = [write_vectors(tmp_path / f"{mpp}.h5ad", np.ones((1, 3)), mpp=mpp) for mpp in (0.491, 0.509)]
    assert len(open_vectors(paths)) == 2


def test_what_is_no_file_of_embed(tmp_path: Path) -> None:
    good = write_vectors(tmp_path / "good" / "a.h5ad", np.ones((2, 3)))
    write_vectors(tmp_path / "again" / "a.h5ad", np.ones((2, 3)))
    (tmp_path / "text.h5ad").write_text("no HDF5")
    (tmp_path / "empty").mkdir()
    for name, change in {
        "record": lambda file: file["uns"].pop("muse_fast"),
        "entry": lambda file: file["uns/muse_fast"].pop("mpp"),
        "class": lambda file: file["obs"].pop("class"),
        "plain": lambda file: (file["obs"].pop("class"), file["obs"].create_dataset("class", data=[1, 2])),
        "sparse": lambda file: (file.pop("X"), file.create_group("X")),
    }.items():
        with h5py.File(write_vectors(tmp_path / f"{name}.h5ad", np.ones((2, 3))), "r+") as file:
            change(file)
    for paths, said in (
        ([tmp_path / "text.h5ad"], "text.h5ad: not a file of muse_fast.embed, or damaged"),
        ([tmp_path / "record.h5ad"], "uns has no 'muse_fast'"),
        ([tmp_path / "entry.h5ad"], "has no mpp"),
        ([tmp_path / "class.h5ad"], "class.h5ad: not a file"),
        ([tmp_path / "plain.h5ad"], "plain.h5ad: not a file"),
        ([tmp_path / "sparse.h5ad"], "X is not a dense matrix"),
        ([tmp_path / "again", good], "both of the slide a"),
        ([tmp_path / "empty"], "contains no .h5ad"),
        ([tmp_path / "absent.h5ad"], "no such file or folder"),
        ([Path(__file__)], "expected a .h5ad file"),
        ([], "no .h5ad files"),
    ):
        with pytest.raises(UserError, match=said):
            open_vectors(find_vectors(paths))


def test_a_vector_that_is_not_finite(tmp_path: Path) -> None:
    stored = np.ones((5, 3), np.float16)
    stored[3, 1] = np.inf
    (file,) = open_vectors([write_vectors(tmp_path / "a.h5ad", stored)])
    with pytest.raises(UserError, match=r"a\.h5ad: the vector in row 3 is not finite"):
        list(file.blocks(2))


def test_memory_does_not_depend_on_the_number_of_nuclei(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of what Python and numpy allocate, for 1,000 nuclei and for eight times as many, in blocks of 100."""
    monkeypatch.setattr(vectors, "_POSITIONS", 100)
    peaks = []
    for count in (1_000, 8_000):
        rows = np.random.default_rng(0).normal(size=(count, 64)).astype(np.float16)
        path = write_vectors(tmp_path / f"{count}.h5ad", rows, rows[:, :2].astype(np.float64) ** 2)
        del rows
        tracemalloc.start()
        files = open_vectors([path])
        components, sample = fit_components(files, most=50, rows=100)
        colour_nuclei(np.zeros((9, 9, 3), np.uint8), files[0], fit_colours(components, sample), 1.0, rows=100)
        find_neighbours(files, [Place(0, 0)], 20, rows=100)
        nearest_nucleus(files[0], 1, 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
