"""ROI sets as a source: their contents come back, and several are joined with the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from muse_fast import prepare
from muse_fast.errors import UserError
from muse_fast.images.synthetic import synthetic_image
from muse_fast.roiset.roiset import RoiSet, RoiSetWriter
from muse_fast.runtime.cli import run
from muse_fast.sources import open_source


def write(out: Path, names: Sequence[str], labels: Sequence[Sequence[int]], split: str = "", mpp: float = 0.25) -> Path:
    """Write a ROI for each list of labels, with a nucleus for each label."""
    with RoiSetWriter(out, provenance={}, label_names=names, quality=80) as writer:
        for seed, of_roi in enumerate(labels):
            image, xy, _ = synthetic_image(seed, 160, mpp)
            score = np.linspace(0, 1, len(of_roi))
            where = {"slide": f"{out.name}{seed}", "split": split, "origin": (seed, 7)}
            writer.add(image, mpp=mpp, xy=xy[: len(of_roi)], label=of_roi, score=score, **where)  # type: ignore[arg-type]
    return out


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    first = write(tmp_path / "a", ("round", "long"), [[0, 1, -1], []], split="test")
    return first, write(tmp_path / "b", ("long", "flat"), [[0, 1, 0]], mpp=0.5)


def test_the_contents_of_a_set_come_back(two: tuple[Path, Path]) -> None:
    source = open_source(f"roiset:{two[0]}")
    roiset, items = RoiSet(two[0]), list(source)
    assert source.label_names == ("round", "long") and len(source) == len(items) == 2  # type: ignore[arg-type]
    for i, item in enumerate(items):
        roi = roiset[i]
        np.testing.assert_array_equal(item.image, roi.decode())
        for ours, theirs in ((item.xy, roi.xy), (item.label, roi.label), (item.score, roi.score)):
            np.testing.assert_array_equal(ours, theirs)
        assert (item.slide, item.split, item.mpp, item.origin) == (f"a{i}", "test", 0.25, (i, 7))
    assert [item.name for item in items] == ["a-000000", "a-000001"]
    assert list(source.slides()) == [("a0", "test"), ("a1", "test")]


def test_classes_of_several_sets_are_joined_by_name(two: tuple[Path, Path]) -> None:
    source = open_source(f"roiset:{two[0]},{two[1]}", split="train")
    assert source.label_names == ("round", "long", "flat")
    labels = [item.label.tolist() for item in source if item.label is not None]
    assert labels == [[0, 1, -1], [], [1, 2, 1]]
    assert [item.split for item in source] == ["test", "test", "train"]
    assert list(source.slides()) == [("a0", "test"), ("a1", "test"), ("b0", "train")]


def test_sets_without_classes(tmp_path: Path) -> None:
    source = open_source(f"roiset:{write(tmp_path / 'plain', (), [[-1, -1]])}")
    (item,) = source
    assert source.label_names == () and item.label is not None and item.label.tolist() == [-1, -1]


def test_classes_without_names_keep_their_numbers(two: tuple[Path, Path], tmp_path: Path) -> None:
    numbered, unknown = write(tmp_path / "n", (), [[0, 3, -1]]), write(tmp_path / "u", (), [[-1]])
    labels = [item.label.tolist() for item in open_source(f"roiset:{numbered},{unknown}") if item.label is not None]
    assert labels == [[0, 3, -1], [-1]]
    assert len(list(open_source(f"roiset:{two[0]},{unknown}"))) == 3
    with pytest.raises(UserError, match="n only numbers its classes, another set names them; prepare it with labels="):
        list(open_source(f"roiset:{two[0]},{numbered}"))


def test_joined_sets_have_the_same_jpegs(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "joined"
    assert prepare.main([f"roiset:{two[0]},{two[1]}", str(out), "split=train"]) == 0
    joined, parts = RoiSet(out), [RoiSet(two[0])[0], RoiSet(two[0])[1], RoiSet(two[1])[0]]
    assert [joined[i].jpeg for i in range(3)] == [roi.jpeg for roi in parts]
    assert joined.verify() == [] and joined.splits == ["test", "train"] and joined.label_names[2] == "flat"
    assert joined[2].label.tolist() == [1, 2, 1] and joined.mpp.tolist() == [0.25, 0.25, 0.5]
    np.testing.assert_array_equal(joined[2].xy, parts[2].xy)


def test_a_damaged_set_is_named_and_nothing_is_written(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = two[1] / "shard-00000.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert run(prepare.main, [f"roiset:{two[0]},{two[1]}", str(tmp_path / "joined")]) == 2
    assert f"{shard}, ROI 0: the bytes differ" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_missing_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path / "none")):
        open_source(f"roiset:{tmp_path / 'none'}")
