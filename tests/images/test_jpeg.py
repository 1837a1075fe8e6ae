"""Reading JPEGs: bands equal the rows of the whole, and bad files are refused cheaply, in Python and in C++."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from muse_fast.errors import UserError
from muse_fast.images import jpeg, jpeg_rows
from torture import jpeg_corpus as corpus
from torture.harness import Scale
from torture.processes import Child
from torture.rows.data import NAMED, attempt, damaged_pixels, header_bombs, roi_of

VALID, BAD = corpus.valid(), corpus.bad()
COMPILED = jpeg.cutter is not jpeg_rows
CUTTERS = [pytest.param(jpeg_rows, id="python"), pytest.param(jpeg.cutter, id="cpp")]
needs_cpp = pytest.mark.skipif(not COMPILED, reason="muse_fast/_jpeg was not built")


@pytest.fixture(params=CUTTERS)
def cutter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that cuts the rows, put in use."""
    if "cpp" in request.node.name and not COMPILED:
        pytest.skip("muse_fast/_jpeg was not built")
    monkeypatch.setattr(jpeg, "cutter", request.param)
    return request.param


@pytest.mark.skipif(not COMPILED and "MUSE_FAST_LIBRARY" not in os.environ, reason="muse_fast/_jpeg was not built")
def test_cpp_is_loaded_from_the_folder_of_the_library() -> None:
    """So that a build with sanitizers is the one under test."""
    library = Path(os.environ.get("MUSE_FAST_LIBRARY", Path(jpeg.__file__).parents[1] / "_C.so"))
    assert Path(jpeg.cutter.__file__ or "").parent.resolve() == library.parent.resolve()


# ------------------------------------------------------------------------------------------------------------ bands


@pytest.mark.parametrize("name", VALID)
def test_every_band_equals_the_whole(name: str, cutter: ModuleType) -> None:
    data = VALID[name]
    roi = roi_of(data, *corpus.size_of(data))
    whole = roi.decode()
    starts = sorted({0, 1, 7, 8, 15, 16, 17, 40, 63, 64, 100, roi.height - 9, roi.height - 1} & set(range(roi.height)))
    for top in starts:
        for bottom in sorted({top + 1, min(top + 17, roi.height), roi.height}):
            pixels, first = roi.decode_rows(top, bottom)
            np.testing.assert_array_equal(pixels[top - first : bottom - first], whole[top:bottom])
            if name.startswith("cut"):
                assert cutter.cut_rows(data, top, bottom) is not None


def test_a_band_is_no_larger_than_it_must_be(cutter: ModuleType) -> None:
    """4:4:4 needs no extra rows; vertically subsampled chroma needs one row of MCUs above and below."""
    for name, top, bottom, first, rows in (
        ("cut 4:4:4", 64, 72, 64, 8),
        ("cut 4:4:4", 63, 73, 56, 24),
        ("cut 4:2:2", 64, 72, 64, 8),
        ("cut grey with factors of 2 x 2", 64, 72, 64, 8),
        ("cut 4:2:0", 64, 80, 48, 48),
        ("cut 4:2:0", 0, 16, 0, 32),
        ("cut 4:2:0", 144, 152, 128, 24),
        ("cut every 2 rows", 72, 80, 64, 16),
        ("cut every 7 MCUs, never a whole row", 80, 81, 56, 56),
        ("cut every MCU", 80, 81, 80, 8),
    ):
        roi = roi_of(VALID[name])
        pixels, found = roi.decode_rows(top, bottom)
        assert (found, pixels.shape) == (first, (rows, corpus.WIDTH, 3)), name
        cut = cutter.cut_rows(roi.jpeg, top, bottom)[0]
        assert len(cut) < len(roi.jpeg) * (rows + 40) / corpus.HEIGHT


def test_rows_outside_the_image(cutter: ModuleType) -> None:
    data = VALID["cut 4:4:4"]
    for top, bottom in ((-1, 8), (8, 8), (9, 8), (0, corpus.HEIGHT + 1), (2**40, 2**41)):
        assert cutter.cut_rows(data, top, bottom) is None


@pytest.mark.parametrize("name", [name for name in VALID if name.startswith(("no restart", "progressive", "restart"))])
def test_what_cannot_be_cut_is_decoded_whole(name: str, cutter: ModuleType) -> None:
    roi = roi_of(VALID[name])
    assert cutter.cut_rows(roi.jpeg, 40, 50) is None
    pixels, first = roi.decode_rows(40, 50)
    assert first == 0 and pixels.shape == (corpus.HEIGHT, corpus.WIDTH, 3)


@pytest.mark.parametrize(("quality", "subsampling"), [(95, 0), (80, 2)])
def test_bands_of_a_real_image(shared_data: Path, cutter: ModuleType, quality: int, subsampling: int) -> None:
    image = corpus.read(next((shared_data / "mitos12").glob("*.jpg")))
    data = corpus.encode(image, quality=quality, subsampling=subsampling, **corpus.ROWS)
    height, width, _ = image.shape
    roi = roi_of(data, width, height)
    whole = roi.decode()
    for top, bottom in ((0, 300), (777, 1290), (height - 400, height)):
        pixels, first = roi.decode_rows(top, bottom)
        np.testing.assert_array_equal(pixels[top - first : bottom - first], whole[top:bottom])
        assert len(pixels) <= bottom - top + 4 * 16


# ---------------------------------------------------------------------------------------------------- Python and C++


@needs_cpp
@given(
    st.sampled_from(sorted(VALID)), st.integers(0, 2**32), st.integers(-9, 160), st.integers(-9, 160), st.integers(0, 3)
)
def test_cpp_cuts_mutants_like_python(name: str, seed: int, top: int, bottom: int, times: int) -> None:
    rng, data = np.random.default_rng(seed), VALID[name]
    for _ in range(times):
        data = corpus.mutant(rng, data)
    assert jpeg.cutter.cut_rows(data, top, bottom) == jpeg_rows.cut_rows(data, top, bottom)
    assert jpeg.cutter.count_scans(data) == jpeg_rows.count_scans(data)


FRAMES = [corpus.segment(0xC0, bytes([8, 0, height, 0, 9, 1, 1, 0x11, 0])) for height in (0, 1, 40)]
INTERVALS = [corpus.segment(0xDD, bytes([0, interval])) for interval in (0, 1, 2, 3)]
SCAN = corpus.segment(0xDA, bytes([1, 1, 0, 0, 63, 0]))
MARKERS = [bytes([0xFF, marker]) for marker in range(0xBF, 0x100)]
PIECES = [*MARKERS, *FRAMES, *INTERVALS, SCAN, b"\0", b"\xff", b"data", b"\xff\0"]


@needs_cpp
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=9), max_size=30), st.integers(0, 41), st.integers(0, 41))
def test_cpp_cuts_anything_like_python(pieces: list[bytes], top: int, bottom: int) -> None:
    """Under ``make sanitize`` bytes come from malloc, so that reads beyond their end are detected."""
    for data in (b"".join(pieces), b"".join([b"\xff\xd8", FRAMES[2], INTERVALS[2], SCAN, *pieces])):
        assert jpeg.cutter.cut_rows(data, top, bottom) == jpeg_rows.cut_rows(data, top, bottom)
        assert jpeg.cutter.count_scans(data) == jpeg_rows.count_scans(data)


@needs_cpp
def test_cpp_cuts_every_prefix_like_python() -> None:
    for data in (VALID["cut one MCU"], VALID["cut thumbnail"][:900], BAD["restart marker twice"][:1500]):
        for end in range(len(data)):
            assert jpeg.cutter.cut_rows(data[:end], 0, 5) == jpeg_rows.cut_rows(data[:end], 0, 5)


def test_without_the_module_rows_are_cut_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSE_FAST_LIBRARY", str(tmp_path / "_C.so"))
    assert jpeg._load_cutter() is jpeg_rows
    name = "_jpeg" + jpeg.importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / name).write_bytes(b"\x7fELF of another machine")
    assert jpeg._load_cutter() is jpeg_rows


# -------------------------------------------------------------------------------------------------------- bad files


def test_the_corpus_is_large_enough() -> None:
    assert len(BAD) >= 60
    assert len(VALID) >= 12


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(name: str, cutter: ModuleType) -> None:
    roi = roi_of(BAD[name])
    with pytest.raises(UserError, match=NAMED):
        roi.decode()
    with pytest.raises(UserError, match=NAMED):
        roi.decode_rows(0, corpus.HEIGHT)
    for top in range(0, corpus.HEIGHT - 24, 24):  # a band away from the damage may be intact
        attempt(roi.decode_rows, top, top + 24)


def test_mutants_decode_or_are_refused_by_name(cutter: ModuleType) -> None:
    """500 files with random changes: no crash and no other error."""
    rng, names, refused = np.random.default_rng(1), sorted(VALID), 0
    for i in range(500):
        base = VALID[names[i % len(names)]]
        roi = roi_of(corpus.mutant(rng, base), *corpus.size_of(base))
        top = int(rng.integers(roi.height))
        whole, band = attempt(roi.decode), attempt(roi.decode_rows, top, roi.height)
        refused += whole is None
        assert whole is None or whole.shape == (roi.height, roi.width, 3)
        assert band is None or (band[0].shape[1:] == (roi.width, 3) and band[1] + len(band[0]) == roi.height)
    assert 250 < refused < 500  # most are damaged, but not all


def test_damage_in_the_scan(tmp_path: Path) -> None:
    """Eight bytes are overwritten: the set's hash finds all such damage. Strict decoding finds less of it than in files
    without restart markers, because the decoder resynchronises after each marker."""
    outcome = damaged_pixels(Scale(True, tmp_path))
    assert outcome.survived == outcome.injected >= 200
    by_decoding = re.search(r"finds (\d+) % of 8 bytes", outcome.notes)
    assert by_decoding is not None and int(by_decoding[1]) >= 75


# ----------------------------------------------------------------------------------------------------------- bombs


def test_header_bombs_are_refused_before_allocating(tmp_path: Path) -> None:
    with Child(header_bombs, tmp_path / "report.json", log=tmp_path / "log") as child:
        assert child.wait() == 0, child.output()
    found = json.loads((tmp_path / "report.json").read_text())
    assert [said.split(" ", 1)[1] for said in found["said"]] == [
        "header says 65000 x 65000, the index 200 x 152",
        "x 65000 px, expected at most 16384 a side",
        "bytes are too few for 16384 x 16384 px",
    ]
    assert found["growth"] < 64  # MiB
    assert found["without checks"] > 64  # the measurement would have shown it


@pytest.mark.parametrize("name", ["500 scans, progressive", "500 scans, baseline"])
def test_scan_bombs_are_refused_before_decoding(name: str, cutter: ModuleType) -> None:
    roi = roi_of(BAD[name])
    for read in (roi.decode, lambda: roi.decode_rows(0, corpus.HEIGHT)):
        with (
            mock.patch.object(simplejpeg, "decode_jpeg", side_effect=AssertionError("decoded before it was refused")),
            pytest.raises(UserError, match=r"the set, ROI 7: .* scans, expected at most 32"),
        ):
            read()


def test_bands_of_another_size_are_refused(cutter: ModuleType) -> None:
    roi = dataclasses.replace(roi_of(VALID["cut 4:4:4"]), height=corpus.HEIGHT + 1)
    with pytest.raises(UserError, match=r"the header says 200 x 152, the index 200 x 153"):
        roi.decode_rows(0, 8)
