"""D6: damaged and odd slides in `predict`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from muse_fast.images.synthetic import synthetic_image
from muse_fast.predict import main
from muse_fast.runtime.cli import run
from torture.harness import Outcome, Row, Scale, Tally

_Pixels = NDArray[Any]
_FACTORS = (1, 4, 16)
_SIDE, _LEFT, _RIGHT, _MPP = 704, 130, 574, 0.5  # pixels: a square of tissue on glass
_PATCH = 90  # pixels: left and top of the patch, so that it is 262 um wide
_NEAR = 1.0  # pixels


def field() -> _Pixels:
    """Draw tissue on glass."""
    page = np.full((_SIDE, _SIDE, 3), 245, np.uint8)
    page[_LEFT:_RIGHT, _LEFT:_RIGHT] = synthetic_image(0, _RIGHT - _LEFT, _MPP)[0]
    return page


def write(path: Path, page: _Pixels) -> None:
    """Write a tiled TIFF with several levels, 8 or 16 bits."""
    with tifffile.TiffWriter(path) as file:
        for factor in _FACTORS:
            level = page if factor == 1 else page[factor // 2 :: factor, factor // 2 :: factor]
            file.write(
                level, tile=(64, 64), photometric="rgb", compression="zlib", resolution=(1e4 / _MPP, 1e4 / _MPP),
                resolutionunit="CENTIMETER", subfiletype=int(factor > 1),
            )  # fmt: skip


def damage(path: Path, rng: random.Random) -> None:
    """Overwrite the beginning of some tiles of some levels."""
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for page in rng.sample(list(file.pages), rng.randint(1, len(_FACTORS))):
            share = rng.choice((0.02, 0.1, 0.5, 1.0))
            for offset, stored in zip(page.dataoffsets, page.databytecounts, strict=True):
                if rng.random() < share:
                    content[offset : offset + min(stored, 40)] = bytes(min(stored, 40))
    path.write_bytes(content)


def odd(page: _Pixels) -> Iterator[tuple[str, _Pixels]]:
    """Yield the field in forms in which other programs store it, by file name."""
    shown = np.zeros((_SIDE, _SIDE), bool)
    shown[_LEFT:_RIGHT, _LEFT:_RIGHT] = True
    yield "black.png", np.where(shown[..., None], page, np.uint8(0))
    yield "transparent.png", np.dstack([page, np.where(shown, 255, 0).astype(np.uint8)])
    yield "patch.png", page[_PATCH:-_PATCH, _PATCH:-_PATCH]
    yield "16-bit.tif", page.astype(np.uint16) * 257
    yield "12-bit.tif", page.astype(np.uint16) * 16


def silent_losses(scale: Scale) -> Outcome:
    """Predict slides with random damage and the same field in odd forms: a loss must be an error or be reported."""
    page, tally = field(), Tally()
    inputs = scale.folder / "in"
    inputs.mkdir()
    write(inputs / "sound.tif", page)
    for number in range(scale.of(100, 6)):
        write(inputs / f"damaged-{number}.tif", page)
        damage(inputs / f"damaged-{number}.tif", scale.rng)
    for name, pixels in odd(page):
        if name.endswith(".tif"):
            write(inputs / name, pixels)
        else:
            Image.fromarray(pixels).save(inputs / name)
    out = scale.folder / "out"
    code = run(main, ["--weights", "classical", "--out", str(out), str(inputs), f"mpp={_MPP}", "max_unreadable=0.9"])
    total = json.loads((out / "summary.json").read_text())
    sound = _nuclei(out, "sound")
    for path in sorted(inputs.iterdir()):
        refused = code == 2 and path.name in total["refused"]
        found = {} if refused else _summary(out, path.stem)
        said = refused or found["unreadable_mm2"] > 0 or bool(found["nothing_found"])
        corner = _PATCH if path.name == "patch.png" else 0
        recall = 0.0 if said else _recall(_nuclei(out, path.stem) + corner, sound)
        tally.add(said or (recall == 1 and len(sound) > 50), f"{path.name}: {recall:.0%} of {len(sound)} nuclei")
    damaged = sum(_summary(out, path.parent.name)["unreadable_mm2"] > 0 for path in out.glob("*/summary.json"))
    return tally.outcome(f"{len(total['refused'])} refused, {damaged} with damage reported")


def _summary(out: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((out / name / "summary.json").read_text()))


def _nuclei(out: Path, name: str) -> NDArray[np.float64]:
    rows = (line.split(",") for line in (out / name / "cells.csv").read_text().splitlines()[1:])
    return np.array([(float(row[0]), float(row[1])) for row in rows]).reshape(-1, 2)


def _recall(found: NDArray[np.float64], sound: NDArray[np.float64]) -> float:
    """Return the share of the sound slide's nuclei that were found."""
    from scipy.spatial import KDTree

    return float((KDTree(found).query(sound)[0] <= _NEAR).mean()) if len(found) else 0.0


ROWS = [
    Row(
        "D6",
        "no slide loses nuclei silently",
        "100 slides with random damage, 5 forms of a sound one: as many nuclei, or an error, or the loss is reported",
        silent_losses,
    )
]
