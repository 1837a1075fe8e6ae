"""The bytes of a ROI set: its records, its JPEGs, and the checks on its input."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images import jpeg
from muse_fast.images.jpeg import MAX_SIDE, REMEDY

FORMAT = "muse_fast.roiset"
VERSION = 1
SHARD_BYTES = 1 << 30

INDEX = np.dtype(
    [
        ("shard", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("length", "<u4"),  # JPEG bytes
        ("offset", "<u8"),  # of the first JPEG byte in its shard
        ("mpp", "<f8"),
        ("slide", "<i4"),  # position in roiset.json's "slides"
        ("split", "<i4"),  # position in roiset.json's "splits"
        ("origin", "<i8", (2,)),  # x, y of the top-left corner in level-0 pixels of the slide
        ("nuclei", "<i8", (2,)),  # start and stop in nuclei.bin
        ("sha256", "u1", (32,)),  # of the JPEG bytes followed by the bytes of the NUCLEUS records
    ]
)
NUCLEUS = np.dtype([("xy", "<f4", (2,)), ("label", "<i2"), ("score", "<f4")])


@dataclass(frozen=True, slots=True)
class Roi:
    """One ROI: an encoded image and its nuclei."""

    id: int
    jpeg: bytes
    width: int
    height: int
    mpp: float  # um per pixel
    slide: str
    split: str
    origin: tuple[int, int]  # x, y in level-0 pixels of the slide
    xy: NDArray[np.float32]  # [n, 2] pixels, in [0, width) x [0, height)
    label: NDArray[np.int16]  # [n], position in RoiSet.label_names, -1 unknown
    score: NDArray[np.float32]  # [n], NaN unknown
    path: Path  # the set it came from

    def decode(self) -> NDArray[np.uint8]:
        """Decode the pixels, ``[height, width, 3]`` uint8 RGB; grey images have three equal channels.

        Raises:
            UserError: not a valid JPEG of the ROI's size, or beyond the limits; names the set and the ROI.
        """
        with self._named():
            return jpeg.read(self.jpeg, self.width, self.height)

    def decode_rows(self, top: int, bottom: int) -> tuple[NDArray[np.uint8], int]:
        """Decode at least the rows ``top:bottom``; returns pixels and their first row; see `images.jpeg.read_rows`.

        Raises:
            UserError: as for `decode`, for damage in these rows.
        """
        with self._named():
            return jpeg.read_rows(self.jpeg, self.width, self.height, top, bottom)

    def cut_rows(self, top: int, bottom: int) -> tuple[bytes, int]:
        """Return a JPEG of at least the rows ``top:bottom`` and its first row; see `images.jpeg.cut`.

        Raises:
            UserError: the header is not of a JPEG of the ROI's size; names the set and the ROI.
        """
        with self._named():
            return jpeg.cut(self.jpeg, self.width, self.height, top, bottom)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise UserError(f"{self.path}, ROI {self.id}: the JPEG cannot be decoded ({error}); {REMEDY}") from None


def encode_jpeg(image: NDArray[np.uint8], quality: int = 95, subsampling: str = "4:4:4") -> bytes:
    """Encode ``[H, W, 3]`` uint8 RGB as a baseline JPEG with one restart marker per row of MCUs.

    Args:
        subsampling: chroma subsampling, ``4:4:4``, ``4:2:2`` or ``4:2:0``.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=subsampling, restart_marker_rows=1)
    return buffer.getvalue()


def check_image(image: NDArray[np.uint8], name: str) -> tuple[int, int]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"{name}: the image is {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3]")
    height, width, _ = image.shape
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise UserError(f"{name}: the image is {width} x {height} px, expected 1 to {MAX_SIDE} px per side")
    return height, width


def nucleus_records(
    xy: ArrayLike,
    label: ArrayLike | None,
    score: ArrayLike | None,
    width: int,
    height: int,
    label_names: tuple[str, ...],
    name: str,
) -> NDArray[np.void]:
    """Check the nuclei of one ROI and pack them into ``[n]`` NUCLEUS records."""
    points = _numbers(xy, f"{name}: xy", "fiu").astype(np.float64)
    if points.size == 0:
        points = points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2:
        raise UserError(f"{name}: xy has the shape {list(points.shape)}, expected [n, 2]")
    size = np.array([width, height])
    inside = ((points >= 0) & (points < size)).all(axis=1)  # false for NaN as well
    if not inside.all():
        row = int(np.argmin(inside))
        raise UserError(
            f"{name}: nucleus row {row} (counted from 0) is at x, y = {points[row, 0]:g}, {points[row, 1]:g}, "
            f"expected 0 <= x < {width} and 0 <= y < {height} (pixels, x before y)"
        )
    nuclei = np.zeros(len(points), NUCLEUS)
    # A float64 just below the border may round onto it, which is outside.
    nuclei["xy"] = np.minimum(points.astype(np.float32), np.nextafter(size.astype(np.float32), np.float32(0)))
    nuclei["label"] = -1
    nuclei["score"] = np.nan
    if label is not None and len(points):
        labels = _column(_numbers(label, f"{name}: label", "iu"), len(points), f"{name}: label")
        stop = len(label_names) or np.iinfo(np.int16).max + 1
        _check_rows((labels >= -1) & (labels < stop), labels, f"{name}: label", f"-1 to {stop - 1}")
        nuclei["label"] = labels
    if score is not None and len(points):
        scores = _column(_numbers(score, f"{name}: score", "fiu"), len(points), f"{name}: score")
        _check_rows(np.abs(scores) < 1e30, scores, f"{name}: score", "a finite number or NaN", np.isnan(scores))
        nuclei["score"] = scores
    return nuclei


def _numbers(values: ArrayLike, name: str, kinds: str) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError:
        raise UserError(f"{name} has rows of different lengths") from None
    if array.size and array.dtype.kind not in kinds:
        expected = "integers" if kinds == "iu" else "numbers"
        raise UserError(f"{name} is {array.dtype}, expected {expected}")
    return array


def _column(values: NDArray[Any], rows: int, name: str) -> NDArray[Any]:
    if values.shape != (rows,):
        raise UserError(f"{name} has the shape {list(values.shape)}, expected [{rows}], one per nucleus")
    return values


def _check_rows(
    good: NDArray[np.bool_], values: NDArray[Any], name: str, expected: str, also: NDArray[np.bool_] | bool = False
) -> None:
    good = good | also
    if not good.all():
        row = int(np.argmin(good))
        raise UserError(f"{name} of nucleus row {row} (counted from 0) is {values[row]}, expected {expected}")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def roi_hash(jpeg: bytes, nuclei: NDArray[np.void]) -> bytes:
    digest = hashlib.sha256(jpeg)
    digest.update(nuclei.tobytes())
    return digest.digest()


class HashedFile:
    """A file written from front to back whose size and SHA-256 are known at any time."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb")  # noqa: SIM115
        self.size = 0
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.size += len(data)
        self._hash.update(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def read_info(path: Path) -> dict[str, Any]:
    file = path / "roiset.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not a ROI set (it has no {file.name}); create one with muse_fast.prepare") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); {REMEDY}") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(f"{file}: expected the format {FORMAT!r}; this is not a ROI set")
    if info.get("version") != VERSION:
        raise UserError(
            f"{file}: version {info.get('version')!r}, this program reads version {VERSION}; run prepare again"
        )
    if missing := [key for key in _KINDS if key not in info]:
        raise UserError(f"{file}: {', '.join(missing)} missing; {REMEDY}")
    if wrong := [key for key, is_valid in _KINDS.items() if not is_valid(info[key])]:
        raise UserError(f"{file}: {', '.join(wrong)} not valid; {REMEDY}")
    return info


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 53


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_shards(value: Any) -> bool:
    names = [shard_name(number) for number in range(len(value))] if isinstance(value, dict) else None
    return names is not None and list(value) == names and all(map(_is_count, value.values()))


def _are_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("index.bin", "nuclei.bin"))


_KINDS: dict[str, Callable[[Any], bool]] = {
    "num_rois": _is_count,
    "num_nuclei": _is_count,
    "label_names": _are_names,
    "slides": _are_names,
    "splits": _are_names,
    "shards": _are_shards,
    "sha256": _are_hashes,
}


def check_index(path: Path, index: NDArray[np.void], info: dict[str, Any]) -> None:
    """Check that no record points outside the set, which a correct hash does not rule out.

    Raises:
        UserError: names the first record that does.
    """
    if not len(index):
        return
    shard = np.minimum(index["shard"], len(info["shards"]))
    room = np.array([*info["shards"].values(), 0], np.uint64)[shard]
    start, stop = index["nuclei"].T
    sides = np.stack([index["width"], index["height"]])
    checks = {
        "shard": shard == index["shard"],
        "place of the JPEG": (index["offset"] <= room) & (index["length"] <= room - np.minimum(index["offset"], room)),
        "place of the nuclei": (start >= 0) & (start <= stop) & (stop <= info["num_nuclei"]),
        "size": ((sides >= 1) & (sides <= MAX_SIDE)).all(axis=0),
        "mpp": np.isfinite(index["mpp"]) & (index["mpp"] > 0),
        "slide": (index["slide"] >= 0) & (index["slide"] < len(info["slides"])),
        "split": (index["split"] >= 0) & (index["split"] < len(info["splits"])),
    }
    for what, good in checks.items():
        if not good.all():
            raise UserError(f"{path}: the {what} of ROI {int(np.argmin(good))} is not valid; {REMEDY}")


def check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {REMEDY}") from error
    if found != size:
        raise UserError(f"{path}: {found} bytes, expected {size}; {REMEDY}")
    if not path.is_file():
        raise UserError(f"{path}: not a file; {REMEDY}")


def map_records(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    check_size(path, count * dtype.itemsize)
    if count == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")
