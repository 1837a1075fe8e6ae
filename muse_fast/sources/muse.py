"""Pretraining samples made by the MUSE authors' code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError
from muse_fast.images.image_files import read_image
from muse_fast.images.points import Points
from muse_fast.images.tables import read_rows
from muse_fast.roiset.records import check_image
from muse_fast.runtime.folders import iter_files
from muse_fast.sources.base import Dataset, Entry, mpp_setting, require_file


class Muse(Dataset):
    """MUSE's own pretraining samples: ``samples/*.h5`` of 2048 px at 0.25 um per pixel, listed by ``metadata.csv``.

    A sample contains ``patch``, pixels ``[H, W, 3]`` uint8 or the bytes of a JPEG, and ``cell``, ``[n, 2]`` x, y.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(Dataset.Options):
        mpp: float = mpp_setting(0.25)
        """Um per pixel. The authors' builder assumes 0.25 for a slide whose header does not state it; if that is wrong,
        set the true value."""

    kind = "muse"
    title = "a folder of MUSE samples with samples/ and metadata.csv"
    layouts = (
        ("metadata.csv", "samples/*.h5"),
        ("mpp_*-size_*.npy",),  # the evaluation cache, recognised to explain why it is refused
    )
    COLUMNS = ("sample_name", "wsi_name", "patch_id", "n_cell")
    CACHE = re.compile(r"mpp_[\d.]+-size_\d+.*\.npy")

    def __init__(self, target: str, options: Options) -> None:
        self._refuse_cache(Path(target))
        super().__init__(target, options)
        self._metadata = require_file(self.folder / "metadata.csv", f"expected {self.title}")
        self.entries, self._num_cells = [], []
        names = set()
        for row, values in read_rows(self._metadata, self.COLUMNS):
            name = values["sample_name"].removesuffix(".h5")
            if name in names or not values["n_cell"].isdecimal() or len(values["n_cell"]) > 9:
                problem = "is listed twice" if name in names else f"has n_cell {values['n_cell']!r}, expected a count"
                raise UserError(f"{self._metadata}, row {row}: {name} {problem}")
            names.add(name)
            path = self.folder / "samples" / f"{name}.h5"
            self.entries.append(Entry(name, values["wsi_name"], "", path, path, options.mpp, row=len(self.entries)))
            self._num_cells.append(int(values["n_cell"]))
        found = {path.stem for path in iter_files(self.folder / "samples", "*.h5")}
        if lost := sorted(names - found):
            raise UserError(
                f"{self.folder / 'samples' / lost[0]}.h5 is missing, one of {len(lost)} listed in {self._metadata}"
            )
        if extra := sorted(found - names):
            raise UserError(f"{self.folder / 'samples' / extra[0]}.h5 is not listed in {self._metadata}")

    def _refuse_cache(self, path: Path) -> None:
        caches = iter_files(path, "*.npy") if path.is_dir() else (path,)
        for cache in caches:
            if self.CACHE.fullmatch(cache.name):
                raise UserError(
                    f"{cache} is the evaluation cache of the authors' code: a pickle, which could run any code when "
                    "loaded, so it is not read; use the dataset it was made from (brcam2c:, ocelot: or puma:DIR)"
                )

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        import h5py

        try:
            with h5py.File(path, "r") as file:
                yield file
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(f"{path}: not a readable sample ({error}); expected 'patch' and 'cell'") from error

    def _pixels(self, entry: Entry) -> NDArray[np.uint8]:
        with self._open(entry.image) as file:
            patch = file["patch"]
            shape, dtype = patch.shape, patch.dtype
            if dtype != np.uint8 or len(shape) not in (1, 3) or (len(shape) == 3 and shape[2] != 3):
                raise UserError(
                    f"{entry.image}: patch is {dtype} {list(shape)}, expected uint8 [H, W, 3] or the bytes of a JPEG"
                )
            pixels = patch[()]
        if pixels.ndim == 1:
            return read_image(entry.image, pixels.tobytes())
        check_image(pixels, str(entry.image))
        return pixels

    def _nuclei(self, entry: Entry, width: int, height: int) -> Points:
        with self._open(entry.labels) as file:
            cell = file["cell"][()]
        cell = np.asarray(cell).reshape(-1, 2) if np.size(cell) == 0 else np.asarray(cell)
        if cell.ndim != 2 or cell.shape[1] != 2 or cell.dtype.kind not in "fiu" or not np.isfinite(cell).all():
            raise UserError(f"{entry.labels}: cell is {cell.dtype} {list(cell.shape)}, expected finite numbers [n, 2]")
        if len(cell) != self._num_cells[entry.row]:
            raise UserError(
                f"{entry.labels}: {len(cell)} cells, but {self._metadata} says {self._num_cells[entry.row]}"
            )
        return self._inside(Points(cell, None), width, height, entry.labels)
