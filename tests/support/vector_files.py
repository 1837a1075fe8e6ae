"""Files of `embed`, written by anndata itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muse_fast.exploring.vectors import VectorFile, open_vectors

anndata = pytest.importorskip("anndata")
pandas = pytest.importorskip("pandas")

MPP = 0.5


def write_vectors(
    path: Path,
    vectors: np.ndarray,
    xy: np.ndarray | None = None,
    *,
    kinds: Sequence[str | None] | None = None,
    score: float | None = None,
    **record: Any,
) -> Path:
    """Write vectors ``[n, D]`` of nuclei at ``xy`` (default: 40 px apart) of the slide that the file is named after."""
    count = len(vectors)
    xy = np.stack([np.arange(count) * 40.0 + 20, np.full(count, 20.0)], axis=1) if xy is None else xy
    obs = pandas.DataFrame(
        {
            "class": pandas.Categorical(["nucleus"] * count if kinds is None else list(kinds)),
            "score": np.linspace(0.5, 1, count, dtype=np.float32) if score is None else np.full(count, score, "f4"),
            "x_um": xy[:, 0] * MPP,
            "y_um": xy[:, 1] * MPP,
            "slide": pandas.Categorical([path.stem] * count),
        },
        index=[f"{path.stem}:{n}" for n in range(count)],
    )
    made = {
        "version": "1",
        "weights": "random:vit_tiny",
        "weights_sha256": "a" * 64,
        "settings": "{}",
        "mpp": 0.5,
        "slide_path": str(path.with_suffix(".png")),
        "slide_mpp": [MPP, MPP],
        "frame": "level0",
        "qupath_origin": [0, 0],
        "protocol": "map",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    file = anndata.AnnData(vectors, obs, obsm={"spatial": xy}, uns={"muse_fast": made | record})
    file.write_h5ad(path)
    return path


def some_files(folder: Path, counts: dict[str, int], dim: int = 5, seed: int = 0) -> list[VectorFile]:
    """Files of random vectors, float32, by the names of their slides."""
    rng = np.random.default_rng(seed)
    scale = np.linspace(3, 1, dim)
    for slide, count in counts.items():
        vectors = (rng.normal(size=(count, dim)) * scale + 2).astype(np.float32)
        write_vectors(folder / f"{slide}.h5ad", vectors)
    return open_vectors([folder / f"{slide}.h5ad" for slide in counts])


def draw_slide(path: Path, xy: np.ndarray, colours: np.ndarray, width: int = 400, height: int = 200) -> None:
    """Write a white image with a square of 12 px in its colour at each nucleus."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    for (x, y), colour in zip(xy.astype(int).tolist(), colours.tolist(), strict=True):
        pixels[max(y - 6, 0) : y + 6, max(x - 6, 0) : x + 6] = colour
    Image.fromarray(pixels).save(path)
