"""Write one vector per nucleus of slides and images, one file for each."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from muse_fast.classification.tiles import CROP_UM
from muse_fast.detection.detector import BEST
from muse_fast.embedding import files
from muse_fast.embedding.encoders import CropEncoder, Encoder, MapEncoder, Weights, open_weights
from muse_fast.embedding.nuclei import PREDICTIONS, Detected, FromFiles, NucleiSource
from muse_fast.embedding.one_pass import OnePass
from muse_fast.embedding.parts import Parts
from muse_fast.embedding.pipeline import Embedding, Tally
from muse_fast.errors import UserError, require
from muse_fast.exploring.atlas import METHODS, check_method
from muse_fast.exploring.report import PAGE, missing, write_pictures
from muse_fast.exploring.vectors import SUFFIX, open_vectors
from muse_fast.images.geojson import MULTI
from muse_fast.images.mpp import MPP_RANGE
from muse_fast.images.nuclei_files import SUFFIXES
from muse_fast.images.slide import FRAMES
from muse_fast.predicting.detectors import (
    NUCLEI,
    SHIPPED,
    FineTunedDetector,
    detector_sha256,
    open_detector,
)
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
from muse_fast.runtime import atomic
from muse_fast.runtime.checkpoint import MANIFEST
from muse_fast.runtime.device import peak_memory, pick_device
from muse_fast.runtime.distributed import local_rank
from muse_fast.runtime.names import text_of
from muse_fast.runtime.options import Config, fixed_settings, setting
from muse_fast.runtime.progress_bar import ProgressBar, ShowProgress
from muse_fast.runtime.shares import Share
from muse_fast.sources.wsi import reason_of
from muse_fast.version import __version__

_SUMMARY = "summary.json"
_RECORD = "embed.json"  # the settings of all files in DIR
_MPP = 0.5  # um per pixel of the windows of weights that do not record it, as in `evaluate`
_BATCH_PIXELS = 16 * 224 * 224


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig(Config):
    """Settings, given as ``key=value``."""

    nuclei: str = ""
    """``nuclei``, ``classical``, weights of a detector or a run of ``finetune``; a file of nuclei (CSV, GeoJSON, HDF5),
    a folder of such files, or a folder of predictions. Default: the weights if they are a detector, else ``nuclei``."""
    multi: str = setting("auto", choices=MULTI)
    """In GeoJSON, a MultiPolygon is ``one`` nucleus, ``each`` part is one, or ``auto``."""
    frame: str = setting("qupath", choices=FRAMES)
    """From where GeoJSON counts if it does not say so: the corner of what QuPath shows, or of level 0."""
    mpp: float | None = setting(None, ge=MPP_RANGE[0], le=MPP_RANGE[1], unit="um per pixel")
    """um per pixel of files that mpp.csv does not list; None: from the header."""
    protocol: str = setting("map", choices=("map", "crop"))
    """``map``: read the unified map of a window at each nucleus; ``crop``: one crop per nucleus, its image feature."""
    encoder_mpp: float | None = setting(None, ge=MPP_RANGE[0], le=MPP_RANGE[1], unit="um per pixel")
    """um per pixel of the windows; None: that of a detector's run, else 0.5."""
    window: int | None = setting(None, ge=32, le=1024, unit="pixels")
    """Side of a window; None: that of the images that the network was made for."""
    context_um: float = setting(16.0, ge=0, le=256)
    """Tissue that a window shows on each side of a nucleus, at least, where the slide has it."""
    crop_um: float = setting(CROP_UM, ge=4, le=1024)
    """Side of a crop in um."""
    size: int = setting(224, ge=32, le=1024, unit="pixels")
    """Side of a crop in pixels."""
    tissue: bool = True
    """Look for nuclei only where there is tissue."""
    dtype: str = setting("float16", choices=files.DTYPES)
    """Of the vectors in the file."""
    format: str = setting("h5ad", choices=files.FORMATS)
    """Of the file."""
    batch: int | None = setting(None, ge=1, le=4096, may_change=True)
    """Windows, or crops, that the encoder processes at a time; None: 16 of 224 px, fewer of larger ones."""
    readers: int | None = setting(None, ge=1, le=256, may_change=True)
    """Threads that read windows; None: one per core, at most 8."""
    device: str = setting("auto", may_change=True)
    precision: str = setting("auto", choices=("auto", "fp32", "bf16"))
    """Of the encoder; ``auto``: bf16 on a GPU, fp32 on the CPU."""
    max_unreadable: float = setting(0.05, ge=0, lt=1)
    """Share of the tissue, and of the nuclei, that may be unreadable; with more, the slide is given up."""
    pictures: bool = setting(True, may_change=True)
    """Draw the vectors of all inputs at the end; with format=h5ad."""

    atlas: str = setting("pca", choices=METHODS, may_change=True)
    """How the nuclei of the atlas are placed: by the first two components, or by UMAP, which takes minutes."""

    @property
    def draws(self) -> bool:
        return self.pictures and f".{self.format}" == SUFFIX

    def check(self) -> None:
        if self.protocol == "crop":
            require(self.window is None, "window", self.window, "none with protocol=crop, which has crop_um and size")
            require(self.encoder_mpp is None, "encoder_mpp", self.encoder_mpp, "none with protocol=crop")


class Job(NamedTuple):
    """What is done with every slide."""

    weights: Weights
    encoder: Encoder
    source: NucleiSource
    one_pass: FineTunedDetector | None  # finds and describes nuclei at once, in place of source and encoder
    settings: EmbedConfig
    device: torch.device
    made_with: dict[str, Any]

    @property
    def readers(self) -> int:
        return reading_threads(self.settings.readers)

    @property
    def batch(self) -> int:
        """Images per forward."""
        side = self.settings.size if self.encoder.protocol == "crop" else self.encoder.side
        return self.settings.batch or max(1, round(_BATCH_PIXELS / side**2))


def open_job(weights: str, settings: EmbedConfig, arch: str | None = None, compat: str | None = None) -> Job:
    """Load the weights and the source of nuclei.

    Raises:
        UserError: weights, nuclei or settings cannot be used.
    """
    files.need_libraries(settings.format)
    check_method(settings.atlas)
    device = pick_device(settings.device, "device", local_rank())
    crop = settings.protocol == "crop"
    opened = open_weights(weights, arch, compat, settings.size if crop else settings.window)
    return job_of(opened, settings, device)


def job_of(weights: Weights, settings: EmbedConfig, device: torch.device, nuclei: NucleiSource | None = None) -> Job:
    """As `open_job`, of weights that are open, and of ``nuclei`` if they are given."""
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device.type == "cuda")
    encoder: Encoder
    if settings.protocol == "crop":
        encoder = CropEncoder(weights.network, settings.crop_um, settings.size, device, bf16)
    else:
        mpp = settings.encoder_mpp or weights.mpp or _MPP
        encoder = MapEncoder(weights.network, mpp, weights.side, settings.context_um, device, bf16)
    named = settings.nuclei or (NUCLEI if weights.mpp is None else weights.name)
    own = None if weights.detector is None else FineTunedDetector(weights.detector.to(device), device, bf16)
    own = own if named == weights.name and nuclei is None else None
    source = nuclei or _open_nuclei(named, settings, device, own)
    made_with = {
        "program": f"muse_fast {__version__}",
        "weights": weights.name,
        "weights_sha256": weights.sha256,
        "encoder_mpp": encoder.mpp,
        "settings": dict(fixed_settings(settings)) | {"nuclei": named, "window": encoder.side},
    }
    one_pass = own if own and _fits(encoder, own, settings) else None
    return Job(weights, encoder, source, one_pass, settings, device, made_with)


def _fits(encoder: Encoder, detector: FineTunedDetector, settings: EmbedConfig) -> bool:
    """Whether the vectors that are asked for are in the map from which a detector finds its nuclei."""
    wanted = (encoder.protocol, encoder.mpp, encoder.side)
    return wanted == ("map", detector.mpp, detector.tile_size) and settings.context_um <= detector.reach_um


def _open_nuclei(text: str, settings: EmbedConfig, device: torch.device, own: FineTunedDetector | None) -> NucleiSource:
    path = Path(text)
    is_file = path.is_file() and path.name.lower().endswith(SUFFIXES)
    is_folder = path.is_dir() and ((path / PREDICTIONS).is_file() or not any((path / n).exists() for n in _RUN))
    if own is None and text not in SHIPPED and (is_file or is_folder):
        return FromFiles(path, settings.multi, settings.frame)
    return Detected(
        own or open_detector(text, device),
        text,
        detector_sha256(text),
        everywhere=not settings.tissue,
        readers=reading_threads(settings.readers),
        max_unreadable=settings.max_unreadable,
    )


_RUN = ("checkpoints", BEST, MANIFEST)  # in a run, or in a checkpoint


def embed(
    weights: str,
    out: Path,
    inputs: Sequence[Path],
    settings: EmbedConfig,
    arch: str | None = None,
    compat: str | None = None,
    share: Share | None = None,
) -> None:
    """Write the nuclei of ``inputs`` and their vectors to files in ``out``, and a summary and pictures of all.

    Args:
        share: only of these slides, without summary and pictures; inputs that cannot be used are only printed.

    Raises:
        UserError: the inputs, weights or settings cannot be used, or ``out`` contains other vectors. Also, after all
            others are done, if some inputs could not be used.
    """
    started = time.monotonic()
    pages, without_effect = find_pages(inputs, settings.mpp, out)
    job = open_job(weights, settings, arch, compat)
    if isinstance(job.source, FromFiles) and job.source.is_of_one_page and len(each_slide(pages)) > 1:
        raise UserError(
            f"nuclei={settings.nuclei} has the nuclei of one slide, but there are {len(pages)} inputs; "
            "give a folder with a file named like each"
        )
    left, refused = _left_to_do(out, pages, job, share)
    random = "" if job.weights.sha256 else " (random)"
    mine = f"share {share}: " if share else ""
    print(f"{mine}embed {len(left)} of {len(pages)} inputs with {weights}{random} on {job.device} -> {out}", flush=True)
    for line in without_effect:
        print(f"no effect: {line}", flush=True)
    others = {page: read_record(_summary_of(out, page)) for page in pages if page not in left}
    finished = {page: record for page, record in others.items() if record and page.path not in refused}
    slides = SlidesTaken({page: record.get("identity") for page, record in finished.items()})
    left_out = each_once(
        left,
        slides,
        refused,
        lambda page: _describe(embed_page(job, page, out)),
        lambda page: _done_meanwhile(out, page, job),
    )
    if share:
        return
    done = [page for page in pages if page not in left_out]
    total = _total([read_record(_summary_of(out, page)) for page in done]) | left_out.record()
    total |= {"without_effect": without_effect}
    atomic.write_json(out / _SUMMARY, total | job.made_with)
    print(f"{out}: {total['nuclei']:,} nuclei of {len(done)} inputs in {time.monotonic() - started:.0f} s")
    if settings.draws:
        _draw(out, done, settings.atlas)
    left_out.check(len(pages))


def _draw(out: Path, pages: Sequence[PageFile], atlas: str) -> None:
    """Draw the vectors of all pages; they are complete, so what prevents it is only printed."""
    if not pages:
        return
    try:
        problems = write_pictures(out, open_vectors([out / f"{page.name}{SUFFIX}" for page in pages]), atlas)
    except UserError as error:
        print(f"no pictures: {error}")
        return
    print("\n".join([f"{out / PAGE}: the vectors in pictures", *missing(problems)]))


def _left_to_do(
    out: Path, pages: Sequence[PageFile], job: Job, share: Share | None
) -> tuple[list[PageFile], dict[Path, str]]:
    """The pages, of a share or all, that are not done yet, and those that are refused because of their names.

    Raises:
        UserError: all are done, or ``out`` was made with other weights or settings.
    """
    before = read_record(out / _RECORD) or job.made_with
    if before != job.made_with and any(out.glob("*.parquet")):
        raise UserError(
            f"{out} contains vectors made with {changed_words(before, job.made_with)}; choose another --out"
        )
    named, refused = each_name(pages)
    left = []
    for page in share.of(each_slide(named)) if share else named:
        try:
            if why := _made_otherwise(out, page, job):
                refused[page.path] = f"{out / page.name}.{job.settings.format} {why}; remove it or choose another --out"
            elif not _summary_of(out, page).is_file():
                left.append(page)
        except UserError as error:
            if _summary_of(out, page).is_file():
                refused[page.path] = reason_of(error, page.path)
            else:  # another file of a slide that has nuclei needs none of its own; if it is not one, this is said then
                left.append(page)
    complete = (out / _SUMMARY).is_file() and ((out / PAGE).is_file() or not job.settings.draws)
    if left:
        (out / _SUMMARY).unlink(missing_ok=True)  # it will not be true
    elif not refused and not share and complete:
        raise UserError(
            f"{out} already contains all vectors, so nothing was done; "
            f"`python -m muse_fast.embed report {out}` draws them again, another --out computes them again"
        )
    atomic.write_json(out / _RECORD, job.made_with)
    return left, refused


def _made_otherwise(out: Path, page: PageFile, job: Job) -> str:
    """Why what ``out`` contains for a page is not a result of this command; "" if it is, or there is none.

    Raises:
        UserError: there are no nuclei for the page.
    """
    nuclei = job.source.record(page)
    file, summary = out / f"{page.name}.{job.settings.format}", read_record(_summary_of(out, page))
    if not summary:
        return "exists already and is not a finished result" if file.exists() else ""
    if not file.exists():
        return f"is missing, though {_summary_of(out, page).name} is there"
    expected = {**job.made_with, **fingerprint_of(page.path), "nuclei_from": nuclei}
    if changed := next((key for key in expected if summary.get(key) != expected[key]), ""):
        return f"was made with other {changed}"
    before, now = summary.get("mpp_given"), page.mpp
    return "" if before == now else f"was made with {scale_words(before)}, not {scale_words(now)}"


def _done_meanwhile(out: Path, page: PageFile, job: Job) -> bool:
    """Whether another command has finished a page, and removed the parts of both."""
    return _summary_of(out, page).is_file() and not _made_otherwise(out, page, job)


def _summary_of(out: Path, page: PageFile) -> Path:
    return out / f"{page.name}.json"


def embed_page(job: Job, file: PageFile, out: Path) -> dict[str, Any]:
    """Write the files of one page to ``out``; return its summary.

    What an interrupted call has finished is in a hidden folder, and is used.

    Raises:
        UserError: page or nuclei cannot be used.
    """
    started = time.perf_counter()
    made = {**fingerprint_of(file.path), "nuclei_from": job.source.record(file), "mpp_given": file.mpp, **job.made_with}
    with (
        Parts(out / f".{file.name}.parts", made) as parts,
        ProgressBar(file.name) as bar,
        open_page(job, file, parts, bar.show) as page,
    ):
        tally = page.run(parts, batch=job.batch, readers=job.readers, progress=bar.show)
        described = describe_page(job, file, page, parts)
        written = files.write(parts.folder, file.name, described, job.settings.dtype, job.settings.format)
        seconds = time.perf_counter() - started
        summary = _summary(page, written, tally, seconds) | {
            "peak_memory_mb": round(peak_memory(job.device) / 1e6),
            **made,
        }
    for suffix in ("parquet", job.settings.format):
        name = f"{file.name}.{suffix}"
        (parts.folder / name).replace(out / name)
    atomic.write_json(_summary_of(out, file), summary)  # last: it says that all is there
    parts.remove()
    return summary


def _summary(embedding: Embedding | OnePass, written: files.Written, tally: Tally, seconds: float) -> dict[str, Any]:
    page, nuclei = embedding.page, written.nuclei
    area, share = embedding.area_mm2, tally.windows / max(embedding.windows, 1)  # an earlier command did the others
    return {
        "identity": page.identity,
        "width": page.width,
        "height": page.height,
        "mpp": page.mpp,
        "window_mpp": embedding.mpp,
        "qupath_frame": page.qupath_frame,
        "nuclei": nuclei,
        "nuclei_per_class": written.per_class,
        "nuclei_unreadable": written.lost,
        "dim": written.dim,
        "windows": embedding.windows,
        "area_mm2": round(area, 6),
        "nothing_found": "" if nuclei else "no nuclei",
        "unlike_header": unlike_header(page),
        "seconds": round(seconds, 3),
        "nuclei_per_second": round(nuclei * share / seconds, 1),
        "mm2_per_second": round(area * share / seconds, 4),
        "encoder_busy": round(tally.encoding / tally.seconds, 3) if tally.windows else 0.0,
    }


def describe_page(job: Job, file: PageFile, embedding: Embedding | OnePass, parts: Parts) -> files.Described:
    """The nuclei of a page and their vectors, once all parts are there."""
    nuclei, rows = embedding.result(parts)
    page = embedding.page
    record = {
        "version": __version__,
        "weights": job.weights.name,
        "weights_sha256": job.weights.sha256,
        "settings": json.dumps(job.made_with["settings"]),
        "mpp": embedding.mpp,
        "slide_path": text_of(file.path.absolute()),
        "slide_mpp": [page.mpp, page.mpp],
        "frame": "level0",
        "qupath_origin": list(page.qupath_frame.origin),
        "protocol": job.encoder.protocol,
    }
    return files.Described(text_of(file.name), nuclei, rows, page.mpp, record)


def open_page(job: Job, file: PageFile, parts: Parts, progress: ShowProgress) -> Embedding | OnePass:
    """Open a page, and find its nuclei if they are not described as they are found.

    Raises:
        UserError: page or nuclei cannot be used.
    """
    share = job.settings.max_unreadable
    if job.one_pass:
        return OnePass(file, job.one_pass, everywhere=not job.settings.tissue, max_unreadable=share)
    nuclei = parts.nuclei()
    if nuclei is None:
        nuclei = job.source.of(file, progress)
        parts.keep_nuclei(nuclei)
    return Embedding(file, job.encoder, nuclei, max_unreadable=share)


def _total(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals over all pages."""
    nuclei, area, seconds = (sum(one[key] for one in summaries) for key in ("nuclei", "area_mm2", "seconds"))
    return {
        "inputs": len(summaries),
        "nuclei": nuclei,
        "nuclei_unreadable": sum(one["nuclei_unreadable"] for one in summaries),
        "area_mm2": round(area, 6),
        "nothing_found": {one["file"]: one["nothing_found"] for one in summaries if one["nothing_found"]},
        "unlike_header": {one["file"]: one["unlike_header"] for one in summaries if one["unlike_header"]},
        "seconds": round(seconds, 3),
        "nuclei_per_second": round(nuclei / seconds, 1) if seconds else 0.0,
        "mm2_per_second": round(area / seconds, 4) if seconds else 0.0,
    }


def _describe(summary: dict[str, Any]) -> str:
    scale = f"; {summary['unlike_header']}" if summary["unlike_header"] else ""
    if not summary["nuclei"]:
        return f"no nuclei{scale}"
    lost = f"{summary['nuclei_unreadable']:,} more unreadable, " if summary["nuclei_unreadable"] else ""
    return (
        f"{summary['nuclei']:,} nuclei, {lost}{summary['dim']} values each, {summary['seconds']:.1f} s, "
        f"{summary['nuclei_per_second']:,.0f} nuclei/s, encoder busy {100 * summary['encoder_busy']:.0f} %{scale}"
    )
