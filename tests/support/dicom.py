"""Slides as DICOM series of several files, written by hand from PS3.5 (encoding) and PS3.3, A.32.8 (whole slides)."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

_WHOLE_SLIDE, _JPEG = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.1.2.4.50"
_TILE = 256
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


def write_series(folder: Path, name: str, image: np.ndarray, mpp: float, number: int = 1) -> list[Path]:
    """Write a series of three files: ``NAME-0.dcm`` with level 0, ``-1`` with a quarter of it, ``-2`` with a label.

    Args:
        image: ``[H, W, 3]`` uint8, stored as JPEGs of quality 95.
        number: of the series; series of the same number are the same slide.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{i}.dcm" for i in range(3)]
    quarter = np.asarray(Image.fromarray(image).reduce(4))
    for i, (pixels, kind) in enumerate([(image, "VOLUME"), (quarter, "VOLUME"), (image[:90, :80], "LABEL")]):
        shrink = image.shape[1] / pixels.shape[1] if kind == "VOLUME" else 1.0
        paths[i].write_bytes(_dicom(pixels, mpp * shrink, f"1.2.9.{number}", i + 1, kind))
    return paths


def _dicom(image: np.ndarray, mpp: float, series: str, instance: int, kind: str) -> bytes:
    height, width, _ = image.shape
    tile = (_TILE, _TILE) if kind == "VOLUME" else (width, height)
    frames = list(_frames(image, *tile))
    uid = f"{series}.{instance}"
    spacing = f"{mpp / 1000:.10f}\\{mpp / 1000:.10f}"
    meta = _element(0x00020001, "OB", b"\0\1") + _element(0x00020002, "UI", _WHOLE_SLIDE)
    meta += _element(0x00020003, "UI", uid) + _element(0x00020010, "UI", _JPEG) + _element(0x00020012, "UI", "1.2.9")
    elements = [
        _element(0x00080008, "CS", f"ORIGINAL\\PRIMARY\\{kind}\\NONE"),
        _element(0x00080016, "UI", _WHOLE_SLIDE),
        _element(0x00080018, "UI", uid),
        _element(0x00080060, "CS", "SM"),
        _element(0x0020000D, "UI", "1.2.9"),
        _element(0x0020000E, "UI", series),
        _element(0x00209311, "CS", "TILED_FULL"),
        _element(0x00280002, "US", 3),  # samples per pixel
        _element(0x00280004, "CS", "YBR_FULL_422"),
        _element(0x00280006, "US", 0),  # planar configuration
        _element(0x00280008, "IS", str(len(frames))),
        _element(0x00280010, "US", tile[1]),
        _element(0x00280011, "US", tile[0]),
        *(_element(tag, "US", value) for tag, value in ((0x00280100, 8), (0x00280101, 8), (0x00280102, 7))),  # bits
        _element(0x00280103, "US", 0),  # unsigned
        _element(0x00480006, "UL", width),  # of the whole level
        _element(0x00480007, "UL", height),
        _element(0x00480302, "UL", 1),  # optical paths
        _sequence(0x52009229, _sequence(0x00289110, _element(0x00280030, "DS", spacing))),
    ]
    fragments = b"".join(_ITEM + struct.pack("<I", len(frame)) + frame for frame in [b"", *frames])  # b"": no offsets
    pixels = struct.pack("<HH", 0x7FE0, 0x0010) + b"OB\0\0\xff\xff\xff\xff" + fragments + _END + bytes(4)
    return bytes(128) + b"DICM" + _element(0x00020000, "UL", len(meta)) + meta + b"".join(elements) + pixels


def _frames(image: np.ndarray, width: int, height: int) -> Iterator[bytes]:
    for top in range(0, image.shape[0], height):
        for left in range(0, image.shape[1], width):
            part = image[top : top + height, left : left + width]
            tile = np.full((height, width, 3), 255, np.uint8)
            tile[: part.shape[0], : part.shape[1]] = part
            jpeg = io.BytesIO()
            Image.fromarray(tile).save(jpeg, "JPEG", quality=95, subsampling=0)
            yield jpeg.getvalue() + bytes(len(jpeg.getvalue()) % 2)


def _element(tag: int, kind: str, value: str | int | bytes) -> bytes:
    if isinstance(value, int):
        value = struct.pack("<I" if kind == "UL" else "<H", value)
    if isinstance(value, str):
        value = value.encode()
    value += (b"\0" if kind in ("UI", "OB") else b" ") * (len(value) % 2)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind.encode()
    long = kind in ("OB", "SQ")
    return head + (b"\0\0" + struct.pack("<I", len(value)) if long else struct.pack("<H", len(value))) + value


def _sequence(tag: int, item: bytes) -> bytes:
    return _element(tag, "SQ", _ITEM + struct.pack("<I", len(item)) + item)
