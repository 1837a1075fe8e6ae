"""``python -m muse_fast.prepare inspect DIR``: recognise a dataset, count and check it, and print how to prepare it."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from muse_fast.errors import UserError, require
from muse_fast.preparing.audit import open_without
from muse_fast.preparing.build import Sample
from muse_fast.preparing.roi_sheet import roi_sheet
from muse_fast.preparing.scale_check import ScaleCheck
from muse_fast.roiset.roiset import Roi
from muse_fast.runtime import exit_codes
from muse_fast.runtime.atomic import write_json
from muse_fast.runtime.folders import iter_files, subfolders
from muse_fast.runtime.options import key_values
from muse_fast.runtime.progress_bar import track
from muse_fast.sources import Dataset, SourceImage, source_kinds
from muse_fast.sources.names import patient

_OVERLAYS = 4
_ALL_UP_TO, _OF_MORE = 10_000, 1_000  # images read by default: all, or some of a larger dataset
_SHOWN_PROBLEMS = 10


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.prepare inspect",
        description="Recognise the dataset in a folder, count it, check its um/px and splits, and draw four overlays.",
    )
    parser.add_argument("folder", help="folder of a dataset; or KIND:DIR to choose the layout")
    parser.add_argument("--out", type=Path, help="folder for the overlays (default: inspect-NAME)")
    parser.add_argument(
        "--images",
        type=int,
        help="number of images to read (default: all, or 1,000 of more than 10,000)",
    )
    parser.add_argument("options", nargs="*", metavar="key=value", help="settings of the source, for example mpp=0.25")
    args = parser.parse_intermixed_args(argv)
    try:
        return inspect(args.folder, key_values(args.options), args.out, args.images)
    except OSError as error:
        raise UserError(f"{args.folder} was not inspected: {error}") from error


def inspect(target: str, options: dict[str, str], out: Path | None = None, images: int | None = None) -> int:
    """Print the contents of a folder and write ``overlay-N.png`` and ``report.json`` to ``out``; return the exit code.

    Raises:
        UserError: the folder does not exist, has no known layout, or the source refuses it.
    """
    require(images is None or images > 0, "--images", images, "1 or more")
    kind, _, rest = target.partition(":")
    folder = Path(rest) if kind in source_kinds() and rest else Path(target)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if folder == Path(target):
        kind = recognise(folder)
    spec, source_type = f"{kind}:{folder}", source_kinds()[kind]
    print(f"{folder} is laid out as {kind}: {source_type.title}")
    source = open_without(spec, options)
    command = shlex.join(["python", "-m", "muse_fast.prepare", spec, f"runs/{folder.resolve().name}"])
    command += "".join(f" {shlex.quote(f'{key}={value}')}" for key, value in options.items())
    if not isinstance(source, Dataset):
        print(f"  {len({slide for slide, _ in source.slides()})} slides; their nuclei are found by the next command")
        for line in source.without_effect:
            print(f"  no effect  {line}")
        print(f"next: {command}")
        return 0

    out = out or Path(f"inspect-{folder.resolve().name}")
    census = _Census(source, images)
    overlays = _draw(out, census.shown, source.label_names)
    report = {"kind": kind, "source": spec, "options": options} | census.report() | {"next": command}
    write_json(out / "report.json", report)
    _print(report, census.problems)
    print(f"  look at  {', '.join(map(str, overlays)) or 'nothing: no image could be read'}")
    print(f"next: {command}")
    return exit_codes.USER_ERROR if census.problems else 0


# ------------------------------------------------------------------------------------------------------ recognition


class _Guess(NamedTuple):
    kind: str
    missing: tuple[str, ...]
    share: float  # share of the layout's patterns that match something


def recognise(folder: Path) -> str:
    """Return the kind of source whose layout a folder has.

    Raises:
        UserError: no layout fits; names the nearest one and what is missing, or a subfolder that fits.
    """
    guesses = _guesses(folder)
    whole = [guess.kind for guess in guesses if not guess.missing]
    if whole:
        return whole[0]
    nearest = max(guesses, key=lambda guess: (guess.share, len(guess.missing)))
    # Any folder of TIFFs fits wsi, so a partial match of another layout is stronger evidence.
    weak = {"wsi"} if nearest.share > 0 else set()
    for path in subfolders(folder):
        for guess in _guesses(path):
            if not guess.missing and guess.kind not in weak:
                raise UserError(f"{folder} is not a dataset, but {path} is laid out as {guess.kind}: inspect that one")
    if nearest.share == 0:
        raise UserError(f"{folder} has no known layout ({', '.join(source_kinds())}); see docs/datasets.md")
    raise UserError(
        f"{folder} has no known layout; the nearest is {nearest.kind}, but {' and '.join(nearest.missing)} "
        f"{'is' if len(nearest.missing) == 1 else 'are'} missing; see docs/datasets.md"
    )


def _guesses(folder: Path) -> list[_Guess]:
    guesses = []
    for kind, source in source_kinds().items():
        for layout in source.layouts:
            missing = tuple(pattern for pattern in layout if next(iter_files(folder, pattern), None) is None)
            guesses.append(_Guess(kind, missing, 1 - len(missing) / len(layout)))
    return guesses


# ----------------------------------------------------------------------------------------------------------- counts


@dataclass
class _Split:
    images: int = 0
    slides: set[str] = field(default_factory=set)
    patients: set[str] = field(default_factory=set)
    nuclei: Counter[int] = field(default_factory=Counter)  # by label, -1 unknown


class _Census:
    """Counts the contents of a dataset, reading one image at a time."""

    def __init__(self, source: Dataset, images: int | None) -> None:
        self.problems: list[str] = []
        self._source = source
        self._splits: dict[str, _Split] = defaultdict(_Split)
        self._splits_of_patient: dict[str, set[str]] = defaultdict(set)
        self._mpp: list[float] = []
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._empty = 0
        self._scale = ScaleCheck()
        for slide, split in source.slides():
            one = self._splits[split]
            one.images += 1
            one.slides.add(slide)
            who = patient(slide) or slide  # without a known patient, each slide counts as one
            one.patients.add(who)
            self._splits_of_patient[who].add(split)
        most = images or (len(source) if len(source) <= _ALL_UP_TO else _OF_MORE)
        self._rows = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).round().astype(np.int64))
        with_nuclei, without = Sample(_OVERLAYS), Sample(_OVERLAYS)
        for item in track(_readable(source, self._rows, self.problems), len(self._rows), "images"):
            self._count(item)
            (with_nuclei if len(item.xy) else without).offer(item)
        self.shown = (with_nuclei.items + without.items)[:_OVERLAYS]

    def _count(self, item: SourceImage) -> None:
        labels = np.full(len(item.xy), -1) if item.label is None else item.label
        self._splits[item.split].nuclei.update(labels.tolist())
        self._mpp.append(item.mpp)
        self._sizes[item.image.shape[1], item.image.shape[0]] += 1
        self._empty += not len(item.xy)
        self._scale.add(item)

    def report(self) -> dict[str, Any]:
        names = self._source.label_names
        splits = {}
        for split, one in self._splits.items():
            known = {name: one.nuclei[label] for label, name in enumerate(names)}
            splits[split] = {
                "images": one.images,
                "slides": len(one.slides),
                "patients": len(one.patients),
                "nuclei": one.nuclei.total(),
                "nuclei_per_class": known | ({"unknown": one.nuclei[-1]} if one.nuclei[-1] else {}),
            }
        return {
            "images": len(self._source),
            "images_read": len(self._mpp),
            "images_unreadable": len(self.problems),
            "images_without_nuclei": self._empty,
            "classes": list(names),
            "splits": splits,
            "mpp": [min(self._mpp), max(self._mpp)] if self._mpp else [],
            "sizes": [[*size, count] for size, count in self._sizes.most_common()],
            "left_out": dict(self._source.dropped),
            "scale": self._scale.summary(),
            "patients_in_several_splits": self._leaks(),
            "warnings": [*self._scale.warnings(), *self._doubts()],
        }

    def _leaks(self) -> dict[str, list[str]]:
        return {one: sorted(splits) for one, splits in sorted(self._splits_of_patient.items()) if len(splits) > 1}

    def _doubts(self) -> Iterator[str]:
        if leaks := self._leaks():
            listed = ", ".join(f"{name} ({' and '.join(splits)})" for name, splits in list(leaks.items())[:5])
            more = f" and {len(leaks) - 5} more" if len(leaks) > 5 else ""
            yield f"the same patient is in several splits: {listed}{more}"
        total = sum((one.nuclei for one in self._splits.values()), Counter[int]())
        absent = [name for label, name in enumerate(self._source.label_names) if not total[label]]
        if absent and total:
            yield f"no nuclei of class {', '.join(absent)}"


def _readable(source: Dataset, rows: NDArray[np.int64], problems: list[str]) -> Iterator[SourceImage]:
    """Yield some images of a dataset. Those that cannot be read are skipped and listed in ``problems``."""
    for row in rows:
        try:
            yield source.read(source.entries[row])
        except UserError as error:
            problems.append(str(error))


# ---------------------------------------------------------------------------------------------------------- showing


def _draw(out: Path, shown: Sequence[SourceImage | Roi], label_names: tuple[str, ...]) -> list[Path]:
    paths = []
    for number in range(1, _OVERLAYS + 1):
        path = out / f"overlay-{number}.png"
        path.unlink(missing_ok=True)  # may be left from an earlier call with more images
        if number <= len(shown):
            roi_sheet(path, shown[number - 1 : number], label_names, cell=1024, radius=4.0)
            paths.append(path)
    return paths


def _print(report: dict[str, Any], problems: list[str]) -> None:
    names = list(report["classes"])
    if names and any("unknown" in one["nuclei_per_class"] for one in report["splits"].values()):
        names.append("unknown")
    splits = report["splits"]
    rows = [["", *(split or "(no split)" for split in splits)]]
    rows += [
        [what, *(str(one[what]) for one in splits.values())] for what in ("images", "slides", "patients", "nuclei")
    ]
    rows += [[f"  {name}", *(str(one["nuclei_per_class"].get(name, 0)) for one in splits.values())] for name in names]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  " + "  ".join([first.ljust(widths[0]), *numbers]))
    if report["images_read"] < report["images"]:
        print(f"  nuclei counted in {report['images_read']} of {report['images']} images")
    if report["mpp"]:
        low, high = report["mpp"]
        print(f"  um/px    {low:g}" + (f" to {high:g}" if high > low else ""))
    sizes = [f"{width} x {height} px ({count})" for width, height, count in report["sizes"][:4]]
    print(f"  sizes    {', '.join(sizes)}" + (" and others" if len(report["sizes"]) > 4 else ""))
    print(f"  nuclei   {_scale_words(report['scale'])}; {report['images_without_nuclei']} images without nuclei")
    if report["left_out"]:
        print(f"  skipped  {', '.join(f'{reason} {count}' for reason, count in report['left_out'].items())}")
    for warning in report["warnings"]:
        print(f"  warning  {warning}")
    for problem in problems[:_SHOWN_PROBLEMS]:
        print(f"  error    {problem}")
    if len(problems) > _SHOWN_PROBLEMS:
        print(f"  error    and {len(problems) - _SHOWN_PROBLEMS} more images that cannot be read")


def _scale_words(scale: dict[str, float | None]) -> str:
    words = []
    if scale["nuclei_per_mm2"] is not None:
        words.append(f"{scale['nuclei_per_mm2']:.0f} per mm2")
    if scale["spacing_um"] is not None:
        words.append(f"{scale['spacing_um']:.1f} um to the nearest neighbour")
    if scale["width_um"] is not None:
        words.append(f"{scale['width_um']:.1f} um wide")
    return ", ".join(words) or "too few to check the um/px"
