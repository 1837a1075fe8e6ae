"""``python -m muse_fast.prepare SOURCE OUT [key=value ...]``: slides or labelled images to a ROI set."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from muse_fast import __version__
from muse_fast.cli import run
from muse_fast.data.roiset import RoiSetWriter
from muse_fast.data.sources import Source, SourceImage, open_source
from muse_fast.errors import UserError
from muse_fast.pictures import PALETTE, overlay

_SECONDS_BETWEEN_LINES = 10.0
_SHOWN = 6
_CELL = 480


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m muse_fast.prepare", description="Write a ROI set.")
    parser.add_argument("source", help="wsi:PATH, brcam2c:DIR, points:DIR or synthetic:N")
    parser.add_argument("out", type=Path, help="folder of the ROI set; must not exist")
    parser.add_argument(
        "--quality", type=int, default=95, choices=range(50, 101), metavar="50..100", help="of the JPEGs"
    )
    parser.add_argument("options", nargs="*", metavar="key=value", help="settings of the source, for example mpp=0.25")
    args = parser.parse_intermixed_args(argv)  # --quality may stand before or after key=value

    def command(_: Sequence[str] | None) -> int:
        try:
            return prepare(args.source, args.out, _parse(args.options), quality=args.quality)
        except OSError as error:  # a full disk, above all
            raise UserError(f"{args.out} was not written: {error}") from error

    return run(command)


def prepare(spec: str, out: Path, options: dict[str, str], *, quality: int = 95) -> int:
    """Write the ROI set of one source; returns the exit code.

    Raises:
        UserError: the source cannot be used, holds no ROI, or ``out`` exists; nothing half-written remains.
    """
    source = open_source(spec, **options)
    provenance = {"program": f"muse_fast {__version__}", "source": spec, "options": options, "quality": quality}
    print(f"prepare {spec} -> {out}  ({', '.join(f'{k}={v}' for k, v in options.items()) or 'default settings'})")
    started = time.monotonic()
    tally, sheet = _Tally(source.label_names), _ContactSheet(source.label_names)
    with RoiSetWriter(out, provenance=provenance, label_names=source.label_names, quality=quality) as writer:
        for item in _with_progress(source):
            writer.add(
                item.image,
                mpp=item.mpp,
                xy=item.xy,
                label=item.label,
                score=item.score,
                slide=item.slide,
                split=item.split,
                origin=item.origin,
            )
            tally.count(item)
            sheet.offer(item)
        if not tally.rois:
            raise UserError(f"{spec} gave no ROI; left out: {_listed(source.dropped)}")
        sheet.save(writer.folder / "contact.png")
        summary = tally.summary() | {
            "bytes": writer.num_bytes,
            "seconds": round(time.monotonic() - started, 1),
            "dropped": dict(source.dropped),
        }
        (writer.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _print_summary(out, summary)
    return 0


class _Tally:
    """What the set holds, counted as it is written."""

    def __init__(self, label_names: tuple[str, ...]) -> None:
        self.rois = 0
        self._label_names = label_names
        self._splits: Counter[str] = Counter()
        self._labels: Counter[int] = Counter()
        self._slides: set[str] = set()
        self._mpp: set[float] = set()

    def count(self, item: SourceImage) -> None:
        self.rois += 1
        self._splits[item.split] += 1
        self._slides.add(item.slide)
        self._mpp.add(item.mpp)
        labels = np.full(len(item.xy), -1) if item.label is None else item.label
        self._labels.update(labels.tolist())

    def summary(self) -> dict[str, Any]:
        return {
            "rois": self.rois,
            "slides": len(self._slides),
            "nuclei": self._labels.total(),
            "rois_per_split": dict(self._splits),
            "nuclei_per_class": {self._name(label): count for label, count in sorted(self._labels.items())},
            "mpp": [min(self._mpp), max(self._mpp)],
        }

    def _name(self, label: int) -> str:
        if label < 0:
            return "unknown"
        return self._label_names[label] if self._label_names else str(label)


class _ContactSheet:
    """A few ROIs with their nuclei, each ROI of the source as likely as any other."""

    def __init__(self, label_names: tuple[str, ...]) -> None:
        self._label_names = label_names
        self._shown: list[SourceImage] = []
        self._offered = 0
        self._rng = np.random.default_rng(0)

    def offer(self, item: SourceImage) -> None:
        """Reservoir sampling: holds six ROIs however many come."""
        self._offered += 1
        if len(self._shown) < _SHOWN:
            self._shown.append(item)
        elif (place := int(self._rng.integers(self._offered))) < _SHOWN:
            self._shown[place] = item

    def save(self, path: Path) -> None:
        columns = min(3, len(self._shown))
        rows = -(-len(self._shown) // columns)
        line, gap = 22, 8
        width, height = columns * (_CELL + gap) + gap, line + rows * (_CELL + line + gap) + gap
        canvas = Image.new("RGB", (width, height), (255, 255, 255))
        draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
        left = gap
        for label, name in enumerate(self._label_names):
            draw.ellipse((left, 6, left + 12, 18), fill=PALETTE[label % len(PALETTE)], outline=(40, 40, 40))
            draw.text((left + 18, 3), name, (40, 40, 40), font)
            left += 36 + int(draw.textlength(name, font))
        for i, item in enumerate(self._shown):
            x, y = gap + i % columns * (_CELL + gap), line + gap + i // columns * (_CELL + line + gap)
            canvas.paste(_drawn(item), (x, y))
            text = f"{item.slide} {item.split}  {item.mpp:.3g} um/px  {len(item.xy)} nuclei"
            draw.text((x, y + _CELL + 2), text, (40, 40, 40), font)
        canvas.save(path)


def _drawn(item: SourceImage) -> Image.Image:
    """One ROI with its nuclei, at most ``_CELL`` a side."""
    picture = Image.fromarray(item.image)
    scale = _CELL / max(picture.size)
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    return overlay(np.asarray(picture), item.xy * scale, item.label, radius=3.0)


def _with_progress(source: Source) -> Iterator[SourceImage]:
    """Pass the images on: a bar on a terminal, else a line every ten seconds."""
    total = len(source) if isinstance(source, Sized) else None
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _with_lines(source, total)
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        for item in source:
            yield item
            bar.update(task, advance=1, description=item.slide)


def _with_lines(source: Source, total: int | None) -> Iterator[SourceImage]:
    started = last = time.monotonic()
    for done, item in enumerate(source, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last, rate = now, done / (now - started)
            eta = f", ETA {(total - done) / rate:.0f} s" if total else ""
            print(f"{done}{f'/{total}' if total else ''} ROIs, {rate:.1f} ROI/s{eta}  {item.slide}", flush=True)


def _print_summary(out: Path, summary: dict[str, Any]) -> None:
    low, high = summary["mpp"]
    splits = {name or "(no split)": count for name, count in summary["rois_per_split"].items()}
    print(f"{out}: {summary['rois']} ROIs of {summary['slides']} slides, {summary['nuclei']} nuclei")
    print(f"  splits   {_listed(splits)}")
    print(f"  classes  {_listed(summary['nuclei_per_class'])}")
    print(f"  um/px    {low:g}" + (f" to {high:g}" if high > low else ""))
    print(f"  size     {summary['bytes'] / 1e6:.1f} MB in {summary['seconds']:g} s")
    print(f"  left out {_listed(summary['dropped'])}")
    print(f"  look at  {out / 'contact.png'}")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing"


def _parse(options: list[str]) -> dict[str, str]:
    for option in options:
        if not all(option.partition("=")):
            raise UserError(f"{option!r}: expected key=value")
    return dict(option.split("=", 1) for option in options)


if __name__ == "__main__":
    sys.exit(main())
