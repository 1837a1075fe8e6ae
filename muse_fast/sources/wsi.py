"""``wsi:PATH``: whole slides, the tables and files that belong to them, and which of them cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from muse_fast.errors import UserError, require
from muse_fast.finders.learned import load_finder
from muse_fast.images.mpp import MppRow, read_mpp_file
from muse_fast.images.nuclei_files import SUFFIXES as NUCLEI_SUFFIXES
from muse_fast.images.slide import find_slides, open_slide, slide_suffixes
from muse_fast.images.tables import read_groups
from muse_fast.images.tissue import SUFFIXES as TISSUE_SUFFIXES
from muse_fast.roiset.records import MAX_SIDE
from muse_fast.runtime.options import setting
from muse_fast.sources.base import Source, SourceImage, mpp_setting
from muse_fast.sources.cut import Cut, CutSettings, SlideFile, close_slides, survey
from muse_fast.sources.names import Names

_T = TypeVar("_T")
_PROBES = 8  # slides opened at a time to check their headers
_LISTED = 20  # slides listed in one message


def usable_cpus() -> int:
    """Return the number of cores of this process, as allocated by Slurm or else allowed by the system."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))


class Slides(Source):
    """``wsi:PATH``: a slide, or the slides in a folder and its subfolders, cut into squares of tissue with nuclei.

    The um per pixel comes from ``mpp_csv`` or the ``mpp.csv`` in the folder (``image,mpp[,slide][,split]``), then from
    the option ``mpp``, then from the header.

    Attributes:
        found: number of slides at ``PATH``.
        files: the slides neither refused nor excluded so far.
        refused: why slides are skipped, by file; complete after ``usable``.
        excluded: why slides were removed by ``exclude``, by file.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(CutSettings):
        mpp: float | None = mpp_setting()
        """Um per pixel of slides without a row in ``mpp.csv``."""
        mpp_csv: str = ""
        """File to use instead of the ``mpp.csv`` in the folder of the slides."""
        tissue: str = ""
        """Folder of masks (PNG) or outlines (GeoJSON), named like the slides."""
        nuclei: str = ""
        """Folder of CSV, GeoJSON or HDF5 files, named like the slides; without it, nuclei are detected."""
        groups: str = ""
        """CSV ``slide,group``."""
        per_group: int | None = setting(None, ge=1, le=10**9)
        """Maximum number of ROIs per group, drawn at random."""
        max_rois: int | None = setting(None, ge=1, le=10**9)
        """Maximum number of ROIs, shared equally among the groups."""
        workers: int | None = setting(None, ge=0, le=1024)
        """Number of processes; the ROIs do not depend on it."""

    kind = "wsi"
    title = "whole slides"
    layouts = tuple((f"*{suffix}",) for suffix in slide_suffixes())

    def __init__(self, target: str, options: Options) -> None:
        super().__init__(target, options)
        given = bool(options.groups) or options.per_group is None
        require(given, "per_group", options.per_group, "groups=FILE with it, a CSV slide,group")
        load_finder(options.detector)  # fail now, not after hours of work
        self.options, self.label_names = options, options.label_names
        self.workers = usable_cpus() if options.workers is None else options.workers
        self.refused: dict[Path, str] = {}
        self.excluded: dict[Path, str] = {}
        root, paths = Path(target), find_slides(Path(target))
        self.found = len(paths)
        self._root = root if root.is_dir() else root.parent
        self._table = self._mpp_table(options.mpp_csv)
        self._groups = read_groups(Path(options.groups)) if options.groups else {}
        self._tissue, self._nuclei = _folder("tissue", options.tissue), _folder("nuclei", options.nuclei)
        self.files = self._describe_all(paths)
        if self._tissue and all(file.tissue is None for file in self.files):
            raise UserError(f"tissue={options.tissue}: no file is named like a slide ({', '.join(TISSUE_SUFFIXES)})")

    def _mpp_table(self, given: str) -> dict[str, MppRow]:
        path = Path(given) if given else self._root / "mpp.csv"
        return read_mpp_file(path) if given or path.is_file() else {}

    def _describe_all(self, paths: Sequence[Path]) -> list[SlideFile]:
        files: dict[str, SlideFile] = {}
        for path in paths:
            if path.stem in files:
                self.refused[path] = f"{files[path.stem].path} has the same name; names of slides must be unique"
                continue
            try:
                files[path.stem] = self._describe(path)
            except UserError as error:
                self.refused[path] = str(error)
        if not files:
            raise UserError(f"no slide can be used\n{listed(self.refused)}")
        return list(files.values())

    def _describe(self, path: Path) -> SlideFile:
        """Look up a slide in the tables and folders.

        Raises:
            UserError: its group or its nuclei are missing.
        """
        name = path.stem
        row = _row(self._table, path.relative_to(self._root).as_posix(), path.name, name)
        given = self.options.mpp
        mpp, mpp_from = (row.mpp, "mpp.csv") if row else (given, "header" if given is None else "option mpp")
        slide = row.slide if row and row.slide else name
        group = _row(self._groups, slide, path.name, name)
        if self.options.groups and group is None:
            raise UserError(f"not listed in groups={self.options.groups}")
        nuclei = _find(self._nuclei, name, NUCLEI_SUFFIXES)
        if self._nuclei and nuclei is None:
            raise UserError(f"nuclei={self._nuclei} has no file {name} with suffix {', '.join(NUCLEI_SUFFIXES)}")
        tissue = _find(self._tissue, name, TISSUE_SUFFIXES)
        return SlideFile(path, name, slide, row.split if row else "", group or "", mpp, mpp_from, tissue, nuclei)

    def exclude(self, names: Mapping[str, Names]) -> None:
        """Exclude slides that share a slide or a patient with one of the sets in ``names``, keyed by their titles.

        Raises:
            UserError: no slide remains.
        """
        for file in self.files:
            for side, others in names.items():
                if shared := others.reason(file.slide) or others.reason(file.name):
                    self.excluded[file.path] = f"{shared} is also in {side}"
                    break
        self.files = [file for file in self.files if file.path not in self.excluded]
        if not self.files:
            raise UserError(f"no slide can be used\n{listed(self.refused | self.excluded)}")

    def slides(self) -> Iterator[tuple[str, str]]:
        """Yield slide and split of all slides except the excluded ones, without opening them."""
        yield from ((file.slide, file.split) for file in self.files)

    def usable(self, files: Sequence[SlideFile]) -> list[SlideFile]:
        """Return the files with a usable header, and list the others in ``refused``.

        All slides are opened once before the work begins: a problem is reported now, not after hours of work.
        """
        with ThreadPoolExecutor(_PROBES) as threads:
            problems = list(threads.map(self._problem, files))
        for file, problem in zip(files, problems, strict=True):
            if problem:
                self.refused[file.path] = problem
        return [file for file, problem in zip(files, problems, strict=True) if not problem]

    def _problem(self, file: SlideFile) -> str:
        try:
            slide = open_slide(file.path, file.mpp)
        except UserError as error:
            return reason_of(error, file.path)
        slide.close()
        side = round(self.options.roi_um / slide.mpp)
        if side > MAX_SIDE:
            return f"roi_um={self.options.roi_um:g} is {side} px, expected at most {MAX_SIDE}"
        return "" if side else f"roi_um={self.options.roi_um:g} is less than a pixel of {slide.mpp:g} um"

    def __iter__(self) -> Iterator[SourceImage]:
        """Yield the ROIs of all usable slides, slide by slide, in this process and without sampling over slides."""
        files = self.usable(self.files)
        if not files:
            raise UserError(f"no slide can be used\n{listed(self.refused)}")
        for file in files:
            try:
                yield from self._images(file)
            except UserError as error:
                self.refused[file.path] = reason_of(error, file.path)
            finally:
                close_slides()

    def _images(self, file: SlideFile) -> Iterator[SourceImage]:
        surveyed = survey(file, self.options)
        if isinstance(surveyed, UserError):
            raise surveyed
        cut = Cut(surveyed, self.options)
        try:
            for square, found in cut.rois():
                assert not isinstance(found.image, bytes)
                name, origin, nuclei = f"{file.name}_{square.x}_{square.y}", (square.x, square.y), found.nuclei
                yield SourceImage(
                    name, file.slide, file.split, found.image, square.mpp, nuclei.xy, nuclei.label, nuclei.score, origin
                )
        finally:
            self.dropped += cut.dropped


def listed(reasons: Mapping[Path, str] | Mapping[str, str]) -> str:
    """List slides and reasons, one per line, at most the first twenty."""
    lines = [f"  {path}: {reason}" for path, reason in list(reasons.items())[:_LISTED]]
    more = len(reasons) - len(lines)
    return "\n".join([*lines, f"  and {more} more"] if more else lines)


def reason_of(error: UserError, path: Path) -> str:
    """Return the message without the slide's path, which the list of reasons shows anyway."""
    return str(error).removeprefix(f"{path}: ")


def _row(table: Mapping[str, _T], *names: str) -> _T | None:
    return next((table[name] for name in names if name in table), None)


def _folder(option: str, text: str) -> Path | None:
    if not text:
        return None
    require(Path(text).is_dir(), option, text, "a folder with a file for each slide")
    return Path(text)


def _find(folder: Path | None, name: str, suffixes: Sequence[str]) -> Path | None:
    """Find the file of a slide in a folder of masks or nuclei; UserError if there are several."""
    paths = (folder / f"{name}{suffix}" for suffix in suffixes) if folder else ()
    found = [path for path in paths if path.is_file()]
    if len(found) > 1:
        raise UserError(f"both {found[0]} and {found[1].name} exist; keep one")
    return found[0] if found else None
