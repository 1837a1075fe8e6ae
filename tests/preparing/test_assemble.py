"""Sampling of ROIs from the parts."""

from __future__ import annotations

import numpy as np
import pytest

from muse_fast.errors import UserError
from muse_fast.preparing.assemble import Chosen, choose
from muse_fast.preparing.parts import Part
from muse_fast.roiset.roiset import RoiSet, RoiSetWriter
from muse_fast.sources.cut import SlideFile
from muse_fast.sources.wsi import Slides

COUNTS = {"a1": 30, "a2": 10, "b1": 7, "c1": 0, "d1": 25}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Part]:
    """Slides of the groups a, b, c and d; the ROIs of each are shuffled."""
    folder, found = tmp_path_factory.mktemp("parts"), []
    for name, count in COUNTS.items():
        order = np.random.default_rng(0).permutation(count)
        with RoiSetWriter(folder / name, provenance={}) as writer:
            for i in order.tolist():
                corner = (i % 6 * 8, i // 6 * 8)
                writer.add(np.zeros((8, 8, 3), np.uint8), mpp=0.5, xy=[], slide=name, origin=corner)
        file = SlideFile(folder / name, name, name, group=name[0])
        found.append(Part(file, RoiSet(folder / name), {}, {}, {}, ""))  # type: ignore[arg-type]
    return found


def drawn(chosen: list[Chosen]) -> dict[str, set[tuple[int, ...]]]:
    return {c.part.file.name: {tuple(place) for place in c.part.rois.origin[c.ids].tolist()} for c in chosen}


def test_all_rois_are_ordered_by_position(parts: list[Part]) -> None:
    chosen = choose(parts, Slides.Options())
    assert [len(slide.ids) for slide in chosen] == list(COUNTS.values())
    for slide in chosen:
        places = [(y, x) for x, y in slide.part.rois.origin[slide.ids].tolist()]
        assert places == sorted(places) and slide.not_sampled == []
        assert [roi.origin for roi in slide.read()] == [(x, y) for y, x in places]


@pytest.mark.parametrize(
    ("per_group", "max_rois", "expected"),
    [
        (12, None, {"a": 12, "b": 7, "c": 0, "d": 12}),
        (None, 31, {"a": 10, "b": 7, "c": 0, "d": 10}),  # of the three groups with ROIs
        (4, 100, {"a": 4, "b": 4, "c": 0, "d": 4}),
        (1000, None, {"a": 40, "b": 7, "c": 0, "d": 25}),
    ],
)
def test_groups_are_balanced(
    parts: list[Part], per_group: int | None, max_rois: int | None, expected: dict[str, int]
) -> None:
    chosen = choose(parts, Slides.Options(per_group=per_group, max_rois=max_rois))
    counts = dict.fromkeys(expected, 0)
    for slide in chosen:
        counts[slide.part.file.group] += len(slide.ids)
        assert len(slide.ids) + len(slide.not_sampled) == len(slide.part.rois)
    assert counts == expected


def test_the_sample_depends_only_on_the_seed(parts: list[Part]) -> None:
    options = Slides.Options(per_group=12, seed=3)
    first = drawn(choose(parts, options))
    assert drawn(choose(parts[::-1], options)) == first
    assert {name: places for name, places in drawn(choose(parts[1:], options)).items() if name in ("b1", "d1")} == {
        name: first[name] for name in ("b1", "d1")
    }
    assert drawn(choose(parts, Slides.Options(per_group=12, seed=4))) != first
    larger = drawn(choose(parts, Slides.Options(per_group=14, seed=3)))
    assert all(first[name] <= larger[name] for name in first)


def test_every_roi_of_a_group_is_equally_likely(parts: list[Part]) -> None:
    """20 of 40 with 400 seeds: each is drawn 200 times, with a standard deviation of 10."""
    times = {name: np.zeros(COUNTS[name]) for name in ("a1", "a2")}
    for seed in range(400):
        for slide in choose(parts[:2], Slides.Options(per_group=20, seed=seed)):
            times[slide.part.file.name][slide.ids] += 1
    together = np.concatenate(list(times.values()))
    assert together.sum() == 8000 and abs(together - 200).max() < 45
    assert abs(times["a1"].mean() - 200) < 5


def test_fewer_rois_than_groups(parts: list[Part]) -> None:
    with pytest.raises(UserError, match="max_rois=2: expected at least one for each of the 3 groups"):
        choose(parts, Slides.Options(max_rois=2))
