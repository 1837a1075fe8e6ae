"""Parts: their inputs, slides that fail, and killed runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from muse_fast.errors import UserError
from muse_fast.prepare import main
from muse_fast.preparing import parts as parts_module
from muse_fast.preparing.parts import Parts, make_parts
from muse_fast.preparing.pool import Pool
from muse_fast.roiset.roiset import RoiSet
from muse_fast.sources import cut
from muse_fast.sources.cut import CutSettings, SlideFile
from tests.support.planted import write_pyramid
from tests.support.small_slides import damage, page_with_tissue, write_slide

SETTINGS = CutSettings(roi_um=64, min_nuclei=1, detector="classical")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slides of 700 x 600 px."""
    folder = tmp_path_factory.mktemp("cohort")
    for i in range(6):
        write_slide(folder / f"s{i}.tif", page_with_tissue(i, 600, 700, 512))
    return folder


def slide_files(folder: Path) -> list[SlideFile]:
    return [SlideFile(path, path.stem, path.stem) for path in sorted(folder.glob("*.tif"))]


def states(folder: Path) -> dict[str, int]:
    """When each part was finished; hidden folders left by a kill do not count."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*/part.json")}


def test_finished_parts_are_kept(cohort: Path, tmp_path: Path) -> None:
    files, parts = slide_files(cohort), Parts(tmp_path / "parts", SETTINGS, 95)
    make_parts(files[:2], parts, workers=1)
    before = states(parts.folder)
    assert set(before) == {"s0", "s1"}
    seen: list[SlideFile | None] = []
    make_parts(files[:3], Parts(tmp_path / "parts", SETTINGS, 95), 1, seen.append)
    assert states(parts.folder).items() >= before.items()
    assert [file.name for file in seen if file] == ["s0", "s1", "s2"]
    part = parts.find(files[0])
    assert part is not None and len(part.rois) > 5 and part.rois.verify() == []
    assert part.facts["mpp"] == 0.5 and 0.05 < part.facts["tissue_mm2"] < 0.08  # 0.256 mm a side


def test_other_settings_are_refused(tmp_path: Path) -> None:
    Parts(tmp_path, SETTINGS, 95)
    with pytest.raises(UserError, match=r"other settings \(quality=95, now 90; seed=0, now 1\); use the same"):
        Parts(tmp_path, replace(SETTINGS, seed=1), 90)
    assert Parts(tmp_path, SETTINGS, 95).quality == 95


def test_changed_slides_are_done_again(cohort: Path, tmp_path: Path) -> None:
    for name in ("s0.tif", "s1.tif"):
        shutil.copy(cohort / name, tmp_path / name)
    (file, other), parts = slide_files(tmp_path), Parts(tmp_path / "parts", SETTINGS, 95)
    make_parts([file, other], parts, workers=1)
    before = states(parts.folder)
    assert parts.find(file) is not None
    (tmp_path / "s0.csv").write_text("x,y\n")
    changed = [
        SlideFile(file.path, "s0", "S1"),
        SlideFile(file.path, "s0", "s0", split="val"),
        SlideFile(file.path, "s0", "s0", mpp=0.5),
        SlideFile(file.path, "s0", "s0", nuclei=tmp_path / "s0.csv"),
    ]
    assert [parts.find(other) for other in changed] == [None] * 4
    write_slide(file.path, page_with_tissue(9, 600, 700, 512))
    assert parts.find(file) is None
    make_parts([file, other], parts, workers=1)
    assert parts.find(file) is not None
    assert [states(parts.folder)[name] == before[name] for name in ("s0", "s1")] == [False, True]


@pytest.mark.parametrize("name", ["part.json", "index.bin", "shard-00000.bin", "roiset.json"])
def test_a_damaged_part_is_done_again(cohort: Path, tmp_path: Path, name: str) -> None:
    file, parts = slide_files(cohort)[0], Parts(tmp_path, SETTINGS, 95)
    make_parts([file], parts, workers=1)
    damaged = parts.place(file) / name
    damaged.write_bytes(damaged.read_bytes()[:-30])
    assert parts.find(file) is None
    make_parts([file], parts, workers=1)
    assert parts.find(file) is not None


def test_a_slide_with_too_much_damage_is_skipped(cohort: Path, tmp_path: Path) -> None:
    """Although some of its ROIs were already written."""
    bad = write_pyramid(tmp_path / "bad.tif", page_with_tissue(), 0.5, (4,), compression="zlib")
    damage(bad, 9)  # six tiles per row
    settings = replace(SETTINGS, roi_um=100, min_tissue=0)
    files = [*slide_files(tmp_path), slide_files(cohort)[0]]
    lenient = Parts(tmp_path / "lenient", settings, 95)
    make_parts(files, lenient, workers=1)
    part = lenient.find(files[0])
    assert part is not None and not part.skipped
    count = part.dropped["unreadable"]
    assert count > 1 and len(part.refused["unreadable"]) == count and len(part.rois) > 5
    assert part.facts["unreadable_mm2"] == 0.0164  # 128 um a side

    parts = Parts(tmp_path / "strict", replace(settings, max_unreadable=0.03), 95)
    make_parts(files, parts, workers=1)
    part, other = parts.find(files[0]), parts.find(files[1])
    assert part is not None and len(part.rois) == 0
    assert "of 0.415 mm2 to search cannot be read, more than max_unreadable=0.03; copy" in part.skipped
    assert part.skipped.startswith("unreadable at 768, ")  # where the last of its ROIs met it
    assert other is not None and not other.skipped and len(other.rois) > 5
    before = states(parts.folder)
    make_parts(files, parts, workers=1)
    assert states(parts.folder) == before


def kill_reader(self: Parts, file: SlideFile, pool: Pool) -> None:
    """Imitate a crash in the decoder: the process that reads s1 dies."""
    if file.name == "s1":
        pool.call(os.kill, _a_process(pool), signal.SIGKILL)
        time.sleep(1)
        pool.call(os.getpid)
    else:
        WRITE(self, file, pool)


def _a_process(pool: Pool) -> int:
    return pool.call(os.getpid)


WRITE = Parts.write


def test_a_slide_that_crashes_its_reader_is_skipped(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Parts, "write", kill_reader)
    files, parts = slide_files(cohort)[:4], Parts(tmp_path, SETTINGS, 95)
    make_parts(files, parts, workers=2)
    found = [parts.find(file) for file in files]
    assert [part.skipped.split(":")[0] if part else None for part in found] == [
        "",
        "a process died while reading it",
        "",
        "",
    ]


def test_a_full_disk_stops_the_run(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device")

    parts = Parts(tmp_path, SETTINGS, 95)
    monkeypatch.setattr(parts_module, "write_tissue", full)
    with pytest.raises(OSError, match="No space left"):
        make_parts(slide_files(cohort), parts, workers=2)
    assert states(parts.folder) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


# ------------------------------------------------------------------------------------------------------ killed runs


def arguments(cohort: Path, out: Path, *more: str) -> list[str]:
    return [f"wsi:{cohort}", str(out), "roi_um=32", "min_nuclei=1", "per_slide=40", "detector=classical", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def complete_set(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("complete_set") / "set"
    assert main(arguments(cohort, out, "workers=1", "max_rois=150")) == 0
    assert len(RoiSet(out)) == 150 and RoiSet(out).verify() == []
    assert not out.with_name("set.parts").exists()
    return contents(out)


@pytest.mark.parametrize("kills", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.heavy)])
def test_a_killed_run_makes_the_same_set(
    kills: int, cohort: Path, tmp_path: Path, complete_set: dict[str, bytes]
) -> None:
    """kill -9 at random times; finished slides are not done again, and no process survives."""
    rng, out, done = random.Random(0), tmp_path / "set", {}
    parts = tmp_path / "set.parts"
    for round_ in range(kills):
        command = [sys.executable, "-m", "muse_fast.prepare", *arguments(cohort, out, "workers=2", "max_rois=150")]
        run = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 600
        while len(states(parts)) <= round_ and time.monotonic() < deadline:
            assert run.poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        assert run.poll() is None  # still running when killed
        run.kill()
        run.wait()
        _wait_until_gone(run.pid)
        assert not out.exists()
        after = states(parts)
        assert after.items() >= done.items()
        done = after
    assert kills <= len(done) < 7
    assert main(arguments(cohort, out, "workers=1", "max_rois=150", "--keep-parts")) == 0
    assert states(parts).items() >= done.items()
    assert contents(out) == complete_set
    assert json.loads(complete_set["summary.json"])["rois"] == 150
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set.parts"]


def _wait_until_gone(session: int) -> None:
    """Wait until no process of the killed run is left."""
    deadline = time.monotonic() + 300
    while any(_session(path) == session for path in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _session(process: Path) -> int | None:
    try:
        state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
    except (OSError, ValueError):
        return None
    return int(session) if state != "Z" else None


def test_shares_of_several_tasks_make_the_same_set(
    cohort: Path, tmp_path: Path, complete_set: dict[str, bytes]
) -> None:
    out = tmp_path / "set"
    for task in (1, 0):
        assert main(arguments(cohort, out, "workers=1", "max_rois=150", "--task", f"{task}/2")) == 0
        assert not out.exists()
    done = states(tmp_path / "set.parts")
    assert len(done) == 6
    assert main(arguments(cohort, out, "workers=1", "max_rois=150", "--keep-parts")) == 0
    assert states(tmp_path / "set.parts") == done
    assert contents(out) == complete_set
    shutil.rmtree(out)
    assert main(arguments(cohort, out, "workers=1", "max_rois=60")) == 0
    fewer = RoiSet(out)
    assert len(fewer) == 60
    assert all(fewer[i].jpeg in complete_set["shard-00000.bin"] for i in range(60))


def test_parts_of_a_detector_that_was_trained_again_are_refused(tmp_path: Path) -> None:
    detector = tmp_path / "mine.safetensors"
    detector.write_bytes(b"first")
    settings = replace(SETTINGS, detector=str(detector))
    for _ in range(2):
        Parts(tmp_path / "parts", settings, 95)
    detector.write_bytes(b"second")
    with pytest.raises(UserError, match=r"parts made with other settings \(detector_sha256="):
        Parts(tmp_path / "parts", settings, 95)


def test_a_fault_of_the_machine_is_tried_again(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a repeated command, which keeps the parts of all other slides."""

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    files, parts = slide_files(cohort)[:2], Parts(tmp_path, SETTINGS, 95)
    make_parts(files[:1], parts, workers=1)
    before = states(parts.place(files[0]))
    with monkeypatch.context() as patch:
        patch.setattr(cut, "open_slide", fails)
        make_parts(files, parts, workers=1)
    part = parts.find(files[1])
    assert part is not None and "Input/output error" in part.skipped and part.transient
    make_parts(files, parts, workers=1)
    part = parts.find(files[1])
    assert part is not None and not part.skipped and not part.transient and len(part.rois) > 0
    assert states(parts.place(files[0])) == before
