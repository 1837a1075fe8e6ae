"""The ROI set: it reads back what was written, refuses damage, and is complete or does not exist."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.roiset import roiset
from muse_fast.roiset.records import encode_jpeg, nucleus_records
from muse_fast.roiset.roiset import RoiSet, RoiSetWriter


def smooth_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw an image that JPEG preserves well: a few colours, blurred."""
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Three ROIs (with labels and scores, without nuclei, with only points) of two slides and two splits."""
    out = tmp_path / "set"
    with RoiSetWriter(out, provenance={"made by": "test"}, label_names=("a", "b")) as writer:
        writer.add(
            smooth_image(48, 80, 0),
            mpp=0.25,
            xy=[[0, 0], [79.5, 47.5], [3.25, 40]],
            label=[0, 1, -1],
            score=[0.5, math.nan, 2],
            slide="s0",
            split="train",
            origin=(7, 2**40),
        )
        writer.add(smooth_image(33, 65, 1), mpp=0.5, xy=[], slide="s1", split="val")
        writer.add(smooth_image(16, 16, 2), mpp=0.5, xy=np.array([[1, 2]]), slide="s0", split="train")
    return out


def test_a_set_reads_back_what_was_written(three: Path) -> None:
    rois = RoiSet(three)
    first, empty, bare = (rois[i] for i in range(3))
    assert len(rois) == 3
    np.testing.assert_array_equal(first.xy, np.float32([[0, 0], [79.5, 47.5], [3.25, 40]]))
    np.testing.assert_array_equal(first.label, [0, 1, -1])
    np.testing.assert_array_equal(first.score, np.float32([0.5, np.nan, 2]))
    assert (first.slide, first.split, first.origin, first.mpp) == ("s0", "train", (7, 2**40), 0.25)
    assert (first.width, first.height) == (80, 48)
    assert empty.xy.shape == (0, 2)
    assert empty.label.shape == empty.score.shape == (0,)
    assert bare.label.tolist() == [-1]
    assert np.isnan(bare.score).all()
    assert (first.xy.dtype, first.label.dtype, first.score.dtype) == (np.float32, np.int16, np.float32)
    for i, roi in enumerate((first, empty, bare)):
        error = roi.decode().astype(float) - smooth_image(roi.height, roi.width, i)
        assert np.sqrt((error**2).mean()) < 3  # JPEG at quality 95


def test_columns_and_splits(three: Path) -> None:
    rois = RoiSet(three)
    assert rois.mpp.tolist() == [0.25, 0.5, 0.5]
    assert rois.width.tolist() == [80, 65, 16]
    assert rois.height.tolist() == [48, 33, 16]
    assert rois.num_nuclei.tolist() == [3, 0, 1]
    assert rois.label_names == ("a", "b")
    assert rois.splits == ["train", "val"]
    assert rois.select("train").tolist() == [0, 2]
    assert rois.select("").tolist() == list(range(len(rois)))
    assert rois.info["mpp"] == [0.25, 0.5]
    assert rois.verify() == []
    with pytest.raises(UserError, match=r"no split 'test'.*train.*val"):
        rois.select("test")
    with pytest.raises(IndexError, match="no ROI 3"):
        rois[3]
    with pytest.raises(IndexError):
        rois[-1]


def test_pickle_contains_the_path_and_not_the_data(tmp_path: Path) -> None:
    with RoiSetWriter(tmp_path / "set", provenance={}) as writer:
        for _ in range(300):
            writer.add(smooth_image(8, 8), mpp=0.5, xy=np.zeros((50, 2)), slide="s")
    data = pickle.dumps(RoiSet(tmp_path / "set"))
    assert len(data) < 2000
    assert pickle.loads(data)[299].xy.shape == (50, 2)


def test_empty_set(tmp_path: Path) -> None:
    with RoiSetWriter(tmp_path / "set", provenance={}):
        pass
    rois = RoiSet(tmp_path / "set")
    assert len(rois) == 0
    assert rois.verify() == []


def test_a_million_nuclei(tmp_path: Path) -> None:
    xy = np.random.default_rng(0).uniform(0, 64, (1_000_000, 2)).astype(np.float32)
    with RoiSetWriter(tmp_path / "set", provenance={}) as writer:
        writer.add(smooth_image(64, 64), mpp=0.5, xy=xy, slide="s")
    np.testing.assert_array_equal(RoiSet(tmp_path / "set")[0].xy, xy)


def test_shards_roll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = smooth_image(32, 32)
    monkeypatch.setattr(roiset, "SHARD_BYTES", int(2.5 * len(encode_jpeg(image))))
    with RoiSetWriter(tmp_path / "set", provenance={}) as writer:
        for i in range(5):
            writer.add(image, mpp=0.5, xy=[[i, i]], slide="s")
    assert sorted(RoiSet(tmp_path / "set").info["shards"]) == [f"shard-{i:05d}.bin" for i in range(3)]
    assert [RoiSet(tmp_path / "set")[i].xy[0, 0] for i in range(5)] == [0, 1, 2, 3, 4]
    assert RoiSet(tmp_path / "set").verify() == []


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    image, xy = smooth_image(16, 16), np.ones((2000, 2))  # 28 kB of nuclei per ROI
    with RoiSetWriter(tmp_path / "set", provenance={}) as writer:
        writer.add(image, mpp=0.5, xy=xy, slide="s")
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(200):
                writer.add(image, mpp=0.5, xy=xy, slide="s")
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < 100_000  # the nuclei are 5.6 MB


# ------------------------------------------------------------------------------------------------------------ JPEG


@pytest.mark.parametrize(("height", "width"), [(8, 8), (33, 65), (200, 17)])
def test_jpeg_is_baseline_444_with_a_restart_marker_per_row(height: int, width: int) -> None:
    data = encode_jpeg(smooth_image(height, width))
    frame = data.index(b"\xff\xc0")  # SOF0: baseline
    assert [data[frame + 11 + 3 * c] for c in range(3)] == [0x11] * 3  # sampling factors: 4:4:4
    scan = data[data.index(b"\xff\xda") :]
    # In a scan, 0 follows every data byte 0xff, so 0xff 0xd0..0xd7 can only be a restart marker.
    markers = sum(scan.count(bytes([0xFF, 0xD0 + k])) for k in range(8))
    assert markers == math.ceil(height / 8) - 1


def test_truncated_jpeg_names_set_and_roi(three: Path) -> None:
    roi = RoiSet(three)[1]
    for jpeg in (roi.jpeg[:-20], roi.jpeg[:200], roi.jpeg[:1], b"", b"<html>"):
        with pytest.raises(UserError, match=r"set, ROI 1: the JPEG cannot be decoded"):
            dataclasses.replace(roi, jpeg=jpeg).decode()


def test_header_is_checked_before_pixels_are_allocated(three: Path) -> None:
    roi = RoiSet(three)[0]
    start = roi.jpeg.index(b"\xff\xc0") + 5
    bomb = roi.jpeg[:start] + b"\xfd\xe8\xfd\xe8" + roi.jpeg[start + 4 :]  # 65000 x 65000: 12.7 GB
    with pytest.raises(UserError, match="the header says 65000 x 65000, the index 80 x 48"):
        dataclasses.replace(roi, jpeg=bomb).decode()


# ---------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["shard-00000.bin", "index.bin", "nuclei.bin"])
def test_every_flipped_bit_is_found(three: Path, name: str) -> None:
    whole = (three / name).read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole), min(60, len(whole)), replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        (three / name).write_bytes(damaged)
        try:
            problems = RoiSet(three).verify()
        except UserError as error:
            problems = [str(error)]
        assert problems, f"byte {place}"
        assert str(three) in problems[0]


@pytest.mark.parametrize("name", ["shard-00000.bin", "index.bin", "nuclei.bin", "roiset.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "longer"])
def test_truncated_and_missing_files_are_refused_on_opening(three: Path, name: str, how: str) -> None:
    file = three / name
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if how == "cut" else data + b"x")
    if how == "gone":
        file.unlink()
    with pytest.raises(UserError, match="set") as caught:
        RoiSet(three)
    assert "again" in str(caught.value) or "create one with" in str(caught.value)


def test_damage_to_one_roi_names_it_and_others_can_be_read(three: Path) -> None:
    shard = three / "shard-00000.bin"
    data = bytearray(shard.read_bytes())
    data[-30] ^= 1  # in the last JPEG
    rois = RoiSet(three)
    shard.write_bytes(data)
    rois[0].decode()
    with pytest.raises(UserError, match=r"shard-00000.bin, ROI 2: the bytes differ"):
        rois[2]
    assert len(rois.verify()) == 1
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00000.bin, ROI 0: No such file"):
        rois[0]


def test_another_version_is_refused(three: Path) -> None:
    info = json.loads((three / "roiset.json").read_text())
    for change, message in (
        ({"version": 2}, "version 2, this program reads version 1"),
        ({"format": "other"}, "expected the format"),
    ):
        (three / "roiset.json").write_text(json.dumps(info | change))
        with pytest.raises(UserError, match=message):
            RoiSet(three)
    (three / "roiset.json").write_text(json.dumps({k: v for k, v in info.items() if k != "slides"}))
    with pytest.raises(UserError, match="slides missing"):
        RoiSet(three)


def test_a_folder_that_is_not_a_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a ROI set.*muse_fast.prepare"):
        RoiSet(tmp_path)


# ----------------------------------------------------------------------------------------------------- atomic write


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with RoiSetWriter(tmp_path / "set", provenance={}) as writer:
            writer.add(smooth_image(8, 8), mpp=0.5, xy=[], slide="s")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(three: Path) -> None:
    before = (three / "index.bin").read_bytes()
    with pytest.raises(UserError, match="exists already"), RoiSetWriter(three, provenance={}):
        pass
    assert (three / "index.bin").read_bytes() == before


def test_provenance_that_cannot_be_json_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        RoiSetWriter(tmp_path / "set", provenance={"path": tmp_path})


def test_kill_9_leaves_no_set_and_the_next_writer_cleans_up(tmp_path: Path) -> None:
    script = """
import sys, time, numpy as np
from muse_fast.roiset.roiset import RoiSetWriter
with RoiSetWriter(sys.argv[1], provenance={}) as writer:
    while True:
        writer.add(np.zeros((64, 64, 3), np.uint8), mpp=0.5, xy=[[1, 1]], slide="s")
        print("written", flush=True)
"""
    out = tmp_path / "set"
    with subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == b"written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not out.exists()
    assert [path.name.startswith(".tmp-set-") for path in tmp_path.iterdir()] == [True]
    with RoiSetWriter(out, provenance={}) as writer:
        writer.add(smooth_image(8, 8), mpp=0.5, xy=[], slide="s")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_running_writer_is_left_alone(tmp_path: Path) -> None:
    with RoiSetWriter(tmp_path / "set", provenance={}) as writer:
        ours = writer.folder
    running = ours.with_name(ours.name.removesuffix(str(os.getpid())) + str(os.getppid()))
    running.mkdir()
    (tmp_path / "set").rename(tmp_path / "moved")
    with RoiSetWriter(tmp_path / "set", provenance={}):
        assert running.exists()


def test_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(handle: int) -> None:
        log.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def logged_rename(path: Path, target: Path) -> Path:
        log.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    with RoiSetWriter(tmp_path / "set", provenance={}) as writer:
        writer.add(smooth_image(8, 8), mpp=0.5, xy=[], slide="s")
        folder = writer.folder
    names = ["index.bin", "nuclei.bin", "roiset.json", "shard-00000.bin"]
    assert sorted(log[:4]) == [str(folder / name) for name in names]
    assert log[4:] == [str(folder), "rename", str(tmp_path)]


# ------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xy": [[1, 2], [math.nan, 1]]}, r"ROI 0 of slide 's': nucleus row 1 .* nan, 1"),
        ({"xy": [[math.inf, 1]]}, "nucleus row 0"),
        ({"xy": [[-0.001, 1]]}, "nucleus row 0"),
        ({"xy": [[20, 1]]}, "expected 0 <= x < 20 and 0 <= y < 10"),  # exactly on the right edge
        ({"xy": [[1, 10]]}, "nucleus row 0"),  # exactly on the bottom edge
        ({"xy": [[5, 15]]}, "x before y"),  # swapped
        ({"xy": [1, 2]}, r"shape \[2\], expected \[n, 2\]"),
        ({"xy": [[1, 2, 3]]}, r"shape \[1, 3\]"),
        ({"xy": [["1", "2"]]}, "expected numbers"),
        ({"label": [0, 1]}, r"label has the shape \[2\], expected \[1\]"),
        ({"label": [3]}, "label of nucleus row 0 .* is 3, expected -1 to 2"),
        ({"label": [-2]}, "is -2"),
        ({"label": [0.5]}, "expected integers"),
        ({"label": [2**40]}, "expected -1 to 2"),
        ({"score": [math.inf]}, "score of nucleus row 0"),
        ({"mpp": 0.0}, "mpp is 0.0"),
        ({"mpp": math.nan}, "mpp is nan"),
        ({"image": np.zeros((10, 20), np.uint8)}, r"uint8 \[10, 20\], expected uint8 \[H, W, 3\]"),
        ({"image": np.zeros((10, 20, 3))}, "float64"),
        ({"image": np.zeros((0, 20, 3), np.uint8)}, "20 x 0 px"),
        ({"image": np.zeros((1, 16385, 3), np.uint8)}, "16385 x 1 px, expected 1 to 16384"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    good = {"image": np.zeros((10, 20, 3), np.uint8), "mpp": 0.5, "xy": [[1, 2]], "slide": "s"}
    with (
        pytest.raises(UserError, match=message),
        RoiSetWriter(tmp_path / "set", provenance={}, label_names=("a", "b", "c")) as writer,
    ):
        writer.add(**(good | change))
    assert list(tmp_path.iterdir()) == []


def test_a_point_that_rounds_onto_the_border_stays_inside(tmp_path: Path) -> None:
    x = np.nextafter(20.0, 0)
    assert np.float32(x) == 20
    records = nucleus_records([[x, 0]], None, None, 20, 10, (), "test")
    assert records["xy"][0, 0] == np.nextafter(np.float32(20), np.float32(0))


@given(arrays(np.float64, st.tuples(st.integers(0, 5), st.just(2)), elements=st.floats(-3, 23) | st.floats()))
def test_points_pass_if_and_only_if_all_are_inside(points: np.ndarray) -> None:
    inside = [0 <= x < 20 and 0 <= y < 10 for x, y in points]
    if all(inside):
        xy = nucleus_records(points, None, None, 20, 10, (), "test")["xy"]
        np.testing.assert_allclose(xy, points, rtol=1e-6, atol=1e-30)
        assert ((xy >= 0) & (xy < [20, 10])).all()
    else:
        with pytest.raises(UserError, match=f"nucleus row {inside.index(False)} "):
            nucleus_records(points, None, None, 20, 10, (), "test")


def test_pillow_reads_the_same_pixels(three: Path) -> None:
    """The JPEGs are ordinary: another decoder agrees up to rounding."""
    roi = RoiSet(three)[0]
    other = np.asarray(Image.open(io.BytesIO(roi.jpeg))).astype(int)
    assert np.abs(roi.decode().astype(int) - other).max() <= 1
