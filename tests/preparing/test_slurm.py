"""Slides shared out by submitit: on this machine for real, and as Slurm would, with stand-ins for its commands."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from muse_fast import prepare
from muse_fast.errors import UserError
from muse_fast.preparing import command
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime.cli import run
from muse_fast.runtime.shares import TaskJob
from tests.support.fake_slurm import fake_slurm
from tests.support.small_slides import page_with_tissue, write_slide

main = partial(run, prepare.main)

pytest.importorskip("submitit")

SETTINGS = ["roi_um=64", "min_nuclei=1", "detector=classical"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    for i in range(3):
        write_slide(folder / f"s{i}.tif", page_with_tissue(i, 600, 700, 512))
    (folder / "broken.tif").write_bytes(b"no slide")
    return folder


@pytest.mark.slow
def test_tasks_on_this_machine_make_the_same_set(
    cohort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, alone = tmp_path / "set", tmp_path / "alone"
    assert main([f"wsi:{cohort}", str(out), *SETTINGS, "--slurm-tasks", "2", "--local"]) == 0
    said = capfd.readouterr().out
    assert "2 tasks for 4 slides" in said and "1 of 4 slides skipped" in said
    done = [log.read_text() for log in (tmp_path / "set.slurm").glob("*_log.out")]
    assert sorted(text.count("slides done") for text in done) == [0, 1, 1]  # the last assembles
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set.slurm"]
    assert main([f"wsi:{cohort}", str(alone), *SETTINGS, "workers=1"]) == 0
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(alone)) for path in alone.rglob("*") if path.is_file())
    assert all((out / name).read_bytes() == (alone / name).read_bytes() for name in names)
    assert RoiSet(out).slides == ["s0", "s1", "s2"]


def test_what_slurm_is_told(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = tmp_path / "bin"
    fake_slurm(commands, monkeypatch)
    options = ["--slurm-tasks", "5", "--cpus-per-task", "3", "--time", "90", "--partition", "long", "--sbatch", "qos=x"]
    assert main([f"wsi:{cohort}", str(tmp_path / "set"), *SETTINGS, *options]) == 0
    assert f"jobs 40 and 41, which completes {tmp_path / 'set'}" in capsys.readouterr().out
    array, last = ((commands / f"batch-{n}.sh").read_text().splitlines() for n in (0, 1))
    for lines in (array, last):
        for line in ("partition=long", "qos=x", "requeue", "time=90", "cpus-per-task=3"):
            assert f"#SBATCH --{line}" in lines
    assert any(line.startswith("#SBATCH --array=0-4") for line in array)
    assert "#SBATCH --dependency=afterany:40" in last and not any("--array" in line for line in last)


def test_a_task_that_fails_has_failed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        TaskJob(command.main, (f"wsi:{tmp_path / 'absent'}", str(tmp_path / "set")))()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--slurm-tasks", "0"], "--slurm-tasks=0: expected 1 or more"),
        (["--slurm-tasks", "2", "--task", "0/2"], "--task is for what --slurm-tasks submits"),
        (["--slurm-tasks", "2", "min_nucle=3"], "did you mean 'min_nuclei'"),
        (["--slurm-tasks", "2"], "srun"),
    ],
)
def test_refusals(
    cohort: Path,
    tmp_path: Path,
    more: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([f"wsi:{cohort}", str(tmp_path / "set"), *more]) == 2
    assert said in capsys.readouterr().err


def test_for_slides_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--slurm-tasks", "2"], ["--task", "0/2"], ["--keep-parts"]):
        assert main(["synthetic:2", str(tmp_path / "set"), *more]) == 2
        assert "are for slides (wsi:PATH)" in capsys.readouterr().err
