"""JPEGs made in code: ordinary, odd but valid, and bad. All show the same picture, or claim to."""

from __future__ import annotations

import base64
import functools
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 200, 152  # not multiples of 16
SOF0 = b"\xff\xc0"


def picture(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Smoothly varying colours with noise as on real slides, ``[height, width, 3]`` uint8."""
    rng = np.random.default_rng(0)
    grid = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    smooth = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-12, 13, (height, width, 1)), 0, 255).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    """Read any image file as ``[H, W, 3]`` uint8 RGB."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def encode(image: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def save(mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT), form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    if form == "JPEG":
        options = {"quality": 90, "subsampling": 0, **options}
    image = Image.fromarray(picture(*size))
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    image.save(buffer, form, **options)
    return buffer.getvalue()


ROWS: dict[str, Any] = {"restart_marker_rows": 1}


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def frame(data: bytes) -> int:
    """Offset of SOF0 or SOF2."""
    return max(data.find(SOF0), data.find(b"\xff\xc2"))


def scan(data: bytes) -> int:
    """Offset of the last SOS."""
    return data.rindex(b"\xff\xda")


def restarts(data: bytes) -> list[int]:
    """Offsets of the restart markers after SOS."""
    return [i for i in range(scan(data), len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]


def resampled(data: bytes, width: int, height: int, factors: bytes) -> bytes:
    """The same entropy-coded data, declared as MCUs of another shape with the same number of blocks."""
    at = frame(data)
    data = replaced(data, at + 5, height.to_bytes(2, "big") + width.to_bytes(2, "big"))
    for component, factor in enumerate(factors):
        data = replaced(data, at + 11 + 3 * component, bytes([factor]))
    return data


def valid() -> dict[str, bytes]:
    """Files that must be accepted. Names with ``cut`` have restart markers at which bands can be cut."""
    plain, rows, half = save(), save(**ROWS), save(subsampling=2, **ROWS)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees: ignored, as ROIs are stored upright
    thumbnail = segment(0xE1, b"Exif\0\0" + save(size=(32, 24), **ROWS))
    return {
        "cut 4:4:4": rows,
        "cut 4:2:2": save(subsampling=1, **ROWS),
        "cut 4:2:0": half,
        "cut 4:2:0, of whole MCUs": save(subsampling=2, size=(64, 96), **ROWS),
        "cut 4:4:0": resampled(save(subsampling=1, size=(320, 80), **ROWS), 157, 157, b"\x12\x11\x11"),
        "cut 4:1:1": resampled(save(subsampling=2, size=(80, 320), **ROWS), 157, 157, b"\x41\x11\x11"),
        "cut grey": save("L", **ROWS),
        "cut grey with factors of 2 x 2": resampled(save("L", **ROWS), WIDTH, HEIGHT, b"\x22"),
        "cut RGB without conversion": save(keep_rgb=True, **ROWS),
        "cut extended sequential": replaced(rows, frame(rows) + 1, b"\xc1"),
        "cut optimised": save(optimize=True, **ROWS),
        "cut every MCU": save(restart_marker_blocks=1),
        "cut every 5 MCUs, five per row": save(restart_marker_blocks=5),
        "cut every 7 MCUs, never a whole row": save(restart_marker_blocks=7),
        "cut every 7 MCUs, 4:2:0": save(subsampling=2, restart_marker_blocks=7),
        "cut every 2 rows": save(restart_marker_rows=2),
        "cut every 3 rows, 4:2:0": save(subsampling=2, restart_marker_rows=3),
        "cut never: fewer rows than an interval": save(restart_marker_rows=200),
        "cut one row": save(size=(40, 5), **ROWS),
        "cut one MCU": save(size=(3, 5), **ROWS),
        "cut one column": save(size=(1, 90), subsampling=2, **ROWS),
        "cut comment": save(comment=b"\xff\xd9 no end \xff\xd0", **ROWS),
        "cut colour profile": save(icc_profile=bytes(range(256)) * 600, **ROWS),
        "cut orientation": save(exif=exif, **ROWS),
        "cut thumbnail": rows[:2] + thumbnail + rows[2:],
        "cut trailing bytes": rows + b"\xff\xda anything" * 3,
        "cut two pictures, one after the other": rows + half,
        "cut fill bytes in the header": rows[:2] + b"\xff" * 5 + rows[2:],
        "cut fill bytes before restart markers": rows.replace(b"\xff\xd3", b"\xff\xff\xff\xd3"),
        "cut standard Huffman tables omitted": rows[: rows.index(b"\xff\xc4")] + rows[rows.index(b"\xff\xdd") :],
        "height repeated after the scan": rows[:-2] + segment(0xDC, HEIGHT.to_bytes(2, "big")) + rows[-2:],
        "no restart markers": plain,
        "no restart markers, 4:2:0": save(subsampling=2),
        "progressive": save(progressive=True),
        "progressive 4:2:0 with restart markers": save(progressive=True, subsampling=2, **ROWS),
        "progressive grey": save("L", progressive=True),
        "restart interval of 0": rows[: frame(rows)] + segment(0xDD, b"\0\0") + plain[frame(plain) :],
    }


def bad() -> dict[str, bytes]:
    """Files that must be refused: none is an intact RGB or grey JPEG of ``WIDTH`` x ``HEIGHT``."""
    plain, rows, half, progressive = save(), save(**ROWS), save(subsampling=2, **ROWS), save(progressive=True)
    sof, sos, marks = frame(rows), scan(rows), restarts(rows)
    tables, quantisers = rows.index(b"\xff\xc4"), rows.index(b"\xff\xdb")
    interval = rows.index(b"\xff\xdd")
    body = sos + 2 + int.from_bytes(rows[sos + 2 : sos + 4], "big")  # start of the entropy-coded data
    cases = {
        "empty": b"",
        "one byte": b"\xff",
        "SOI": b"\xff\xd8",
        "SOI and EOI": b"\xff\xd8\xff\xd9",
        "EOI first": rows[-2:] + rows,
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
        "SOI and ones": b"\xff\xd8" + b"\xff" * 4096,
        "noise": np.random.default_rng(0).bytes(4096),
        "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "JSON": b'{"error": "AccessDenied"}',
        "gzip": gzip.compress(rows),
        "PNG": save(form="PNG"),
        "PNG of 16 bits": save("I;16", form="PNG"),
        "GIF": save(form="GIF"),
        "BMP": save(form="BMP"),
        "TIFF": save(form="TIFF"),
        "WebP": save(form="WEBP"),
        "JPEG 2000": save(form="JPEG2000"),
        "JPEG in base64": base64.b64encode(rows),
        "CMYK": save("CMYK", **ROWS),
        "smaller picture": save(size=(WIDTH // 2, HEIGHT // 2), **ROWS),
        "width and height swapped": save(size=(HEIGHT, WIDTH), **ROWS),
        "no EOI": rows[:-2],
        "half an EOI": rows[:-1],
        "no EOI, no restart markers": plain[:-2],
        "no EOI, progressive": progressive[:-2],
        "only the header": rows[:body],
        "no data": rows[:body] + rows[-2:],
        "last restart interval missing": rows[: marks[-1]] + rows[-2:],
        "12 bits": replaced(rows, sof + 4, b"\x0c"),
        "16 bits": replaced(rows, sof + 4, b"\x10"),
        "0 bits": replaced(rows, sof + 4, b"\0"),
        "height 0": replaced(rows, sof + 5, b"\0\0"),
        "height 65535": replaced(rows, sof + 5, b"\xff\xff"),
        "height of one block more": replaced(rows, sof + 5, (HEIGHT + 8).to_bytes(2, "big")),
        "height of one block less": replaced(rows, sof + 5, (HEIGHT - 8).to_bytes(2, "big")),
        "width 0": replaced(rows, sof + 7, b"\0\0"),
        "width 65535": replaced(rows, sof + 7, b"\xff\xff"),
        "width of one block more": replaced(rows, sof + 7, (WIDTH + 8).to_bytes(2, "big")),
        "no components": replaced(rows, sof + 9, b"\0"),
        "255 components": replaced(rows, sof + 9, b"\xff"),
        "2 components": replaced(rows, sof + 9, b"\x02"),
        "sampling factors 0": replaced(rows, sof + 11, b"\0"),
        "sampling factors 15": replaced(rows, sof + 11, b"\xff"),
        "luma sampled 2 x 2 in data of 1 x 1": replaced(rows, sof + 11, b"\x22"),
        "missing quantiser": replaced(rows, sof + 12, b"\x03"),
        "two components of the same name": replaced(rows, sof + 10, rows[sof + 13 : sof + 14]),
        "two frames": rows[:sof] + rows[sof : sof + 19] + rows[sof:],
        "no frame": rows[:sof] + rows[sof + 19 :],
        "frame that is too long": replaced(rows, sof + 2, b"\xff\xff"),
        "frame without a length": replaced(rows, sof + 2, b"\0\0"),
        "no quantisers": rows[:quantisers] + rows[sof:],
        "Huffman table of 4080 codes": replaced(rows, tables + 5, b"\xff" * 16),
        "Huffman table that is too long": replaced(rows, tables + 2, b"\xff\xff"),
        "no SOS": rows[:sos] + rows[-2:],
        "SOS without components": replaced(rows, sos + 4, b"\0"),
        "SOS of 5 components": replaced(rows, sos + 4, b"\x05"),
        "SOS of an unknown component": replaced(rows, sos + 5, b"\x77"),
        "SOS of one component twice": replaced(rows, sos + 7, rows[sos + 5 : sos + 6]),
        "SOS with an unknown table": replaced(rows, sos + 6, b"\x33"),
        "SOS that is too short": replaced(rows, sos + 2, b"\0\x03"),
        "SOS that is too long": replaced(rows, sos + 2, b"\xff\xff"),
        "no restart interval": rows[:interval] + rows[interval + 6 :],
        "restart interval of 1": replaced(rows, interval + 4, b"\0\x01"),
        "restart interval of 65535": replaced(rows, interval + 4, b"\xff\xff"),
        "restart interval off by one": replaced(rows, interval + 4, (-(-WIDTH // 8) + 1).to_bytes(2, "big")),
        "restart interval of 3 bytes": rows[:interval] + segment(0xDD, b"\0\0\x19") + rows[interval + 6 :],
        "restart markers swapped": replaced(replaced(rows, marks[3], b"\xff\xd4"), marks[4], b"\xff\xd3"),
        "restart markers all alike": functools.reduce(lambda data, at: replaced(data, at, b"\xff\xd0"), marks, rows),
        "restart marker missing": rows[: marks[5]] + rows[marks[5] + 2 :],
        "restart marker twice": rows[: marks[5]] + rows[marks[5] : marks[5] + 2] + rows[marks[5] :],
        "restart interval missing": rows[: marks[5]] + rows[marks[6] :],
        "EOI in the middle": replaced(rows, marks[5], b"\xff\xd9"),
        "SOI in the middle": replaced(rows, marks[5], b"\xff\xd8"),
        "garbage between segments": rows[:sof] + b"garbage" + rows[sof:],
        "chroma subsampled 1 x 4": resampled(half, WIDTH // 2 + 4, 2 * HEIGHT + 16, b"\x14\x11\x11"),
        "500 scans, progressive": progressive[:-2] + progressive[scan(progressive) : -2] * 500 + progressive[-2:],
        "500 scans, baseline": rows[:-2] + rows[sos:-2] * 500 + rows[-2:],
        "2 scans, baseline": rows[:-2] + rows[sos:-2] + rows[-2:],
        "progressive without its last scans": progressive[: progressive.index(b"\xff\xda", sos) + 40],
    }
    kinds = {0xC2: "progressive", 0xC3: "lossless", 0xC5: "hierarchical", 0xC9: "arithmetic", 0xF7: "JPEG-LS"}
    for marker, name in kinds.items():
        cases[f"baseline called {name}"] = replaced(rows, sof + 1, bytes([marker]))
    for percent in (1, 3, 10, 30, 50, 70, 90, 99):
        cases[f"cut off at {percent} %"] = rows[: len(rows) * percent // 100]
        cases[f"progressive cut off at {percent} %"] = progressive[: len(progressive) * percent // 100]
    return cases


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a valid JPEG."""
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def mutant(rng: np.random.Generator, data: bytes) -> bytes:
    """Make one to eight random changes: flip, set or swap bytes, drop or repeat a run, write a marker, cut the end."""
    changes: list[Callable[[bytearray, int, int], None]] = [_flip, _set, _drop, _repeat, _swap, _mark, _cut]
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        if len(out) > 2:
            at = int(rng.integers(len(out))) if rng.random() < 0.5 else int(rng.integers(min(len(out), 700)))
            changes[int(rng.integers(len(changes)))](out, at, int(rng.integers(256)))
    return bytes(out)


def _flip(out: bytearray, at: int, value: int) -> None:
    out[at] ^= 1 << value % 8


def _set(out: bytearray, at: int, value: int) -> None:
    out[at] = value


def _drop(out: bytearray, at: int, value: int) -> None:
    del out[at : at + value % 40]


def _repeat(out: bytearray, at: int, value: int) -> None:
    out[at:at] = out[at : at + value]


def _swap(out: bytearray, at: int, value: int) -> None:
    other = at * 7919 % len(out)
    out[at], out[other] = out[other], out[at]


def _mark(out: bytearray, at: int, value: int) -> None:
    out[at : at + 2] = bytes([0xFF, 0xC0 | value % 64])


def _cut(out: bytearray, at: int, value: int) -> None:
    if value < 32:
        del out[at:]
