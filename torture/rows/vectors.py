"""O2: kills and full disks while vectors of nuclei are computed and written."""

from __future__ import annotations

import io
import os
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from muse_fast import embed
from muse_fast.embedding import pipeline
from muse_fast.images.synthetic import synthetic_image
from muse_fast.runtime import cli
from torture.harness import Outcome, Row, Scale, Tally
from torture.rows.checkpoints import fill, small_disk

FILES = ("a.h5ad", "a.parquet", "a.json")
_SIDE, _NUCLEI = 512, 40
_NETWORK = "timm:vit_tiny_patch16_224:depth=1:embed_dim=48:num_heads=3"  # with random weights
_PART = 4  # windows
_UNEXPLAINED = 1  # exit code of errors that the command does not explain


def interrupted_vectors(scale: Scale) -> Outcome:
    """Kill `embed` at random moments until it is done, again and again, and run it on a disk that is nearly full."""
    argv = _field(scale.folder)
    tally, whole = Tally(), scale.folder / "whole"
    with redirect_stdout(io.StringIO()):  # in this process, so that its children need not import anything
        assert cli.run(embed.main, [*argv, "--out", str(scale.folder / "first")]) == 0
    began = time.monotonic()
    assert _embed(argv, whole) == 0
    seconds = time.monotonic() - began
    kills, number, out = scale.of(200, 4), 0, scale.folder / "out-0"
    while tally.injected < kills:
        if _embed(argv, out, scale.rng.uniform(0, 1.1 * seconds)) == 0:
            tally.add(_same(out, whole), f"{out.name}: another result than without kills, after {tally.injected} kills")
            number += 1
            out = scale.folder / f"out-{number}"
        else:
            tally.add(_absent_or_same(out, whole), f"{out.name}: half-written {_content(out)}")
    notes = f"{number} files finished in between"
    try:
        with small_disk(scale.folder) as disk:
            for free in (0, 20_000, 60_000)[: scale.of(3, 2)]:
                _on_a_full_disk(tally, argv, disk / str(free), free, whole)
    except PermissionError as error:
        notes += f"; no tmpfs ({error})"
    return tally.outcome(notes)


def _field(folder: Path) -> list[str]:
    """Draw a field with nuclei; returns the command's words without ``--out``."""
    Image.fromarray(synthetic_image(0, _SIDE, 0.5)[0]).save(folder / "a.png")
    places = np.random.default_rng(0).uniform(0, _SIDE, (_NUCLEI, 2))
    (folder / "a.csv").write_text("x,y\n" + "".join(f"{x:.1f},{y:.1f}\n" for x, y in places))
    words = ["mpp=0.5", "window=96", "batch=2", "readers=1", "device=cpu", "pictures=false"]
    return ["--weights", _NETWORK, str(folder / "a.png"), f"nuclei={folder / 'a.csv'}", *words]


def _embed(argv: list[str], out: Path, kill_after: float | None = None, log: Path | None = None) -> int:
    """Run the command in a forked child, as that saves the import of torch; the exit code is -9 if it was killed."""
    torch.set_num_threads(1)
    pid = os.fork()
    if pid == 0:
        pipeline.PART = _PART
        with open(log or os.devnull, "a") as said, redirect_stdout(said), redirect_stderr(said):
            try:
                code = cli.run(embed.main, [*argv, "--out", str(out)])
            except BaseException as error:
                code = _UNEXPLAINED
                print(f"Traceback: {error!r}")
            said.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _content(out: Path) -> list[str]:
    return [path.name for path in out.glob("a.*")]


def _absent_or_same(out: Path, whole: Path) -> bool:
    """Whether each file that is there is complete; the summary, which comes last, has seconds in it."""
    there = [name for name in FILES if (out / name).exists()]
    return all(name == "a.json" or (out / name).read_bytes() == (whole / name).read_bytes() for name in there)


def _same(out: Path, whole: Path) -> bool:
    return _content(out) == _content(whole) and _absent_or_same(out, whole)


def _on_a_full_disk(tally: Tally, argv: list[str], out: Path, free: int, whole: Path) -> None:
    others, log = out.parent / "others", out.with_suffix(".log")
    fill(others)
    os.truncate(others, max(others.stat().st_size - free, 0))
    code = _embed(argv, out, log=(whole.parent / log.name))
    said = (whole.parent / log.name).read_text()
    reported = code == 2 and "error:" in said and "No space left" in said and "Traceback" not in said
    nothing = not out.exists() or _absent_or_same(out, whole)
    others.unlink()
    tally.add(reported and nothing, f"{free} bytes free: exit code {code}, {_content(out)}, said {said[-300:]!r}")
    code = _embed(argv, out)
    tally.add(code == 0 and _same(out, whole), f"with room again: exit code {code}")


ROWS = [
    Row(
        "O2",
        "a killed embed continues, and its files are whole or absent",
        "200 kills, 3 full disks: the same bytes as without, nothing half-written",
        interrupted_vectors,
    )
]
