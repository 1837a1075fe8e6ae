"""Checkpoints: kills, flipped bits, truncation, hostile files, full disks, order of deletion."""

import json
import pickle
import stat
from pathlib import Path

import pytest
import torch

from muse_fast.errors import UserError
from muse_fast.runtime import atomic, checkpoint
from torture.harness import Scale
from torture.rows.checkpoints import flips_and_cuts, kills
from torture.rows.security import Payload


def tensors(step: int, size: int = 50) -> dict[str, dict[str, torch.Tensor]]:
    return {stem: {"a": torch.full((size,), float(step)), "b": torch.tensor(step)} for stem in ("student", "teacher")}


def save(run: Path, step: int, keep_every: int = 0, size: int = 50) -> Path:
    return checkpoint.save(run, step, tensors(step, size), {"step": step}, keep_every=keep_every)


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    assert checkpoint.latest(tmp_path) == (folder, [])
    assert checkpoint.read_state(folder) == {"step": 7}
    read = checkpoint.read_tensors(folder, "teacher")
    assert torch.equal(read["a"], torch.full((50,), 7.0)) and read["b"] == 7


def test_permissions_are_those_of_other_files(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (tmp_path / "other").touch()
    expected = (tmp_path / "other").stat().st_mode
    assert {stat.filemode(path.stat().st_mode) for path in folder.iterdir()} == {stat.filemode(expected)}


def test_last_two_and_every_nth_are_kept(tmp_path: Path) -> None:
    for step in range(1, 12):
        save(tmp_path, step, keep_every=4)
    assert checkpoint.steps(tmp_path) == [4, 8, 10, 11]


def test_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) == (None, [])
    assert checkpoint.latest(tmp_path / "none") == (None, [])


def test_every_flip_and_truncation_is_reported_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    outcome = flips_and_cuts(Scale(True, tmp_path))
    assert outcome.survived == outcome.injected == 121, outcome.notes


@pytest.mark.parametrize("name", ["student.safetensors", "state.json", "MANIFEST.json"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    (folder / name).unlink()
    with pytest.raises(checkpoint.CheckpointError, match=f"{name}.*missing"):
        checkpoint.verify(folder)


def test_extra_file_and_escaping_name(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "extra.bin").write_bytes(b"x")
    with pytest.raises(checkpoint.CheckpointError, match=r"extra\.bin"):
        checkpoint.verify(folder)
    (folder / "extra.bin").unlink()
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    (folder / "MANIFEST.json").write_text(json.dumps({**manifest, "../../x": {"bytes": 1, "sha256": ""}}))
    with pytest.raises(checkpoint.CheckpointError, match="no valid entry"):
        checkpoint.verify(folder)


def test_a_pickle_in_place_of_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    trap = tmp_path / "PWNED"
    content = pickle.dumps(Payload(trap))
    for name in ("student.safetensors", "state.json"):
        (folder / name).write_bytes(content)
    with pytest.raises(UserError):
        checkpoint.read_tensors(folder, "student")
    with pytest.raises(UserError):
        checkpoint.read_state(folder)
    assert not trap.exists()


def test_bad_contents_with_correct_hashes_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for name, content, said in (
        ("student.safetensors", b"no tensors", r"student\.safetensors: not a safetensors file"),
        ("state.json", b"{}", r"state\.json: it has no step"),
        ("state.json", b"[" * 100_000, r"state\.json: not valid JSON"),
    ):
        (folder / name).write_bytes(content)
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        manifest[name] = {"bytes": len(content), "sha256": atomic.file_sha256(folder / name)}
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))
        with pytest.raises(checkpoint.CheckpointError, match=said):
            checkpoint.read_state(folder) if name == "state.json" else checkpoint.read_tensors(folder, "student")


def test_a_disk_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota, for example: there is room, but not for this user."""
    good = save(tmp_path, 1)

    def over_quota(*_: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr("muse_fast.runtime.tensors.save_file", over_quota)
    with pytest.raises(UserError, match=r"step-00000002: cannot be written .*quota.*MiB are free"):
        save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == (good, [])


def test_full_disk_keeps_the_old_one_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(tmp_path, 1)

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("muse_fast.runtime.tensors.save_file", no_room)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match=r"no room.*MiB are free"):
        save(tmp_path, 2, size=100_000)
    assert checkpoint.latest(tmp_path) == (good, [])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [good.name]


def test_kills_while_saving_lose_nothing_acknowledged(tmp_path: Path) -> None:
    outcome = kills(Scale(True, tmp_path))
    assert outcome.survived == outcome.injected == 40, outcome.notes
