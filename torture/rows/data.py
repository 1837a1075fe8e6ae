"""D1 to D5: bad JPEGs, damaged pixels, decompression bombs, bad coordinates and degenerate batches."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from muse_fast.config import ViewsConfig
from muse_fast.errors import UserError
from muse_fast.images import jpeg, jpeg_rows
from muse_fast.roiset.records import Roi, nucleus_records
from muse_fast.roiset.roiset import RoiSet, RoiSetWriter
from muse_fast.training.report import read_metrics
from muse_fast.views.plan import draw_plan, pack
from muse_fast.views.renderers import render_batch
from torture import jpeg_corpus as corpus
from torture import toy
from torture.harness import Outcome, Row, Scale, Tally
from torture.processes import Child, name_of
from torture.suite import tests

NAMED = r"the set, ROI 7: the JPEG cannot be decoded \(.+\)"  # every refusal must match this


def roi_of(data: bytes, width: int = corpus.WIDTH, height: int = corpus.HEIGHT) -> Roi:
    """Return a ROI with these bytes and no nuclei."""
    xy, label, score = np.zeros((0, 2), np.float32), np.zeros(0, np.int16), np.zeros(0, np.float32)
    return Roi(7, data, width, height, 0.5, "s", "", (0, 0), xy, label, score, Path("the set"))


def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``read`` returns, or None if it refuses and names the ROI; other errors propagate."""
    try:
        return read(*arguments)
    except UserError as error:
        if re.search(NAMED, str(error)) is None:
            raise
        return None


# ---------------------------------------------------------------------------------------------------------------- D1


def _rendered(roi: Roi) -> torch.Tensor:
    """Render a view as the GPU backends do, but on the CPU: cut on the way to a process, decoded in another."""
    config = ViewsConfig(global_size=32, local_size=32, num_locals=1, global_mpp_min=0.5, local_mpp_min=0.5)
    planned = pack([draw_plan(roi, 0, 0, config)])
    return render_batch(planned, config, torch.device("cpu"), backend="reference").global_images


def decoders() -> Mapping[str, Callable[[Roi], Any]]:
    """Return each way from a ROI to pixels."""
    return {
        "decode": Roi.decode,
        "decode_rows": lambda roi: roi.decode_rows(roi.height // 2, roi.height),
        "render_batch": _rendered,
    }


def read_all(mutants: int, report: Path) -> int:
    """Read bad files and mutants by every decoder. Runs in its own process, as a crash would take this one down."""
    rng, valid = np.random.default_rng(1), corpus.valid()
    names = sorted(valid)
    bases = [valid[names[i % len(names)]] for i in range(mutants)]
    bad = [(f"bad: {name}", roi_of(data)) for name, data in corpus.bad().items()]
    files = bad + [
        (f"mutant {i}", roi_of(corpus.mutant(rng, base), *corpus.size_of(base))) for i, base in enumerate(bases)
    ]
    failures, refused, slowest = [], 0, 0.0
    compiled = jpeg.cutter
    for cutter in dict.fromkeys([compiled, jpeg_rows]):
        jpeg.cutter = cutter
        for name, roi in files:
            for way, decode in decoders().items():
                began = time.process_time()
                try:
                    refused += attempt(decode, roi) is None
                except Exception as error:
                    failures.append(f"{name}, {way}: {type(error).__name__}: {error}")
                slowest = max(slowest, time.process_time() - began)
    ways = len(dict.fromkeys([compiled, jpeg_rows])) * len(decoders())
    report.write_text(
        json.dumps({"read": ways * len(files), "failures": failures, "refused": refused, "slowest": slowest})
    )
    return 0


def bad_jpegs(scale: Scale) -> Outcome:
    report = scale.folder / "report.json"
    with Child(read_all, scale.of(2000, 100), report, log=scale.folder / "log") as child:
        code = child.wait(900)
    if code != 0:
        return Outcome(1, 0, f"the process ended with {name_of(code)}: {child.output()[-500:]}")
    found = json.loads(report.read_text())
    failed = len(found["failures"]) if found["slowest"] < 2 else found["read"]
    notes = f"{found['refused']} refused by set and ROI, the rest decoded; slowest {found['slowest']:.2f} s"
    return Outcome(found["read"], found["read"] - failed, "; ".join([*found["failures"][:5], notes]))


# ---------------------------------------------------------------------------------------------------------------- D2


def damaged_pixels(scale: Scale) -> Outcome:
    """Overwrite bytes or flip a bit in the scan of a ROI in a set; then read odd but valid files."""
    tally = Tally()
    with RoiSetWriter(scale.folder / "set", provenance={}) as writer:
        writer.add(corpus.picture(), mpp=0.5, xy=[], slide="s")
    rois, shard = RoiSet(scale.folder / "set"), scale.folder / "set" / "shard-00000.bin"
    count, by_decoding = scale.of(300, 100), {8: 0, 1: 0}
    for number in range(2 * count):
        size = 8 if number < count else 1
        damaged = damage(shard, np.random.default_rng(number), size)
        try:
            rois[0]
            said = "nothing"
        except UserError as error:
            said = str(error)
        tally.add("shard-00000.bin, ROI 0: the bytes differ" in said, f"damage {number}: said {said}")
        by_decoding[size] += attempt(roi_of(damaged).decode) is None
    valid = corpus.valid()
    for name, data in valid.items():
        tally.add(attempt(roi_of(data, *corpus.size_of(data)).decode) is not None, f"valid, but refused: {name}")
    shares = f"{100 * by_decoding[8] / count:.0f} % of 8 bytes and {100 * by_decoding[1] / count:.0f} % of 1 bit"
    return tally.outcome(f"all found by hash; strict decoding alone finds {shares}; {len(valid)} valid kinds accepted")


def damage(shard: Path, rng: np.random.Generator, size: int) -> bytes:
    """Overwrite ``size`` bytes in the scan of a shard of one JPEG, or flip a bit; undo earlier damage first."""
    intact = getattr(damage, "intact", {}).get(shard) or shard.read_bytes()
    damage.intact = {shard: intact}  # type: ignore[attr-defined]
    damaged = intact
    while damaged == intact:
        at = int(rng.integers(corpus.scan(intact) + 14, len(intact) - 10))
        new = rng.bytes(size) if size > 1 else bytes([intact[at] ^ 1 << int(rng.integers(8))])
        damaged = corpus.replaced(intact, at, new)
    shard.write_bytes(damaged)
    return damaged


# ---------------------------------------------------------------------------------------------------------------- D3


def header_bombs(report: Path) -> int:
    """Read headers with huge sizes: report the errors and the growth of the process, then that without the checks."""

    def claiming(width: int, height: int) -> bytes:
        data = corpus.save(**corpus.ROWS)
        size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        return corpus.replaced(data, corpus.frame(data) + 5, size)

    def peak() -> float:
        status = Path("/proc/self/status").read_text()  # getrusage includes the peak of the parent process
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    jpeg.read(corpus.save(), corpus.WIDTH, corpus.HEIGHT)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, said = peak(), []
    for size, index in [
        ((65000, 65000), (corpus.WIDTH, corpus.HEIGHT)),
        ((65000, 65000), (65000, 65000)),
        ((16384, 16384), (16384, 16384)),
    ]:
        try:
            jpeg.read(claiming(*size), *index)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    growth = peak() - before
    with suppress(ValueError):
        simplejpeg.decode_jpeg(claiming(6000, 6000), "RGB", strict=False)
    report.write_text(json.dumps({"said": said, "growth": growth, "without checks": peak() - before}))
    return 0


def bombs(scale: Scale) -> Outcome:
    """Read headers of 65000 x 65000 px, and files of 500 scans."""
    tally, report = Tally(), scale.folder / "report.json"
    with Child(header_bombs, report, log=scale.folder / "log") as child:
        child.wait()
    found = json.loads(report.read_text())
    for said in found["said"]:
        tally.add(said != "nothing" and found["growth"] < 64, f"header: {found}")
    tally.add(found["without checks"] > 64, "the measurement does not notice a large allocation")
    bad, slowest = corpus.bad(), 0.0
    for name in ("500 scans, progressive", "500 scans, baseline"):
        for decode in (Roi.decode, lambda roi: roi.decode_rows(0, corpus.HEIGHT)):
            began = time.process_time()
            refused = attempt(decode, roi_of(bad[name])) is None
            slowest = max(slowest, time.process_time() - began)
            tally.add(refused and slowest < scale.limit(0.2), f"{name}: {slowest:.2f} s")
    return tally.outcome(f"headers cost {found['growth']:.0f} MiB, scans {1000 * slowest:.0f} ms")


# ---------------------------------------------------------------------------------------------------------------- D4


def bad_coordinates(scale: Scale) -> Outcome:
    """Read random tables of points, mostly bad: kept unchanged or refused by row; views contain only points inside."""
    tally, rng = Tally(), np.random.default_rng(0)
    config = ViewsConfig(global_size=64, local_size=32, num_locals=2)
    odd = np.array([np.nan, np.inf, -np.inf, -1e-30, 160.0, np.nextafter(160, 0), -1.0, 1e30, 0.0, 2.0**31])
    for number in range(scale.of(10_000, 500)):
        xy = rng.uniform(0, 160, (int(rng.integers(0, 40)), 2))
        if len(xy) and number % 2:
            rows = rng.integers(0, len(xy), int(rng.integers(1, 4)))
            xy[rows, rng.integers(0, 2, len(rows))] = rng.choice(odd, len(rows))
        inside = ((xy >= 0) & (xy < 160)).all(axis=1)
        try:
            kept = nucleus_records(xy, None, None, 160, 160, (), "the ROI")["xy"]
            agreed = bool(inside.all() and ((kept >= 0) & (kept < 160)).all() and len(kept) == len(xy))
        except UserError as error:
            agreed = not inside.all() and f"the ROI: nucleus row {int(np.argmin(inside))} " in str(error)
        # No bad point of a set with valid hashes reaches a view.
        points, zeros = xy.astype(np.float32), np.zeros(len(xy), np.float32)
        roi = Roi(3, b"", 160, 160, 0.25, "s", "", (0, 0), points, zeros.astype(np.int16), zeros, Path("set"))
        seen = draw_plan(roi, 0, number, config).nuclei().xy
        tally.add(agreed and bool(((seen >= 0) & (seen < 64)).all()), f"points {xy.tolist()}")
    if not scale.quick:
        table = tests("tests/roiset/test_bad_points.py")
        tally.injected += table.injected
        tally.survived += table.survived
        return tally.outcome(f"10,000 random tables and {table.injected} cases of the test suite {table.notes}")
    return tally.outcome()


# ---------------------------------------------------------------------------------------------------------------- D5


def degenerate_batches(scale: Scale) -> Outcome:
    """Run on sets with no nuclei, with one, or with a single ROI; the test suite does the runs on two ranks."""
    tally = Tally()
    kinds: dict[str, tuple[list[int | None], tuple[str, ...]]] = {
        "no nuclei anywhere": ([0, 0, 0], ()),
        "no nuclei in some ROIs": ([0, None, 0, None, 0], ()),
        "one nucleus per ROI": ([1, 1, 1], ()),
        "a batch of one ROI without nuclei": ([0], ("optim.batch_size=1",)),
        "a batch of one ROI, repeated": ([None], ("optim.batch_size=4",)),
        "no local views": ([None, 0], ("views.num_locals=0",)),
        "EMA centres, no nuclei": ([0, 0], ("loss.centering=ema", "head.input_norm=false")),
    }
    for number, (name, (nuclei, settings)) in enumerate([*kinds.items()][: scale.of(len(kinds), 2)]):
        place = scale.folder / str(number)
        place.mkdir()
        toy.prepare(place, nuclei)
        code = toy.PRETRAIN.finish(place, place / "run", "optim.steps=4", *settings)
        rows = read_metrics(place / "run" / "metrics.jsonl")
        finite = all(math.isfinite(row[key]) for row in rows for key in ("loss", "grad_norm") if key in row)
        enough = sum("loss" in row for row in rows) == 4
        said = toy.log_of(place / "run").read_text()[-300:]
        tally.add(code == 0 and finite and enough, f"{name}: exit code {code}, {said}")
    if not scale.quick:
        ranks = tests("tests/test_distributed.py", "-k", "without_nuclei")
        tally.injected += ranks.injected
        tally.survived += ranks.survived
        return tally.outcome(f"{len(kinds)} runs on one rank, {ranks.injected} on two {ranks.notes}")
    return tally.outcome()


ROWS = [
    Row(
        "D1",
        "bad JPEGs never cause a crash, and each is named",
        "the corpus and 2000 mutants by every decoder: decoded or refused by set and ROI, each within 2 s",
        bad_jpegs,
    ),
    Row(
        "D2",
        "damaged pixels are never trained on",
        "300 times 8 bytes and 300 single bits: all found; no valid kind refused",
        damaged_pixels,
    ),
    Row("D3", "decompression bombs cost bounded memory and time", "below 64 MiB and 0.2 s", bombs),
    Row(
        "D4",
        "nucleus coordinates are checked",
        "each listed bad input and 10,000 random tables: kept or refused by row, no nan in a view",
        bad_coordinates,
    ),
    Row(
        "D5", "batches without nuclei or pairs have a finite loss", "7 kinds on one rank, 2 on two", degenerate_batches
    ),
]
