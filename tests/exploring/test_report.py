from __future__ import annotations

import base64
import io
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.exploring import report
from muse_fast.exploring.neighbours import find_neighbours
from muse_fast.exploring.report import typical, write_pictures
from muse_fast.exploring.vectors import VectorFile
from tests.support.vector_files import draw_slide, some_files

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that every element is closed in its turn, and collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def with_slides(files: list[VectorFile]) -> list[VectorFile]:
    for file in files:
        xy = np.concatenate([np.zeros((0, 2)), *(block.xy for block in file.blocks())])
        draw_slide(file.path.with_suffix(".png"), xy, np.full((len(xy), 3), 90))
    return files


def picture(link: str) -> Image.Image:
    head, _, data = link.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    files = with_slides(some_files(tmp_path, {"a <b> & c": 9, "d": 12, "e": 0}))
    out = tmp_path / "out"
    assert write_pictures(out, files) == {}
    assert {path.name for path in out.iterdir()} == {"overview.png", "atlas.png", "report.html"}
    text = (out / "report.html").read_text("utf-8")
    page = Page(text)
    pictures = [picture(link) for link in page.links]  # all links are pictures in the page
    assert "//" not in re.sub(r'src="[^"]*"', "", text) and "url(" not in text and "@import" not in text
    assert not {"script", "link", "iframe", "a", "object", "embed"} & {*page.tags}
    for shown, name in zip(pictures, ("overview.png", "atlas.png"), strict=False):
        with Image.open(out / name) as file:
            assert shown.size == file.size
            difference = np.asarray(shown, int) - np.asarray(file.convert("RGB"), int)
            assert np.abs(difference).mean() < 2
    assert "a <b> & c" in page.texts and "21 nuclei of 3 slides" in page.texts and "12" in page.texts
    queries = page.texts.count("query")
    assert 2 <= queries <= 8 and len(pictures) == 2 + queries * 7  # each with six neighbours


def test_neighbours_are_in_other_slides(tmp_path: Path) -> None:
    files = with_slides(some_files(tmp_path, {"a": 9, "d": 12}))
    groups, problems = report._groups(files, report.fit_components(files)[1], None)
    assert problems == {} and {group.query.file for group in groups} == {0, 1}
    for group in groups:
        assert all(place.file != group.query.file for place in group.neighbours.places)
        (expected,) = find_neighbours(files, [group.query], 6, apart_um=math.inf)
        assert group.neighbours.places == expected.places and len(group.crops) == 7


def test_of_one_slide_neighbours_are_elsewhere(tmp_path: Path) -> None:
    """Nuclei are 20 um apart on a line, so those nearer than 100 um are the four on each side."""
    files = with_slides(some_files(tmp_path, {"a": 12, "b": 0}))
    groups, _ = report._groups(files, report.fit_components(files)[1], None)
    assert all(abs(place.row - group.query.row) >= 5 for group in groups for place in group.neighbours.places)
    assert any(group.neighbours.places for group in groups)


@pytest.mark.parametrize("counts", [{"a": 0}, {"a": 1}, {"a": 0, "b": 2}])
def test_few_nuclei(tmp_path: Path, counts: dict[str, int]) -> None:
    out = tmp_path / "out"
    assert write_pictures(out, with_slides(some_files(tmp_path, counts))) == {}
    page = Page((out / "report.html").read_text("utf-8"))
    total = sum(counts.values())
    assert (out / "atlas.png").exists() == (total > 0)
    assert page.texts.count("query") == total
    assert f"{total} nuclei of {len(counts)} slide{'s' if len(counts) > 1 else ''}" in page.texts


def test_slides_that_have_moved_are_in_the_page(tmp_path: Path) -> None:
    files = with_slides(some_files(tmp_path, {"a": 5, "b": 5}))
    files[1].path.with_suffix(".png").unlink()
    problems = write_pictures(tmp_path / "out", files)
    assert list(problems) == ["b"] and "no such slide" in problems["b"]
    texts = Page((tmp_path / "out" / "report.html").read_text("utf-8")).texts
    assert problems["b"] in texts and "complete" in texts


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of two folders, whose slides are in a third one now, but for one."""
    files = [*some_files(tmp_path / "one", {"a": 5}), *some_files(tmp_path / "two", {"b": 5, "c": 1})]
    with_slides(files)
    (tmp_path / "slides").mkdir()
    for file in files[:2]:
        slide = file.path.with_suffix(".png")
        slide.rename(tmp_path / "slides" / slide.name)
    given = [str(tmp_path / "one"), str(tmp_path / "two"), "--slides", str(tmp_path / "slides")]
    assert report.main([*given, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "pictures of 11 nuclei of 3 slides" in said
    assert "not all pictures of c: " in said and "pictures of a:" not in said
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(UserError, match="out exists already"):
        report.main([*given, "--out", str(tmp_path / "out")])


def test_typical_vectors_differ() -> None:
    """Three groups of directions, of any length; the nearest to the middle of each is found."""
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(3, 21, 6)) * 0.1
    spread[:, 10] = 0
    spread[:, 11:] = -spread[:, :10]
    vectors = (5 * np.eye(6)[:3, None] + spread).reshape(-1, 6) * rng.uniform(1, 9, (63, 1))
    assert typical(vectors, 3) == [10, 31, 52]
    assert typical(np.ones((4, 3)), 8) == [0]
    assert typical(np.zeros((1, 3)), 8) == [0]


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_shows_the_page_without_complaints(tmp_path: Path) -> None:
    """Chromium loads every picture, and writes what it refuses or cannot parse to its log."""
    files = with_slides(some_files(tmp_path, {"a": 9, "d": 12}))
    write_pictures(tmp_path, files)
    text = (tmp_path / "report.html").read_text("utf-8")
    count = len(Page(text).links)
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot, page = tmp_path / "shot.png", (tmp_path / "report.html").as_uri()
    done = subprocess.run(
        [*chromium, "--enable-logging=stderr", "--window-size=1600,4000", f"--screenshot={shot}", page],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (4000, 1600, 3)
    ink = (pixels == 90).all(axis=2).sum()  # nuclei of the slides
    assert count > 10 and ink > 1_000
