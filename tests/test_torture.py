"""The harnesses of ``python -m torture`` in quick form, and proof that each detects what it looks for.

This skips rows whose quick form is a test of the suite already: C1 and C3 (test_checkpoint.py), C2 and D5
(test_pretrain.py, test_distributed.py), D1 to D4 (test_jpeg.py, test_bad_points.py), T3 (test_torchrun.py), T5
(test_pretrain.py).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_fast.embedding import files
from muse_fast.roiset import roiset
from muse_fast.runtime import checkpoint, options, watchdog
from torture import __main__ as cli
from torture import toy
from torture.harness import Outcome, Row, Scale, Tally, run
from torture.rows import checkpoints, data, outlines, runs, security, settings, slides, table, vectors
from torture.suite import ROOT
from torture.toy import Command

QUICK = ("C4", "S1", "S2", "D6", "T1", "T4", "T6", "T7", "U1", "O1", "O2")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_survives(name: str) -> None:
    row = table.ROWS[table.NAMES.index(name)]
    ran = run(row, quick=True)
    assert ran.passed, ran.outcome


def test_the_documentation_lists_the_same_promises() -> None:
    lines = (ROOT / "docs" / "reliability.md").read_text().replace("`", "").splitlines()
    promises = [line.split(" | ")[:2] for line in lines[: lines.index("## What we observed")] if line.startswith("| ")]
    assert promises[1:] == [[f"| {row.name}", row.promise] for row in table.ROWS]


# -------------------------------------------------------------------- harnesses fail once the protection is taken out


def blind(*_: Any, **__: Any) -> None:
    """Replaces a check."""


def fails(harness: Callable[[Scale], Outcome], folder: Path) -> bool:
    return not run(Row("X", "", "", lambda scale: harness(Scale(True, folder))), quick=True).passed


def test_without_the_manifest_damage_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_verify_file", blind)
    assert fails(checkpoints.flips_and_cuts, tmp_path)


def test_without_the_rename_kills_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written in place, and any folder counts as a complete checkpoint."""

    def in_place(out: Path) -> Path:
        out.mkdir(parents=True)
        return out

    monkeypatch.setattr(checkpoint.atomic, "begin", in_place)
    monkeypatch.setattr(checkpoint.atomic, "commit", blind)
    monkeypatch.setattr(checkpoint, "verify", blind)
    assert fails(checkpoints.kills, tmp_path)


def test_without_removal_orphans_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "remove_temporary", blind)
    monkeypatch.setattr(checkpoint.atomic, "_remove_stale", blind)
    assert fails(checkpoints.kills, tmp_path)


def test_without_refusal_typos_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_set", blind)
    monkeypatch.setattr(settings, "_other_values", lambda value: [])  # these take seconds
    assert fails(settings.bad_settings, tmp_path)


def test_without_the_hash_damaged_pixels_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roiset, "roi_hash", lambda *_: b"")
    monkeypatch.setattr(roiset.RoiSet, "__getitem__", lambda self, i: None)
    assert fails(data.damaged_pixels, tmp_path)


def test_without_the_checks_hostile_sets_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roiset, "check_index", blind)
    assert fails(security.nothing_escapes, tmp_path)


def unguarded(command: Command, argv: list[str], poison: str, on_rank: int, report: Path) -> int:
    """Run the command with a guard that accepts everything."""
    from muse_fast.training.guard import Guard

    Guard.look = lambda self, step, terms, roi_ids, epochs: torch.ones(())  # type: ignore[method-assign]
    Guard.check = blind  # type: ignore[method-assign]
    return runs.poisoned(command, argv, poison, on_rank, report)


@pytest.mark.slow
@pytest.mark.parametrize("name", toy.COMMANDS)
def test_without_the_guard_poison_is_detected(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "poisoned", unguarded)

    def one_poison(scale: Scale) -> Outcome:
        tally = Tally()
        runs.poison_one_rank(tally, scale, toy.prepare(tmp_path), toy.COMMANDS[name], "nan in an image")
        return tally.outcome()

    assert fails(one_poison, tmp_path)


def test_damage_taken_for_glass_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slides, "QUICK", ("tiles damaged in all levels",))
    monkeypatch.setattr("muse_fast.images.slide.Lost.add", blind)
    assert fails(slides.silent_losses, tmp_path)


def test_vectors_written_in_place_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is killed in the middle of writing, whatever the speed of the machine."""
    write, embed = files.write, vectors._embed

    def in_place(folder: Path, stem: str, *rest: Any) -> Any:
        if folder.parent.name.startswith("out-"):
            (folder.parent / f"{stem}.h5ad").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(folder, stem, *rest)

    monkeypatch.setattr(files, "write", in_place)
    monkeypatch.setattr(vectors, "_embed", lambda argv, out, kill_after=None, log=None: embed(argv, out, log=log))
    assert fails(vectors.interrupted_vectors, tmp_path)


def test_rings_that_do_not_close_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muse_fast.images.geojson._closed", lambda ring: ring.tolist())
    assert fails(outlines.geojson, tmp_path)


def test_calls_that_unpickle_are_detected(tmp_path: Path) -> None:
    bad = [
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
        "joblib.load(path)",
    ]
    (tmp_path / "bad.py").write_text("from pickle import loads\n" + "\n".join(bad))
    assert len(security.unsafe_calls(tmp_path)) == len(bad) + 1
    (tmp_path / "bad.py").write_text(
        "torch.load(p, weights_only=True)\nnp.load(p, allow_pickle=False)\nmodel.eval()\nbuild().eval()\n"
    )
    assert security.unsafe_calls(tmp_path) == []


def test_a_payload_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def unpickle(file: Path) -> None:
        pickle.loads(file.read_bytes())

    monkeypatch.setattr(security, "loaders", lambda folder: iter([("a loader", "x.bin", unpickle)]))
    assert fails(security.no_code_runs, tmp_path)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row("A1", "keeps", "2 of 2", lambda scale: Outcome(2, 2)),
        Row("A2", "breaks", "2 of 2", lambda scale: Outcome(2, 1, "one was lost")),
        Row("A3", "raises", "", lambda scale: Outcome(1 // 0, 1)),
        Row("A4", "is tested elsewhere", "make something", None),
    ]
    monkeypatch.setattr(table, "ROWS", rows)
    monkeypatch.setattr(table, "NAMES", [row.name for row in rows])
    assert cli.main(["A1", "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["rows"]["A1"]["survived"] == 2
    assert cli.main(["--json", str(tmp_path / "b.json")]) == 1
    written = json.loads((tmp_path / "b.json").read_text())
    assert {name: row["passed"] for name, row in written["rows"].items()} == {"A1": True, "A2": False, "A3": False}
    assert "ZeroDivisionError" in written["rows"]["A3"]["notes"] and not written["passed"]
    shown = capsys.readouterr().out
    assert "one was lost" in shown and "not run" in shown
    with pytest.raises(SystemExit):
        cli.main(["Z9"])


# -------------------------------------------------------------------------------------- which ranks the others wait for


def sign(beats: int, collectives: int) -> dict[str, Any]:
    return {"beats": beats, "step": 7, "collectives": collectives, "host": "node3", "pid": 11}


@pytest.mark.parametrize(
    ("before", "now", "culprits", "said"),
    [
        ({0: sign(1, 9), 1: sign(1, 8)}, {0: sign(4, 9), 1: sign(4, 8)}, [1], "rank 1 (step 7, pid 11 on node3) has"),
        ({0: sign(1, 9), 1: sign(1, 9)}, {0: sign(4, 9), 1: sign(1, 9)}, [1], "no longer answers"),
        ({0: sign(1, 9)}, {0: sign(4, 9)}, [1], "rank 1 (which never gave a sign) no longer answers"),
        ({0: sign(1, 9), 1: sign(1, 9)}, {0: sign(4, 9), 1: sign(4, 9)}, [0, 1], "look at the network"),
    ],
)
def test_which_rank_the_others_wait_for(
    before: dict[int, dict[str, Any]], now: dict[int, dict[str, Any]], culprits: list[int], said: str
) -> None:
    found, reason = watchdog.waited_for(before, now, 2)
    assert found == culprits and said in reason
