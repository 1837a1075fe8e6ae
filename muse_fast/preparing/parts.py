"""The work folder of ``prepare wsi:``, with one part per slide, each written whole or not at all.

    OUT.parts/settings.json        settings of all parts; a run with other settings is refused
    OUT.parts/SLIDE/               a small ROI set of the slide, and in addition
        part.json                  state of the slide's file, facts, dropped squares, or why the slide was skipped
        tissue.geojson  thumbnail.jpg

After a kill, a run continues with the slides without a part. Several machines may share the folder.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image

from muse_fast.errors import UserError
from muse_fast.images.tissue import MASK_UM, write_tissue
from muse_fast.preparing.pool import Pool
from muse_fast.roiset.roiset import RoiSet, RoiSetWriter
from muse_fast.runtime import atomic
from muse_fast.runtime.drawn import save_drawn
from muse_fast.sources.cut import Cut, CutSettings, SlideFile, Survey, TransientError, close_slides, survey
from muse_fast.sources.wsi import reason_of
from muse_fast.version import __version__

_SLIDES_AT_ONCE = 8  # enough to keep all processes busy: the survey of a slide uses only one
_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True, slots=True)
class Part:
    """The finished part of one slide.

    Attributes:
        facts: um per pixel, size, tissue area and so on; empty if the slide was skipped.
        dropped: number of dropped squares, by reason.
        refused: positions ``x, y`` of squares that were examined but not kept, by reason.
        skipped: why the slide cannot be used; "" if it can.
        transient: whether a repeated command tries to use it.
    """

    file: SlideFile
    rois: RoiSet
    facts: dict[str, Any]
    dropped: Counter[str]
    refused: dict[str, list[tuple[int, int]]]
    skipped: str
    transient: bool = False

    @property
    def folder(self) -> Path:
        return self.rois.path


class Parts:
    """The parts in one folder.

    Raises:
        UserError: the parts in the folder were made with other settings; lists the differences.
    """

    def __init__(self, folder: Path, settings: CutSettings, quality: int) -> None:
        self.folder, self.settings, self.quality = folder, settings, quality
        self.rois_written = 0  # by this process, for the progress bar; approximate, as threads do not lock it
        cut_settings = {one.name: getattr(settings, one.name) for one in fields(CutSettings)}
        made_with = {"program": __version__, "quality": quality, **cut_settings}
        if Path(settings.detector).is_file():
            made_with["detector_sha256"] = atomic.file_sha256(Path(settings.detector))
        path = folder / "settings.json"
        if not path.is_file():
            atomic.write_json(path, made_with)
        before = _read_json(path)
        if differing := [key for key in {**before, **made_with} if before.get(key) != made_with.get(key)]:
            changed = "; ".join(f"{key}={before.get(key)}, now {made_with.get(key)}" for key in differing)
            raise UserError(
                f"{folder} contains parts made with other settings ({changed}); use the same settings to continue, "
                "or remove that folder to start over"
            )

    def place(self, file: SlideFile) -> Path:
        return self.folder / file.name

    def find(self, file: SlideFile) -> Part | None:
        """Return the part of a slide, if it is intact and the slide, its tissue and its nuclei are unchanged."""
        folder = self.place(file)
        try:
            content = _read_json(folder / "part.json")
            if content["inputs"] != _inputs(file):
                return None
            refused = {reason: [(x, y) for x, y in places] for reason, places in content["refused"].items()}
            rois = RoiSet(folder)
            dropped, skipped = Counter(content["dropped"]), content["skipped"]
            return Part(file, rois, content["facts"], dropped, refused, skipped, content["transient"])
        except (UserError, KeyError, TypeError, ValueError):  # absent, damaged, or half removed
            return None

    def write(self, file: SlideFile, pool: Pool) -> None:
        """Cut one slide and write its part. If the slide cannot be used, the part says why."""
        surveyed = pool.call(survey, file, self.settings)
        if isinstance(surveyed, UserError):
            self.skip(file, reason_of(surveyed, file.path), isinstance(surveyed, TransientError))
            return
        cut = Cut(surveyed, self.settings, self.quality)
        try:
            with self._writer(file) as writer:
                for square, found in cut.rois(pool.map):
                    assert isinstance(found.image, bytes)
                    writer.add_jpeg(
                        found.image,
                        mpp=square.mpp,
                        xy=found.nuclei.xy,
                        label=found.nuclei.label,
                        score=found.nuclei.score,
                        slide=file.slide,
                        split=file.split,
                        origin=(square.x, square.y),
                    )
                    self.rois_written += 1
                step = MASK_UM / surveyed.mpp
                write_tissue(writer.folder / "tissue.geojson", surveyed.tissue, step, surveyed.qupath_frame.origin)
                save_drawn(Image.fromarray(surveyed.thumbnail), writer.folder / "thumbnail.jpg", quality=90)
                self._describe(writer.folder, file, _facts(file, surveyed, cut), cut)
        except UserError as error:
            self.skip(file, reason_of(error, file.path))

    def skip(self, file: SlideFile, reason: str, transient: bool = False) -> None:
        """Write the part of a slide that cannot be used."""
        with self._writer(file) as writer:
            self._describe(writer.folder, file, {}, skipped=reason, transient=transient)

    def _writer(self, file: SlideFile) -> RoiSetWriter:
        place = self.place(file)
        if place.exists():  # outdated or damaged
            old = place.with_name(f".old-{place.name}")
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        return RoiSetWriter(place, provenance={}, label_names=self.settings.label_names, quality=self.quality)

    def _describe(
        self,
        folder: Path,
        file: SlideFile,
        facts: dict[str, Any],
        cut: Cut | None = None,
        skipped: str = "",
        transient: bool = False,
    ) -> None:
        content = {
            "inputs": _inputs(file),
            "facts": facts,
            "dropped": dict(cut.dropped) if cut else {},
            "refused": cut.refused if cut else {},
            "skipped": skipped,
            "transient": transient,
        }
        atomic.write_json(folder / "part.json", content)


def _facts(file: SlideFile, surveyed: Survey, cut: Cut) -> dict[str, Any]:
    return {
        "mpp": surveyed.mpp,
        "mpp_from": file.mpp_from,
        "width": surveyed.width,
        "height": surveyed.height,
        "qupath_frame": surveyed.qupath_frame,
        "side": surveyed.side,
        "tissue_mm2": round(float(surveyed.tissue.sum()) * MASK_UM**2 / 1e6, 4),
        "unreadable_mm2": round(cut.damage.unreadable_mm2, 4),
        "nothing_found": cut.nothing_found(),
        "tissue_from": file.tissue.name if file.tissue else "colour",
        "nuclei_from": file.nuclei.name if file.nuclei else "detector",
    }


def _inputs(file: SlideFile) -> dict[str, Any]:
    """Return what a part depends on besides the settings: its files (size and modification time) and table entries."""
    stamps = {}
    for name in ("path", "tissue", "nuclei"):
        path: Path | None = getattr(file, name)
        stat = path.stat() if path else None
        stamps[name] = [path.name, stat.st_size, stat.st_mtime_ns] if path and stat else None
    return {**stamps, "slide": file.slide, "split": file.split, "mpp": file.mpp}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove {path.parent} to start over") from error
    return dict(content)


def make_parts(
    files: Iterable[SlideFile],
    parts: Parts,
    workers: int,
    watch: Callable[[SlideFile | None], None] = lambda file: None,
) -> None:
    """Write the missing parts, several slides at a time.

    Args:
        workers: number of processes; with 0 or 1, everything runs in this one.
        watch: called with each finished slide, including those finished before, and about once a second with None.

    Raises:
        OSError: a part cannot be written, for example on a full disk. Finished parts remain.
    """
    left: deque[SlideFile] = deque()
    for file in files:
        if (part := parts.find(file)) is None or part.transient:
            left.append(file)
        else:
            watch(file)
    while left:
        # When a process dies, out of memory or by a crash in a decoder, the slide at fault is unknown: each slide in
        # progress is tried again on its own.
        for file in _make_some(left, parts, workers, min(workers, _SLIDES_AT_ONCE), watch):
            if _make_some(deque([file]), parts, workers, 1, watch):
                parts.skip(file, "a process died while reading it: out of memory, or a crash in the decoder")
                watch(file)


def _make_some(
    left: deque[SlideFile],
    parts: Parts,
    workers: int,
    at_once: int,
    watch: Callable[[SlideFile | None], None],
) -> Sequence[SlideFile]:
    """Write parts until none are ``left`` or a process dies; return the slides that were in progress then."""
    lost: list[SlideFile] = []
    running: dict[Future[None], SlideFile] = {}
    with Pool(workers) as pool, ThreadPoolExecutor(max(1, at_once)) as threads:
        try:
            while running or (left and not lost):
                while left and not lost and len(running) < max(1, at_once):
                    file = left.popleft()
                    running[threads.submit(parts.write, file, pool)] = file
                done, _ = wait(running, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                for future in done:
                    file = running.pop(future)
                    try:
                        future.result()
                    except BrokenProcessPool:
                        lost.append(file)
                    else:
                        watch(file)
                watch(None)
        finally:
            pool.stop()  # after an error or Ctrl-C, release waiting threads
            close_slides()
    return lost
