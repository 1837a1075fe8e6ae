"""The ROI set: many ROIs with their nuclei in one folder that many processes read at random.

    roiset.json       format, counts, names of labels, slides and splits, provenance, sizes and hashes of the rest
    index.bin         one INDEX record per ROI
    nuclei.bin        one NUCLEUS record per nucleus, contiguous for each ROI
    shard-00000.bin   JPEG bytes back to back, a new shard at about 1 GiB

A ROI is found by arithmetic, so access costs the same for ten ROIs and for ten million. Nothing is pickled. The
writer builds the folder under a temporary name next to ``out`` and renames it once all bytes are on disk, so a set
is complete or does not exist. The JPEGs have a restart marker after every row of MCUs, so that a reader can cut out
and decode only a band of rows.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, final

import numpy as np
import simplejpeg
from numpy.typing import ArrayLike, NDArray

from muse_fast.errors import UserError
from muse_fast.roiset.records import (
    FORMAT,
    INDEX,
    NUCLEUS,
    REMEDY,
    SHARD_BYTES,
    VERSION,
    HashedFile,
    Roi,
    check_image,
    check_index,
    check_size,
    encode_jpeg,
    map_records,
    nucleus_records,
    read_info,
    roi_hash,
    shard_name,
)
from muse_fast.runtime import atomic


class RoiSet:
    """Reads a ROI set. Cheap to pickle: a data worker receives the path and maps the files itself.

    Opening checks the sizes of all files and the hash of the index; ``set[i]`` checks the hash of that ROI.

    Raises:
        UserError: a file is missing, truncated or altered, or the version differs; names the path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.info = read_info(self.path)
        self.label_names: tuple[str, ...] = tuple(self.info["label_names"])
        self.slides: list[str] = self.info["slides"]
        self.splits: list[str] = self.info["splits"]
        for name, size in self.info["shards"].items():
            check_size(self.path / name, size)
        self._map()
        if atomic.file_sha256(self.path / "index.bin") != self.info["sha256"]["index.bin"]:
            raise UserError(f"{self.path / 'index.bin'}: the hash differs from roiset.json; {REMEDY}")
        check_index(self.path / "index.bin", self._index, self.info)

    def _map(self) -> None:
        self._index = map_records(self.path / "index.bin", INDEX, self.info["num_rois"])
        self._nuclei = map_records(self.path / "nuclei.bin", NUCLEUS, self.info["num_nuclei"])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_index", "_nuclei")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Roi:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: no ROI {i}; the set has ROIs 0 to {len(self) - 1}")
        record = self._index[i]
        # Opened for every read: a set of 500 shards on 16 workers would exhaust the file handles. Unlike with a memory
        # map, a file that is truncated during a read causes an error and not a SIGBUS.
        shard = self.path / shard_name(record["shard"])
        try:
            with open(shard, "rb", buffering=0) as file:
                file.seek(record["offset"])
                jpeg = file.read(record["length"]) or b""
        except OSError as error:
            raise UserError(f"{shard}, ROI {i}: {error.strerror}; {REMEDY}") from error
        start, stop = record["nuclei"]
        nuclei = np.array(self._nuclei[start:stop])
        if roi_hash(jpeg, nuclei) != record["sha256"].tobytes():
            raise UserError(f"{shard}, ROI {i}: the bytes differ from those that were written; {REMEDY}")
        return Roi(
            id=int(i),
            jpeg=jpeg,
            width=int(record["width"]),
            height=int(record["height"]),
            mpp=float(record["mpp"]),
            slide=self.slides[record["slide"]],
            split=self.splits[record["split"]],
            origin=(int(record["origin"][0]), int(record["origin"][1])),
            xy=np.ascontiguousarray(nuclei["xy"]),
            label=np.ascontiguousarray(nuclei["label"]),
            score=np.ascontiguousarray(nuclei["score"]),
            path=self.path,
        )

    @property
    def mpp(self) -> NDArray[np.float64]:
        """Um per pixel of every ROI."""
        return self._index["mpp"]

    @property
    def width(self) -> NDArray[np.uint32]:
        """Width of every ROI in pixels."""
        return self._index["width"]

    @property
    def height(self) -> NDArray[np.uint32]:
        """Height of every ROI in pixels."""
        return self._index["height"]

    @property
    def num_nuclei(self) -> NDArray[np.int64]:
        """Number of nuclei of every ROI."""
        return self._index["nuclei"][:, 1] - self._index["nuclei"][:, 0]

    @property
    def slide(self) -> NDArray[np.int32]:
        """Number of every ROI's slide in ``slides``."""
        return self._index["slide"]

    @property
    def origin(self) -> NDArray[np.int64]:
        """``[n, 2]`` x, y of every ROI's top-left corner in level-0 pixels of its slide."""
        return self._index["origin"]

    def select(self, split: str) -> NDArray[np.int64]:
        """Return the ids of the ROIs of one split, ascending; of all ROIs if ``split`` is empty.

        Raises:
            UserError: the set has no such split.
        """
        if not split:
            return np.arange(len(self), dtype=np.int64)
        if split not in self.splits:
            raise UserError(f"{self.path}: no split {split!r}; the set has {self.splits}")
        return np.flatnonzero(self._index["split"] == self.splits.index(split))

    def slides_of(self, split: str) -> list[str]:
        """Return the names of the slides of one split; of all if ``split`` is empty. Raises as ``select`` does."""
        return [self.slides[i] for i in np.unique(self._index["slide"][self.select(split)])]

    def verify(self) -> list[str]:
        """Read and check every byte of the set; returns one line per problem."""
        problems = []
        if atomic.file_sha256(self.path / "nuclei.bin") != self.info["sha256"]["nuclei.bin"]:
            problems.append(f"{self.path / 'nuclei.bin'}: the hash differs from roiset.json; {REMEDY}")
        for i in range(len(self)):
            try:
                self[i].decode()
            except UserError as error:
                problems.append(str(error))
        return problems


@final
class RoiSetWriter:
    """Writes a ROI set, one ROI at a time; memory does not grow with the set.

    Use it in a ``with`` block. The set appears at ``out`` only when the block ends without an error; after an error
    nothing remains. Files written to ``folder`` inside the block become part of the set's folder.

    Args:
        provenance: how the set was made, for ``roiset.json``.
        label_names: names of the nucleus labels.
        quality, subsampling: of the JPEGs; ``4:2:0`` needs about half the bytes and decoding time of ``4:4:4``.

    Raises:
        UserError: ``out`` exists already, or an added ROI is not valid.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        provenance: dict[str, Any],
        label_names: Sequence[str] = (),
        quality: int = 95,
        subsampling: str = "4:4:4",
    ) -> None:
        json.dumps(provenance)  # if it cannot be JSON, fail now and not after hours of work
        self.out = Path(out).absolute()
        self.label_names = tuple(label_names)
        self._provenance = provenance
        self._quality, self._subsampling = quality, subsampling

    def __enter__(self) -> RoiSetWriter:
        self.folder = atomic.begin(self.out)
        self._index = HashedFile(self.folder / "index.bin")
        self._nuclei = HashedFile(self.folder / "nuclei.bin")
        self._shard: BinaryIO | None = None
        self._shards: dict[str, int] = {}
        self._slides: dict[str, int] = {}
        self._splits: dict[str, int] = {}
        self._mpp_range = (math.inf, -math.inf)
        return self

    def add(
        self,
        image: NDArray[np.uint8],
        *,
        mpp: float,
        xy: ArrayLike,
        label: ArrayLike | None = None,
        score: ArrayLike | None = None,
        slide: str,
        split: str = "",
        origin: tuple[int, int] = (0, 0),
    ) -> int:
        """Append one ROI and return its id.

        Args:
            image: ``[H, W, 3]`` uint8 RGB.
            mpp: um per pixel.
            xy: ``[n, 2]`` pixels of ``image``; every point in ``[0, W) x [0, H)``; n may be 0.
            label: ``[n]`` integers, position in ``label_names``, -1 unknown; None: all unknown.
            score: ``[n]`` confidence, NaN unknown; None: all unknown.
            origin: x, y of the top-left corner in level-0 pixels of the slide.
        """
        check_image(image, self._name(slide))
        jpeg = encode_jpeg(image, self._quality, self._subsampling)
        return self.add_jpeg(jpeg, mpp=mpp, xy=xy, label=label, score=score, slide=slide, split=split, origin=origin)

    def _name(self, slide: str) -> str:
        return f"ROI {self._index.size // INDEX.itemsize} of slide {slide!r}"

    def add_jpeg(
        self,
        jpeg: bytes,
        *,
        mpp: float,
        xy: ArrayLike,
        label: ArrayLike | None = None,
        score: ArrayLike | None = None,
        slide: str,
        split: str = "",
        origin: tuple[int, int] = (0, 0),
    ) -> int:
        """``add`` for an image from ``encode_jpeg``, whose bytes are stored unchanged."""
        roi, name = self._index.size // INDEX.itemsize, self._name(slide)
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
        if not (math.isfinite(mpp) and mpp > 0):
            raise UserError(f"{name}: mpp is {mpp}, expected um per pixel, a number above 0")
        nuclei = nucleus_records(xy, label, score, width, height, self.label_names, name)
        shard, offset = self._append(jpeg)

        start = self._nuclei.size // NUCLEUS.itemsize
        self._nuclei.write(nuclei.tobytes())
        record = np.zeros((), INDEX)
        record["shard"], record["offset"], record["length"] = shard, offset, len(jpeg)
        record["width"], record["height"], record["mpp"] = width, height, mpp
        record["slide"] = self._slides.setdefault(slide, len(self._slides))
        record["split"] = self._splits.setdefault(split, len(self._splits))
        record["origin"] = origin
        record["nuclei"] = start, start + len(nuclei)
        record["sha256"] = np.frombuffer(roi_hash(jpeg, nuclei), np.uint8)
        self._index.write(record.tobytes())
        self._mpp_range = (min(self._mpp_range[0], mpp), max(self._mpp_range[1], mpp))
        return roi

    @property
    def num_bytes(self) -> int:
        """Bytes of images, index and nuclei so far."""
        return sum(self._shards.values()) + self._index.size + self._nuclei.size

    def _append(self, jpeg: bytes) -> tuple[int, int]:
        """Write to the current shard; returns its number and the offset of the first byte."""
        if self._shard is None or self._shard.tell() + len(jpeg) > SHARD_BYTES:
            if self._shard is not None:
                self._shard.close()
            self._shard = open(self.folder / shard_name(len(self._shards)), "wb")  # noqa: SIM115
        offset = self._shard.tell()
        self._shard.write(jpeg)
        self._shards[Path(self._shard.name).name] = offset + len(jpeg)
        return len(self._shards) - 1, offset

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            for file in (self._index.file, self._nuclei.file, self._shard):
                if file is not None:
                    file.close()
            if kind is None:
                self._write_info()
                atomic.commit(self.folder, self.out)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)  # no longer there after a commit

    def _write_info(self) -> None:
        info = {
            "format": FORMAT,
            "version": VERSION,
            "num_rois": self._index.size // INDEX.itemsize,
            "num_nuclei": self._nuclei.size // NUCLEUS.itemsize,
            "mpp": list(self._mpp_range) if self._index.size else [],
            "label_names": list(self.label_names),
            "slides": list(self._slides),
            "splits": list(self._splits),
            "shards": self._shards,
            "sha256": {"index.bin": self._index.hexdigest(), "nuclei.bin": self._nuclei.hexdigest()},
            "provenance": self._provenance,
        }
        (self.folder / "roiset.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
