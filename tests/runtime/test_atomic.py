"""Temporary files: of one process each, and recognised by it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from muse_fast.runtime import atomic


@pytest.mark.parametrize("name", ["summary.json", "no_suffix", "TCGA-A1.1B2C-DX1.svs.json"])
def test_processes_of_two_machines_do_not_share_a_temporary_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though they may have the same pid, as in containers."""
    path = tmp_path / name
    with atomic.replacing(path) as ours:
        assert atomic.writer_of(ours) == os.getpid() and ours.suffix == path.suffix
        ours.write_text("ours")
        with monkeypatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda: "another.node")
            assert atomic.writer_of(ours) is None
            with atomic.replacing(path) as theirs:
                assert theirs != ours and atomic.writer_of(theirs) == os.getpid()
                theirs.write_text("theirs")
            assert path.read_text() == "theirs"
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """Of the same file, but not what a running process or another machine writes."""
    host = socket.gethostname()
    with subprocess.Popen(["true"]) as process:
        process.wait()
    gone, here = process.pid, os.getppid()
    left = tmp_path / f".tmp-a-{host}-{gone}.json"
    others = [f".tmp-a-{host}-{here}.json", f".tmp-a-another.node-{gone}.json", f".tmp-b-{host}-{gone}.json", "a.txt"]
    for path in (left, *(tmp_path / name for name in others)):
        path.touch()
    atomic.write_json(tmp_path / "a.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "a.json"])


def test_a_folder_is_not_taken_for_a_file(tmp_path: Path) -> None:
    with atomic.new_folder(tmp_path / "out") as folder:
        assert atomic.writer_of(folder) == os.getpid()
        atomic.write_json(folder / "a.json", {"a": 1})
    assert json.loads((tmp_path / "out" / "a.json").read_text()) == {"a": 1}
    assert atomic.writer_of(tmp_path / "out") is atomic.writer_of(tmp_path / ".gitignore") is None
