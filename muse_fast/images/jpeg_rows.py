"""Cut a band of rows out of a JPEG at its restart markers, without decoding anything.

A restart marker resets the entropy coder, so the data after it does not depend on the data before it. If rows of MCUs
end in restart markers (as ``encode_jpeg`` writes them), the file's header with another height, followed by the rows of
a band with their markers counted from 0 again, is a JPEG of the band.

In entropy-coded data a byte 0xff is always followed by 0, so markers can be found without decoding.

``muse_fast._jpeg`` is the same in C++; ``muse_fast.images.jpeg`` chooses between the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SOF0, _SOF1, _DHT, _RST0, _SOI = 0xC0, 0xC1, 0xC4, 0xD0, 0xD8
_EOI, _SOS, _DQT, _DRI, _COM = 0xD9, 0xDA, 0xDB, 0xDD, 0xFE
_APP = range(0xE0, 0xF0)
_BLOCK = 8  # pixels a side


def cut_rows(jpeg: bytes, top: int, bottom: int) -> tuple[bytes, int] | None:
    """A JPEG of a band of ``jpeg`` in which at least the rows ``top:bottom`` decode to the same pixels.

    If chroma is subsampled vertically, upsampling blends neighbouring rows: the band then has one more row of MCUs
    above and below, whose outermost pixels may differ.

    Returns:
        The JPEG and the row of the image that it starts at, or None if ``jpeg`` cannot be cut: it is not baseline with
        8 bits and a single scan, has no restart markers, is damaged before the end of the band, or lacks these rows.
        Damage that the markers do not show is left for the decoder to find.
    """
    header = _read_header(jpeg)
    if header is None or not header.interval or not 0 <= top < bottom <= header.height:
        return None
    rows, per_row = -(-header.height // header.mcu_height), -(-header.width // header.mcu_width)
    first = max(0, top // header.mcu_height - header.blends_rows)
    stop = min(rows, -(-bottom // header.mcu_height) + header.blends_rows)
    # A row and a restart interval begin together every `group_rows` rows.
    common = math.gcd(header.interval, per_row)
    group_rows, group_intervals = header.interval // common, per_row // common
    first -= first % group_rows
    stop = min(rows, -(-stop // group_rows) * group_rows)
    intervals = -(-rows * per_row // header.interval)
    begins = first // group_rows * group_intervals
    stops = intervals if stop == rows else stop // group_rows * group_intervals

    scan = np.frombuffer(jpeg, np.uint8)[header.scan_at :]
    markers = _find_markers(scan)[:stops]
    expected = _RST0 + np.arange(stops) % 8
    if stops == intervals:
        expected[-1] = _EOI
    if len(markers) < stops or (scan[markers + 1] != expected).any():
        return None
    begin = 0 if begins == 0 else int(markers[begins - 1]) + 2
    restarts, end = markers[begins:-1] - begin, int(markers[-1])
    entropy_coded = scan[begin:end].copy()
    entropy_coded[restarts + 1] = _RST0 + np.arange(len(restarts)) % 8
    first_row = first * header.mcu_height
    height = min(stop * header.mcu_height, header.height) - first_row
    head = jpeg[: header.height_at] + height.to_bytes(2, "big") + jpeg[header.height_at + 2 : header.scan_at]
    return head + entropy_coded.tobytes() + bytes([0xFF, _EOI]), first_row


def count_scans(jpeg: bytes) -> int:
    """The maximum number of scans in ``jpeg``: its SOS markers, and what looks like one in an APPn or COM segment."""
    data = np.frombuffer(jpeg, np.uint8)
    return int((data[_find_markers(data) + 1] == _SOS).sum())


@dataclass(frozen=True, slots=True)
class _Header:
    height_at: int  # offset of the frame's height, two bytes
    scan_at: int  # offset of the entropy-coded data
    width: int
    height: int
    interval: int  # MCUs between restart markers
    mcu_width: int
    mcu_height: int
    blends_rows: bool  # chroma is subsampled vertically


def _read_header(jpeg: bytes) -> _Header | None:
    """Everything up to the entropy-coded data; None unless baseline with 8 bits and one scan of all components."""
    if jpeg[:2] != bytes([0xFF, _SOI]):
        return None
    frame, height_at, interval, at = b"", 0, 0, 2
    while True:
        if jpeg[at : at + 1] != b"\xff":
            return None
        while jpeg[at : at + 1] == b"\xff":  # fill bytes may precede a marker
            at += 1
        if len(jpeg) - at < 3:
            return None
        marker, at = jpeg[at], at + 1
        length = int.from_bytes(jpeg[at : at + 2], "big")
        if length < 2 or length > len(jpeg) - at:
            return None
        body = jpeg[at + 2 : at + length]
        if marker in (_SOF0, _SOF1):
            if frame or not _is_frame(body):
                return None
            frame, height_at = body, at + 3
        elif marker == _DRI:
            if len(body) != 2:
                return None
            interval = int.from_bytes(body, "big")
        elif marker == _SOS:
            if not frame or not _is_whole_scan(body, frame[5]):
                return None
            factors = [(1, 1)] if frame[5] == 1 else _factors(frame)  # a single component is not interleaved
            across, down = (max(sides) for sides in zip(*factors, strict=True))
            return _Header(
                height_at=height_at,
                scan_at=at + length,
                width=int.from_bytes(frame[3:5], "big"),
                height=int.from_bytes(frame[1:3], "big"),
                interval=interval,
                mcu_width=_BLOCK * across,
                mcu_height=_BLOCK * down,
                blends_rows=any(v < down for _, v in factors),
            )
        elif marker not in (_DHT, _DQT, _COM, *_APP):
            return None
        at += length


def _is_frame(body: bytes) -> bool:
    """Whether a frame has 8 bits, a size, and one to four components with sampling factors of 1 to 4."""
    if len(body) < 6 or body[0] != 8 or body[1:3] == b"\0\0" or body[3:5] == b"\0\0":
        return False
    if not 1 <= body[5] <= 4 or len(body) != 6 + 3 * body[5]:
        return False
    return all(1 <= h <= 4 and 1 <= v <= 4 for h, v in _factors(body))


def _factors(frame: bytes) -> list[tuple[int, int]]:
    """Sampling factors of every component, horizontal and vertical."""
    return [(byte >> 4, byte & 15) for byte in frame[7::3]]


def _is_whole_scan(body: bytes, components: int) -> bool:
    """Whether a scan has all components and all coefficients."""
    return len(body) == 4 + 2 * components and body[0] == components and body[-3:] == b"\x00\x3f\x00"


def _find_markers(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Offsets of the markers, of their 0xff. A 0xff before a 0 is data, one before another 0xff is a fill byte."""
    places = np.flatnonzero(data[:-1] == 0xFF)
    following = data[places + 1]
    return places[(following != 0) & (following != 0xFF)]
