"""predict and embed shared out over tasks, ranks and submitit's jobs: the same files as those of one process."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image

from muse_fast import embed, predict
from muse_fast.embedding import pipeline
from muse_fast.embedding.parts import Parts
from muse_fast.images.synthetic import synthetic_image
from muse_fast.runtime import exit_codes
from muse_fast.runtime.cli import run
from tests.support.fake_slurm import fake_slurm
from tests.support.ranks import Ranks
from tests.support.thin import thin_networks

pytest.importorskip("anndata")
pytest.importorskip("pyarrow")

COMMANDS = {
    "predict": (predict.main, ["--weights", "classical"]),
    "embed": (embed.main, ["--weights", "random:vit_tiny", "nuclei=classical", "window=112", "pictures=false"]),
}
MEASURED = ("seconds", "nuclei_per_second", "mm2_per_second", "peak_memory_mb", "detector_busy", "encoder_busy")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, a copy of one, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("inputs")
    for number, side in enumerate((192, 320, 256)):
        Image.fromarray(synthetic_image(number, side, 0.5)[0]).save(folder / f"{'abc'[number]}.png")
    shutil.copy(folder / "b.png", folder / "copy.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module", params=COMMANDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def words(name: str, inputs: Path, out: Path) -> list[str]:
    return [*COMMANDS[name][1], "--out", str(out), str(inputs), "mpp=0.5"]


def call(name: str, inputs: Path, out: Path, *more: str) -> int:
    with thin_networks():
        return run(COMMANDS[name][0], [*words(name, inputs, out), *more])


@pytest.fixture(scope="module")
def alone(name: str, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp(name) / "out"
    assert call(name, inputs, out) == 2  # because of the broken one
    return contents(out)


def contents(out: Path) -> dict[str, Any]:
    """Every file; of a record all but what is measured."""
    return {str(path.relative_to(out)): content(path) for path in sorted(out.rglob("*")) if path.is_file()}


def content(path: Path) -> Any:
    if path.suffix != ".json":
        return path.read_bytes()
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in MEASURED}


def test_tasks(
    name: str, inputs: Path, alone: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each does its share of the slides, and what cannot be used fails only the command that joins."""
    done = []
    for task in ("1/2", "0/2"):
        assert call(name, inputs, tmp_path, "--task", task) == 0
        done.append({path.stem for path in tmp_path.iterdir() if path.suffix in ("", ".h5ad")})
        assert f"share {task}: {name} 2 of 5 inputs" in capsys.readouterr().out
    assert done == [{"c"}, {"a", "b", "c"}]  # of b, c, a and the broken one, in descending order of size
    assert not (tmp_path / "summary.json").exists()
    assert call(name, inputs, tmp_path, "--task", "0/2") == 0  # nothing is left
    assert call(name, inputs, tmp_path) == 2
    said = capsys.readouterr()
    assert "1 of 5 inputs could not be used" in said.err and "a.png: " not in said.out
    assert contents(tmp_path) == alone


def test_a_summary_does_not_outlive_new_results(name: str, inputs: Path, tmp_path: Path) -> None:
    first = shutil.copytree(inputs, tmp_path / "in", ignore=lambda *_: ["broken.png", "copy.png", "c.png"])
    assert call(name, first, tmp_path / "out") == 0
    shutil.copy(inputs / "c.png", first)
    for task in ("0/2", "1/2"):
        assert call(name, first, tmp_path / "out", "--task", task) == 0
    assert not (tmp_path / "out" / "summary.json").exists()
    assert call(name, first, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["inputs"] == 3
    assert call(name, first, tmp_path / "out") == 2  # already done


def test_a_task_that_died(name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that joins does what is missing, of a page of embed from the parts that were finished."""
    out = tmp_path / "out"
    keep, kept = Parts.keep, list[int]()

    def killed(parts: Parts, number: int, *args: Any) -> None:
        keep(parts, number, *args)
        kept.append(number)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "PART", 1)
    assert call(name, inputs, out, "--task", "1/2") == 0
    if name == "embed":
        with monkeypatch.context() as dying:
            dying.setattr(Parts, "keep", killed)
            assert call(name, inputs, out, "--task", "0/2") == exit_codes.INTERRUPTED
        assert len(list((out / ".b.parts").glob("*.npy"))) == 2
    for folder in (out, tmp_path / "alone"):
        assert call(name, inputs, folder) == 2
    assert contents(out) == contents(tmp_path / "alone")


def as_rank(name: str, rank: int, port: int, arguments: list[str]) -> int:
    launched = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with mock.patch.dict(os.environ, launched), thin_networks():
        return run(COMMANDS[name][0], arguments)


def test_ranks(name: str, inputs: Path, alone: dict[str, Any], tmp_path: Path, two_ranks: Ranks) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = words(name, inputs, tmp_path)
    assert two_ranks(as_rank, [(name, rank, port, arguments) for rank in (0, 1)]) == [2, 0]
    assert contents(tmp_path) == alone


def test_jobs(name: str, inputs: Path, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm, here a stand-in that only answers, is given two tasks and a last job, which make the same files."""
    helpers = pytest.importorskip("submitit.core.utils")
    out = tmp_path / "out"
    fake_slurm(tmp_path / "bin", monkeypatch)
    assert call(name, inputs, out, "--slurm-tasks", "2") == 0
    jobs = [helpers.DelayedSubmission.load(path).function for path in sorted((tmp_path / "out.slurm").glob("*.pkl"))]
    assert len(jobs) == 3 and not out.exists()
    with thin_networks():
        assert [run(job.command, job.arguments) for job in jobs] == [0, 0, 2]
    assert contents(out) == alone
