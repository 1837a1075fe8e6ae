"""Memory, damage and batches, with an encoder that costs nothing."""

from __future__ import annotations

import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from muse_fast.embedding import files, pipeline
from muse_fast.embedding.encoders import Shown
from muse_fast.embedding.nuclei import Nuclei
from muse_fast.embedding.parts import Parts
from muse_fast.embedding.pipeline import Embedding
from muse_fast.errors import UserError
from muse_fast.predicting.pages import PageFile
from tests.support.small_slides import damage, page_with_tissue, tifffile, write_slide


class PixelEncoder:
    """The vector of a nucleus is the colour of its pixel, repeated."""

    protocol, mpp, side, margin, device = "map", 0.5, 128, 16, torch.device("cpu")

    def __init__(self, dim: int = 3) -> None:
        self.dim = dim

    def windows_of(self, batch: int) -> int:
        return batch

    def shown(self, pixels: NDArray[np.uint8], corner: tuple[int, int], xy: NDArray[np.float64]) -> Shown:
        assert pixels.shape == (128, 128, 3) and corner == (0, 0)
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
        return Shown(image, torch.from_numpy(xy).float(), torch.zeros(len(xy), dtype=torch.int64))

    def vectors(self, shown: Shown) -> Tensor:
        x, y = shown.xy.long().clamp_max(127).T
        return shown.images[shown.image_index, :, y, x].float().repeat(1, self.dim // 3)


def nuclei_at(xy: NDArray[np.float64]) -> Nuclei:
    return Nuclei(xy, np.zeros(len(xy), np.int16), np.ones(len(xy), np.float32), ("nucleus",))


def vectors_of(page: PageFile, xy: NDArray[np.float64], folder: Path, batch: int = 4) -> NDArray[np.float32]:
    parts = Parts(folder, {})
    with Embedding(page, PixelEncoder(), nuclei_at(xy), max_unreadable=0.5) as embedding:
        embedding.run(parts, batch=batch, readers=2, progress=lambda *_: None)
        return np.concatenate([rows for _, rows in embedding.result(parts)[1].blocks(77)])


def test_each_nucleus_is_read_at_its_place(tmp_path: Path) -> None:
    """In the order in which they are given, whatever the batch."""
    image = np.random.default_rng(0).integers(0, 255, (700, 900, 3), np.uint8)
    slide = PageFile(write_slide(tmp_path / "s.tif", image), 0.5)
    xy = np.random.default_rng(1).uniform(0, 1, (500, 2)) * (900, 700)
    expected = image[xy[:, 1].astype(int), xy[:, 0].astype(int)]
    for batch in (1, 3, 500):
        assert (vectors_of(slide, xy, tmp_path / str(batch), batch) == expected).all()


def test_unreadable_nuclei_are_left_out(tmp_path: Path) -> None:
    """They keep the other nuclei's numbers as they are; too many are an error."""
    slide = write_slide(tmp_path / "s.tif", page_with_tissue(), compression="zlib")
    damage(slide, 7)  # of 6 x 5 tiles of 256 px
    xy = np.array([[300.0, 100], [300, 300], [600, 300], [511.9, 511.9], [512.0, 512]])
    rows = vectors_of(PageFile(slide, 0.5), xy, tmp_path / "parts")
    assert np.isnan(rows).all(axis=1).tolist() == [False, True, False, True, False]
    with Embedding(PageFile(slide, 0.5), PixelEncoder(), nuclei_at(xy), max_unreadable=0.3) as embedding:
        with pytest.raises(UserError, match=r"unreadable at .*more than max_unreadable=0.3 of the nuclei"):
            embedding.run(Parts(tmp_path / "again", {}), batch=4, readers=1, progress=lambda *_: None)
        nuclei, written = embedding.result(Parts(tmp_path / "parts", {}))
    described = files.Described("s", nuclei, written, 0.5, {"version": "0"})
    assert files.in_memory(described, "float32").obs_names.tolist() == ["s:0", "s:2", "s:4"]
    assert files.write(tmp_path, "s", described, "float16", "h5ad") == files.Written(3, {"nucleus": 3}, 2, 3)


@pytest.mark.heavy
def test_memory_does_not_grow_with_the_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At four times the side, only positions, classes and scores grow, not pixels (13 MB) or vectors (6 MB).

    How many windows wait at the peak depends on the threads, but is limited.
    """
    monkeypatch.setattr(files, "_BLOCK", 64)
    monkeypatch.setattr(pipeline, "PART", 8)
    tile = zlib.compress(bytes(3 * 256**2))
    peaks, counts = [], []
    for side in (2, 2, 8):  # the first run loads what both need
        slide = tmp_path / f"{side}.tif"
        tifffile.imwrite(
            slide, iter([tile] * side**2), shape=(256 * side, 256 * side, 3), dtype="uint8", tile=(256, 256),
            photometric="rgb", compression="zlib", resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
        )  # fmt: skip
        places = np.arange(10.0, 256 * side, 27)
        xy = np.stack(np.meshgrid(places, places), axis=2).reshape(-1, 2)
        parts = Parts(tmp_path / f"{len(peaks)}", {})
        tracemalloc.start()
        with Embedding(PageFile(slide, 0.5), PixelEncoder(510), nuclei_at(xy), max_unreadable=0) as embedding:
            embedding.run(parts, batch=4, readers=1, progress=lambda *_: None)
            nuclei, rows = embedding.result(parts)
        files.write(parts.folder, "s", files.Described("s", nuclei, rows, 0.5, {"version": "0"}), "float16", "h5ad")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        counts.append(len(xy))
    assert counts[2] > 5_000
    waiting = 8 * 3 * PixelEncoder.side**2
    assert peaks[2] - peaks[1] < 150 * (counts[2] - counts[1]) + waiting, peaks  # a vector takes 1,020 bytes
