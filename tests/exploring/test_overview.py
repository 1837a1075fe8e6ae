from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from muse_fast.exploring import overview
from muse_fast.exploring.components import Colours, fit_colours, fit_components
from muse_fast.exploring.overview import colour_nuclei, draw_overview
from muse_fast.exploring.vectors import VectorFile, open_vectors
from tests.support.vector_files import draw_slide, some_files, write_vectors


def colours_of(files: list[VectorFile]) -> Colours:
    return fit_colours(*fit_components(files))


@pytest.mark.parametrize("rows", [1, 3, None])
def test_a_nucleus_has_its_colour_and_overlaps_are_means(tmp_path: Path, rows: int | None) -> None:
    """At 2 um per pixel a nucleus is a disc of 13 pixels; positions are in pixels of 0.5 um."""
    xy = np.array([[22.0, 42], [122, 42], [130, 42], [158, 79]])
    vectors = np.random.default_rng(0).normal(size=(4, 5))
    files = open_vectors([write_vectors(tmp_path / "a.h5ad", vectors.astype(np.float32), xy)])
    colours, thumbnail = colours_of(files), np.full((20, 40, 3), (250, 100, 100), np.uint8)
    picture = colour_nuclei(thumbnail, files[0], colours, 2.0, rows)
    shades = colours(vectors).astype(float)
    for dx, dy in ((0, 0), (2, 0), (-2, 0), (0, 2), (0, -2), (1, 1), (-1, 1)):
        np.testing.assert_array_equal(picture[10 + dy, 5 + dx], shades[0])
    np.testing.assert_array_equal(picture[10, 31], ((shades[1] + shades[2]) / 2).round())
    np.testing.assert_array_equal(picture[10, 34], shades[2])
    np.testing.assert_array_equal(picture[19, 39], shades[3])  # on the corner of the slide
    background = np.unique(picture[0:5].reshape(-1, 3), axis=0)
    assert len(background) == 1 and len({*background[0].tolist()}) == 1 and 180 < background[0, 0] < 220  # faded grey


def test_each_slide_is_beside_its_nuclei(tmp_path: Path) -> None:
    files = some_files(tmp_path, {"a": 6, "b": 4, "c": 0})
    for file in files:
        xy = np.concatenate([np.zeros((0, 2)), *(block.xy for block in file.blocks())])
        draw_slide(file.path.with_suffix(".png"), xy, np.full((len(xy), 3), 90))
    sheet, problems = draw_overview(files, colours_of(files))
    pixels = np.asarray(sheet.canvas)
    assert problems == {}
    side = overview._WIDTH // 4 - overview.GAP
    top = overview.GAP + overview.CAPTION
    for column, file in enumerate(files[:2]):
        left = overview.GAP + column * 2 * (side + overview.GAP)
        thumbnail, coloured = pixels[top:, left : left + side], pixels[top:, left + side + overview.GAP :][:, :side]
        shades = colours_of(files)(next(file.blocks()).vectors)
        for (x, y), shade in zip(next(file.blocks()).xy * side / 400, shades, strict=True):
            assert (thumbnail[int(y), int(x)] == 90).all()
            np.testing.assert_array_equal(coloured[int(y), int(x)], shade)


def test_slides_that_have_moved_are_named(tmp_path: Path) -> None:
    files = some_files(tmp_path, {"a": 3, "b": 3})
    draw_slide(tmp_path / "a.png", np.zeros((0, 2)), np.zeros((0, 3)))
    sheet, problems = draw_overview(files, colours_of(files))
    assert list(problems) == ["b"] and "no such slide" in problems["b"]
    assert (np.asarray(sheet.canvas) < 250).any()


def test_of_many_slides_some_are_shown(tmp_path: Path) -> None:
    files = some_files(tmp_path, {f"{number:02d}": 1 for number in range(9)})
    opened: list[str] = []

    def pair(file: VectorFile, *_: object) -> list[object]:
        opened.append(file.slide)
        return []

    with mock.patch.multiple(overview, MOST_SLIDES=5, _pair=pair):
        draw_overview(files, colours_of(files))
    assert opened == ["00", "02", "04", "06", "08"]
