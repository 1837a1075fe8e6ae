"""``prepare wsi:PATH``: write the parts of all slides, then the ROI set and its report from the parts.

After a kill, the same command continues. Several processes and machines may write parts; a run without ``--task``
writes the missing ones and assembles the set.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muse_fast.errors import UserError
from muse_fast.preparing.assemble import Chosen, choose
from muse_fast.preparing.build import build_set, counted, print_summary
from muse_fast.preparing.parts import Part, Parts, make_parts
from muse_fast.preparing.report import Row, draw_slide, row_of, write_report
from muse_fast.roiset.roiset import RoiSetWriter
from muse_fast.runtime.progress_bar import ProgressBar, track
from muse_fast.runtime.shares import Share
from muse_fast.sources.cut import SlideFile
from muse_fast.sources.wsi import Slides, listed


def prepare_slides(
    source: Slides,
    out: Path,
    *,
    provenance: dict[str, Any],
    quality: int,
    keep_parts: bool = False,
    share: Share | None = None,
) -> int:
    """Write the ROI set of some slides; return the exit code.

    Args:
        keep_parts: keep the work folder ``OUT.parts``.
        share: only write the parts of these slides; a later call assembles.

    Raises:
        UserError: no slide can be used, no slide yields a ROI, or ``out`` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already; remove it or choose another folder")
    started = time.monotonic()
    files = source.usable(source.files)
    if share is not None:
        files = share.of(files)
    _print_unused(source)
    if share is None and not files:
        raise UserError(f"no slide can be used\n{listed(source.refused | source.excluded)}")
    parts = Parts(parts_folder(out), source.options, quality)
    _make_parts(files, parts, source.workers)
    if share is not None:
        print(f"{parts.folder}: {len(files)} slides done")
        return 0
    found = [_found(parts, file) for file in files]
    try:
        summary = _assemble(source, found, out, provenance, quality)
    except _NoRoiError:  # other settings are needed, and they cannot reuse these parts
        if not keep_parts:
            shutil.rmtree(parts.folder)
        raise
    if not keep_parts:
        shutil.rmtree(parts.folder)
    print_summary(out, summary, time.monotonic() - started)
    print(f"           {out / 'report.html'}")
    if summary["unreadable_mm2"]:
        print(f"  damage   {summary['unreadable_mm2']:g} mm2 of the tissue cannot be read, see report.csv")
    for name, reasons in (("without ROIs", summary["nothing_found"]), ("skipped", summary["skipped"])):
        if reasons:
            print(f"{len(reasons)} of {source.found} slides {name}:\n{listed(reasons)}")
    return 0


class _NoRoiError(UserError):
    """All slides are done, but none has a ROI."""


def parts_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _print_unused(source: Slides) -> None:
    for name, reasons in (
        ("slides cannot be used", source.refused),
        ("slides are excluded", source.excluded),
        ("files are of slides that are read already", source.repeated),
    ):
        if reasons:
            print(f"{len(reasons)} of {source.found} {name}:\n{listed(reasons)}", flush=True)
    for line in source.without_effect:
        print(f"no effect: {line}", flush=True)


def _make_parts(files: Sequence[SlideFile], parts: Parts, workers: int) -> None:
    done = 0
    with ProgressBar() as bar:

        def watch(file: SlideFile | None) -> None:
            nonlocal done
            done += file is not None
            bar.show(done, len(files), "slides", f"{parts.rois_written} ROIs")

        make_parts(files, parts, workers, watch)


def _found(parts: Parts, file: SlideFile) -> Part:
    part = parts.find(file)
    if part is None:
        raise UserError(f"{file.path} changed while it was being read; run the same command again")
    return part


def _assemble(
    source: Slides, parts: Sequence[Part], out: Path, provenance: dict[str, Any], quality: int
) -> dict[str, Any]:
    """Write the set from the parts; return its summary."""
    source.refused |= {part.file.path: part.skipped for part in parts if part.skipped}
    chosen = choose(parts, source.options)
    unused = [Row(path, path.stem, "skipped", reason) for path, reason in source.refused.items()]
    unused += [Row(path, path.stem, "excluded", reason) for path, reason in source.excluded.items()]
    unused += [Row(path, path.stem, "repeated", reason) for path, reason in source.repeated.items()]
    used = [row_of(slide) for slide in chosen if not slide.part.skipped]
    dropped = sum((row.dropped for row in used), Counter[str]())
    total = sum(row.rois for row in used)
    empty = {row.file: row.reason for row in used if row.status == "empty"}
    if not used:
        raise _NoRoiError(f"no slide can be used\n{listed(source.refused | source.excluded)}")
    if not total:
        raise _NoRoiError(
            f"{provenance['source']} yielded no ROIs; skipped: {counted(dropped)}\n{listed(source.refused | empty)}"
        )

    def finish(folder: Path) -> dict[str, Any]:
        rows = sorted([*used, *unused], key=lambda row: row.file)
        write_report(folder, rows, provenance["source"])
        _write_pictures(folder, [slide for slide in chosen if not slide.part.skipped])
        return {
            "dropped": dict(dropped),
            "unreadable_mm2": round(sum(row.facts["unreadable_mm2"] for row in used), 4),
            "nothing_found": _texts(empty),
            "rois_per_group": _rois_per_group(used),
            "skipped": _texts(source.refused),
            "excluded": _texts(source.excluded),
            "repeated": _texts(source.repeated),
            "without_effect": source.without_effect,
        }

    writer = RoiSetWriter(out, provenance=provenance, label_names=source.label_names, quality=quality)
    rois = (roi for slide in chosen for roi in slide.read())
    return build_set(writer, track(rois, total, "ROIs"), finish)


def _write_pictures(folder: Path, chosen: Sequence[Chosen]) -> None:
    """Write the pictures of the report, and the outlines of the tissue, which ``tissue=OUT/tissue`` can read."""
    for name in ("report", "tissue"):
        (folder / name).mkdir()
    for slide in chosen:
        name = slide.part.file.name
        draw_slide(folder / "report" / f"{name}.jpg", slide)
        shutil.copyfile(slide.part.folder / "tissue.geojson", folder / "tissue" / f"{name}.geojson")


def _rois_per_group(rows: Sequence[Row]) -> dict[str, int]:
    """Count the ROIs per group; empty without groups."""
    counts = Counter[str]()
    for row in rows:
        counts[row.group] += row.rois
    return {group: counts[group] for group in sorted(counts) if group}


def _texts(reasons: dict[Path, str]) -> dict[str, str]:
    return {str(path): reason for path, reason in reasons.items()}
