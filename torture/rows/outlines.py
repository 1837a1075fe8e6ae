"""O1: the GeoJSON written for QuPath."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from muse_fast.images.geojson import read_shapes, write_outlines
from muse_fast.images.tissue import write_tissue
from torture.harness import Outcome, Row, Scale, Tally


def strict_json(path: Path) -> dict[str, Any]:
    """Parse JSON; ValueError for duplicate keys and for numbers that JSON does not have (NaN, Infinity)."""

    def refuse(number: str) -> NoReturn:
        raise ValueError(number)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError(f"duplicate key: {pairs}")
        return dict(pairs)

    return json.loads(path.read_text(), parse_constant=refuse, object_pairs_hook=unique)


def random_mask(rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return blobs, some of which have holes or touch the border or each other's corners."""
    from scipy.ndimage import gaussian_filter

    side = int(rng.integers(8, 60))
    noise = gaussian_filter(rng.standard_normal((side, side)), float(rng.uniform(0.5, 4)))
    return noise > np.quantile(noise, rng.uniform(0.2, 0.95))


def geojson(scale: Scale) -> Outcome:
    """Write the outlines of random masks, read them back and check them with shapely; then kill writers."""
    import shapely.geometry

    tally, rng, polygons = Tally(), np.random.default_rng(0), 0
    path = scale.folder / "mask.geojson"
    for number in range(scale.of(1000, 100)):
        write_tissue(path, random_mask(rng), float(rng.uniform(0.5, 40)))
        content = strict_json(path)
        features = content["features"]
        geometries = [feature["geometry"] for feature in features]
        closed = all(ring[0] == ring[-1] and len(ring) > 3 for g in geometries for ring in g["coordinates"])
        valid = all(shapely.geometry.shape(geometry).is_valid for geometry in geometries)
        unique = len({feature["id"] for feature in features}) == len(features)
        read = [len(shape.polygons) for shape in read_shapes(path)] == [1] * len(features)
        polygons += len(features)
        tally.add(closed and valid and unique and read, f"mask {number}: {closed=} {valid=} {unique=} {read=}")
    _kill_writers(tally, scale, path)
    return tally.outcome(f"{polygons} outlines")


def _kill_writers(tally: Tally, scale: Scale, path: Path) -> None:
    """Kill a child that writes one of two contents over and over: the file must always be one of them, complete."""
    ring = [np.stack([np.cos(a := np.linspace(0, 6, 3000)), np.sin(a)], axis=1) * 100]
    expected = []
    for count in (1, 40):
        write_outlines(path, [ring] * count, "x", (0, 0, 0))
        expected.append(path.read_bytes())
    for _ in range(scale.of(50, 10)):
        pid = os.fork()
        if pid == 0:
            while True:
                for count in (1, 40):
                    write_outlines(path, [ring] * count, "x", (0, 0, 0))
        time.sleep(scale.rng.uniform(0.01, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        tally.add(path.read_bytes() in expected, "a partial file after a kill")


ROWS = [
    Row(
        "O1",
        "QuPath can load the GeoJSON",
        "1000 random masks: strict JSON, closed valid rings, unique ids, read back; 50 kills leave no partial file",
        geojson,
    )
]
