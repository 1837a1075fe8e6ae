"""Write the nuclei of slides and images, one folder for each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from muse_fast.errors import UserError
from muse_fast.images.mpp import MPP_RANGE
from muse_fast.predicting.detectors import TileDetector, detector_sha256, open_detector
from muse_fast.predicting.files import CellFiles
from muse_fast.predicting.inputs import (
    SlidesTaken,
    changed_words,
    each_name,
    each_once,
    each_slide,
    fingerprint_of,
    read_record,
    scale_words,
    unlike_header,
)
from muse_fast.predicting.pages import PageFile, find_pages, reading_threads
from muse_fast.predicting.pipeline import Prediction
from muse_fast.runtime import atomic
from muse_fast.runtime.device import peak_memory, pick_device
from muse_fast.runtime.distributed import local_rank
from muse_fast.runtime.options import Config, fixed_settings, setting
from muse_fast.runtime.progress_bar import ProgressBar
from muse_fast.runtime.shares import Share
from muse_fast.sources.wsi import listed
from muse_fast.version import __version__

_SUMMARY = "summary.json"
_RECORD = "predict.json"  # the settings of all folders in DIR


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig(Config):
    """Settings, given as ``key=value``."""

    mpp: float | None = setting(None, ge=MPP_RANGE[0], le=MPP_RANGE[1], unit="um per pixel")
    """um per pixel of files that mpp.csv does not list; None: from the header."""
    tissue: bool = True
    """Look for nuclei only where there is tissue."""
    tile: int | None = setting(None, ge=64, le=8192)
    """Side of a tile in pixels; None: the default of the detector."""
    batch: int = setting(4, ge=1, le=1024, may_change=True)
    """Tiles that the detector processes at a time."""
    readers: int | None = setting(None, ge=1, le=256, may_change=True)
    """Threads that read tiles; None: one per core, at most 8."""
    device: str = setting("auto", may_change=True)
    gzip: bool = False
    """Write cells.geojson.gz."""
    max_unreadable: float = setting(0.05, ge=0, lt=1)
    """Share of the tissue, or of the page, that may be unreadable; with more, the slide is given up."""


def predict(
    weights: str, out: Path, inputs: Sequence[Path], settings: PredictConfig, share: Share | None = None
) -> None:
    """Write the nuclei of ``inputs`` to folders in ``out``, and a summary of all.

    Args:
        share: only of these slides, and no summary; inputs that cannot be used are only printed.

    Raises:
        UserError: the inputs, weights or settings cannot be used, or ``out`` contains other predictions. Also, after
            all others are done, if some inputs could not be used.
    """
    started = time.monotonic()
    pages, without_effect = find_pages(inputs, settings.mpp, out)
    device = pick_device(settings.device, "device", local_rank())
    detector = open_detector(weights, device)
    made_with = {
        "program": f"muse_fast {__version__}",
        "weights": weights,
        "weights_sha256": detector_sha256(weights),
        "class_names": list(detector.class_names),
        "detector_mpp": detector.mpp,
        "settings": dict(fixed_settings(settings)),
    }
    left, refused = _left_to_do(out, pages, made_with, share)
    mine = f"share {share}: " if share else ""
    print(f"{mine}predict {len(left)} of {len(pages)} inputs with {weights} on {device} -> {out}", flush=True)
    for line in without_effect:
        print(f"no effect: {line}", flush=True)
    others = {page: read_record(out / page.name / _SUMMARY) for page in pages if page not in left}
    finished = {page: record for page, record in others.items() if record and page.path not in refused}
    slides = SlidesTaken({page: record.get("identity") for page, record in finished.items()})
    left_out = each_once(
        left,
        slides,
        refused,
        lambda page: _describe(_predict_page(page, out / page.name, detector, settings, device, made_with)),
        lambda page: not _made_otherwise(out / page.name, page, made_with),
    )
    if share:
        return
    done = [read_record(out / page.name / _SUMMARY) for page in pages if page not in left_out]
    total = _total(done) | left_out.record() | {"without_effect": without_effect}
    atomic.write_json(out / _SUMMARY, total | made_with)
    print(f"{out}: {total['nuclei']:,} nuclei of {len(done)} inputs in {time.monotonic() - started:.0f} s")
    if damaged := [one["file"] for one in done if one["unreadable_mm2"]]:
        print(f"{total['unreadable_mm2']:.3g} mm2 of {len(damaged)} inputs cannot be read: {', '.join(damaged)}")
    if empty := total["nothing_found"]:
        print(f"{len(empty)} of {len(done)} inputs have no nuclei:\n{listed(empty)}")
    left_out.check(len(pages))


def _left_to_do(
    out: Path, pages: Sequence[PageFile], made_with: dict[str, Any], share: Share | None
) -> tuple[list[PageFile], dict[Path, str]]:
    """The pages, of a share or all, that are not done yet, and those that are refused because of their names.

    Raises:
        UserError: all are done, or ``out`` was made with other weights or settings.
    """
    record = out / _RECORD
    before = read_record(record) or made_with
    if before != made_with and any(out.glob(f"*/{_SUMMARY}")):
        raise UserError(
            f"{out} contains predictions made with {changed_words(before, made_with)}; choose another --out"
        )
    named, refused = each_name(pages)
    left = []
    for page in share.of(each_slide(named)) if share else named:
        if not (out / page.name).exists():
            left.append(page)
        elif why := _made_otherwise(out / page.name, page, made_with):
            refused[page.path] = f"{out / page.name} already exists and {why}; remove it or choose another --out"
    if left:
        (out / _SUMMARY).unlink(missing_ok=True)  # it will not be true
    elif not refused and not share and (out / _SUMMARY).is_file():
        raise UserError(
            f"{out} already contains all predictions, so nothing was done; choose another --out to predict again"
        )
    atomic.write_json(record, made_with)
    return left, refused


def _made_otherwise(folder: Path, page: PageFile, made_with: dict[str, Any]) -> str:
    """Why a folder is not the finished prediction of this page; "" if it is."""
    summary = read_record(folder / _SUMMARY)
    if not summary:
        return "is not a finished prediction"
    if changed := next((key for key in made_with if summary.get(key) != made_with[key]), ""):
        return f"was made with other {changed}"
    if any(summary.get(key) != value for key, value in fingerprint_of(page.path).items()):
        return "belongs to another file"
    before, now = summary.get("mpp_given"), page.mpp
    return "" if before == now else f"was made with {scale_words(before)}, not {scale_words(now)}"


def _predict_page(
    file: PageFile,
    out: Path,
    detector: TileDetector,
    settings: PredictConfig,
    device: torch.device,
    made_with: dict[str, Any],
) -> dict[str, Any]:
    """Write the folder of one page; return its summary."""
    started = time.perf_counter()
    found = Prediction(
        file,
        detector,
        everywhere=not settings.tissue,
        tile=settings.tile,
        max_unreadable=settings.max_unreadable,
    )
    with found, atomic.new_folder(out) as folder:
        page = found.page
        files = CellFiles(folder, page, file.name, detector.class_names, settings.gzip)
        with closing(files), ProgressBar(file.name) as bar:
            tally = found.run(
                files,
                batch=settings.batch,
                readers=reading_threads(settings.readers),
                done=lambda tiles: bar.show(tiles, len(found.tiles), "tiles", f"{files.counts.sum():,} nuclei"),
            )
            files.finish()
        nuclei, area = int(files.counts.sum()), found.tissue.area_mm2
        seconds = time.perf_counter() - started
        summary = {
            **fingerprint_of(file.path),
            "identity": page.identity,
            "width": page.width,
            "height": page.height,
            "mpp": page.mpp,
            "qupath_frame": page.qupath_frame,
            "mpp_given": file.mpp,
            "nuclei": nuclei,
            "nuclei_per_class": dict(zip(detector.class_names, files.counts.tolist(), strict=True)),
            "area": "tissue" if settings.tissue else "all",
            "area_mm2": round(area, 6),
            "nuclei_per_mm2": round(nuclei / area, 2) if area else 0.0,
            "tiles": tally.tiles,
            "unreadable_mm2": round(found.tissue.damage.unreadable_mm2, 6),
            "nothing_found": _nothing_found(nuclei, area, page.mpp),
            "unlike_header": unlike_header(page),
            "seconds": round(seconds, 3),
            "nuclei_per_second": round(nuclei / seconds, 1),
            "mm2_per_second": round(area / seconds, 4),
            "detector_busy": round(tally.detecting / tally.seconds, 3),
            "peak_memory_mb": round(peak_memory(device) / 1e6),
            **made_with,
        }
        atomic.write_json(folder / _SUMMARY, summary)
    return summary


def _nothing_found(nuclei: int, area: float, mpp: float) -> str:
    """The likely reason if there are no nuclei in an area (mm2), else ""."""
    if nuclei:
        return ""
    if not area:
        return "no tissue found; if there is some, tissue=false searches everywhere"
    return f"no nuclei found on {area:.3g} mm2: is {mpp:g} um/px right, and is it H&E?"


def _total(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals over all pages."""
    keys = ("nuclei", "area_mm2", "unreadable_mm2", "seconds")
    nuclei, area, unreadable, seconds = (sum(one[key] for one in summaries) for key in keys)
    names = summaries[0]["class_names"] if summaries else []
    return {
        "inputs": len(summaries),
        "nuclei": nuclei,
        "nuclei_per_class": {name: sum(one["nuclei_per_class"][name] for one in summaries) for name in names},
        "area_mm2": round(area, 6),
        "unreadable_mm2": round(unreadable, 6),
        "nothing_found": {one["file"]: one["nothing_found"] for one in summaries if one["nothing_found"]},
        "unlike_header": {one["file"]: one["unlike_header"] for one in summaries if one["unlike_header"]},
        "seconds": round(seconds, 3),
        "nuclei_per_second": round(nuclei / seconds, 1) if seconds else 0.0,
        "mm2_per_second": round(area / seconds, 4) if seconds else 0.0,
    }


def _describe(summary: dict[str, Any]) -> str:
    damage = f"{summary['unreadable_mm2']:.3g} mm2 unreadable, " if summary["unreadable_mm2"] else ""
    scale = f"; {summary['unlike_header']}" if summary["unlike_header"] else ""
    if summary["nothing_found"]:
        return damage + summary["nothing_found"] + scale
    return damage + (
        f"{summary['nuclei']:,} nuclei, {summary['nuclei_per_mm2']:,.0f} per mm2 on {summary['area_mm2']:.3g} mm2, "
        f"{summary['seconds']:.1f} s, {summary['nuclei_per_second']:,.0f} nuclei/s, "
        f"detector busy {100 * summary['detector_busy']:.0f} %{scale}"
    )
