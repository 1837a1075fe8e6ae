"""evaluate on two ranks: what it prints and writes is what one process prints and writes, to the bit."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from muse_fast import evaluate
from muse_fast.classification import features
from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detector import STEM
from muse_fast.detection.run import new_detector
from muse_fast.errors import UserError
from muse_fast.runtime import checkpoint, distributed, exit_codes
from muse_fast.runtime.cli import run
from muse_fast.runtime.options import load_settings
from tests.support.ranks import Ranks
from tests.support.thin import thin_networks
from tests.support.toy_runs import Ended
from torture.processes import free_port, rank_environment

RESNET = "timm:resnet10t:channels=[4,8,16,32]:stem_width=4"
DATA = ["--data", "synthetic:7", "source.size=96"]  # five images to train on, one of val, one of test
TASKS = {
    "knn": ["--baseline-random", "k=[1,5]"],
    "linear": ["epochs=3", "folds=2"],
    "finetune": ["epochs=2", "batch_size=2", "--baseline-random"],
}


def words(task: str, *more: str) -> list[str]:
    networks = ["--weights", "random:vit_tiny", RESNET, "random:resnet50"]
    return [task, *networks, *DATA, "--size", "96", "extract_batch=2", "device=cpu", *TASKS[task], *more]


def call(argv: Sequence[str], environment: dict[str, str] | None = None, broken: bool = False) -> Ended:
    """Run the command with thin networks, and with ``broken`` features that cannot be extracted."""
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment or {}))
        stack.enter_context(mock.patch.object(distributed, "_initialised", return_value=False))  # those of tests are
        stack.enter_context(thin_networks())
        if broken:
            stack.enter_context(mock.patch.object(features, "features_of", damaged))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        code = run(evaluate.main, argv)
    return Ended(code, out.getvalue(), err.getvalue())


def damaged(*_: Any) -> torch.Tensor:
    raise UserError("a tile is damaged")


def on_two(ranks: Ranks, argv: Sequence[str], broken: Sequence[bool] = (False, False)) -> list[Ended]:
    port = free_port()
    ended: list[Ended] = ranks(call, [(argv, rank_environment(rank, 2, port), broken[rank]) for rank in (0, 1)])
    return ended


def report(path: Path) -> Any:
    """The numbers without measured times."""

    def untimed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: untimed(one) for key, one in value.items() if key != "seconds"}
        return [untimed(one) for one in value] if isinstance(value, list) else value

    return untimed(json.loads(path.read_text()))


def lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if not line.endswith("s in all.") and "ETA" not in line]


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task: str, tmp_path: Path, two_ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `finetune` the ranks share out the networks, of the others batches of tiles."""
    monkeypatch.chdir(tmp_path)
    alone = call(words(task, "--json", str(tmp_path / "one" / "x.json")))
    main, other = on_two(two_ranks, words(task, "--json", str(tmp_path / "two" / "x.json")))
    assert (alone.code, main.code, other.code) == (0, 0, 0), (alone, main, other)
    assert report(tmp_path / "two" / "x.json") == report(tmp_path / "one" / "x.json")
    assert lines(main.out.replace("two/", "one/")) == lines(alone.out) and "test split, %" in main.out
    assert (main.err, other.out, other.err) == ("", "", "")


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ["data.sample_size=64", "detector.hidden_dim=16", "detector.min_score=0.2"]
    config = load_settings(FinetuneConfig, None, settings)
    with thin_networks():
        one = new_detector(config, ("lymphocyte", "tumour", "stromal"), "random:vit_tiny", None, None)
    state = {"step": 1, STEM: dataclasses.asdict(one.spec)}
    return checkpoint.save(tmp_path_factory.mktemp("detector"), 1, {STEM: one.state_dict()}, state, keep_every=0)


def test_detect(detector: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    argv = ["detect", "--weights", str(detector), *DATA, "--split", "", "--draws", "20", "--device", "cpu"]

    def to(folder: Path) -> list[str]:
        return [*argv, "--json", str(folder / "x.json"), "--csv", str(folder / "csv")]

    alone = call(to(tmp_path / "one"))
    main, other = on_two(two_ranks, to(tmp_path / "two"))
    assert (alone.code, main.code, other.code) == (0, 0, 0), (alone, main, other)
    ours, theirs = ({path.name: path.read_bytes() for path in (tmp_path / n / "csv").iterdir()} for n in ("two", "one"))
    assert ours == theirs and len(ours) == 7
    assert report(tmp_path / "two" / "x.json") == report(tmp_path / "one" / "x.json")
    assert json.loads((tmp_path / "two" / "x.json").read_text())["detected"] > 50
    assert lines(main.out.replace("/two/", "/one/")) == lines(alone.out)
    assert (main.err, other.out, other.err) == ("", "", "")


def test_a_rank_that_fails_ends_all_with_its_message(tmp_path: Path, two_ranks: Ranks) -> None:
    main, other = on_two(two_ranks, words("knn", "--json", str(tmp_path / "x.json")), broken=(False, True))
    assert (main.code, other.code) == (exit_codes.USER_ERROR, exit_codes.USER_ERROR)
    assert main.err == "error: rank 1: a tile is damaged\n" and other.err == "error: a tile is damaged\n"
    assert not (tmp_path / "x.json").exists()


@pytest.mark.heavy
def test_under_torchrun(tmp_path: Path) -> None:
    """As users start it: the same numbers as without torchrun; a mistake ends all ranks and is named."""
    arch = "random:timm:vit_tiny_patch16_224:depth=2:embed_dim=24:num_heads=2"
    argv = ["knn", "--weights", arch, *DATA, "--size", "96", "extract_batch=2", "k=[1,5]", "device=cpu"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def start(launcher: Sequence[str], *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *launcher, "-m", "muse_fast.evaluate", *argv, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)

    for name, launcher in (("one", []), ("two", torchrun)):
        done = start(launcher, "--json", str(tmp_path / f"{name}.json"))
        assert done.returncode == 0, done.stderr
    assert report(tmp_path / "two.json") == report(tmp_path / "one.json")
    assert done.stdout.count("test split, %") == 1
    failed = start(torchrun, "source.size=100000")
    assert failed.returncode == 1 and "error: synthetic: size=100000: expected 32 to 8192" in failed.stderr
