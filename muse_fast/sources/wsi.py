"""``wsi:PATH``: which slides there are, what goes with each, and which cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from muse_fast.errors import UserError, require
from muse_fast.finders.learned import load_finder
from muse_fast.images.mpp import MPP_RANGE, MppRow, read_mpp_file
from muse_fast.images.nuclei_files import SUFFIXES as NUCLEI_SUFFIXES
from muse_fast.images.slide import SUFFIXES, Slide, find_slides
from muse_fast.images.tables import read_groups
from muse_fast.images.tissue import SUFFIXES as TISSUE_SUFFIXES
from muse_fast.preparing.audit import read_names
from muse_fast.roiset.records import MAX_SIDE
from muse_fast.sources.base import Source, SourceImage
from muse_fast.sources.cut import Cut, CutSettings, SlideFile, close_slides, survey

_T = TypeVar("_T")
_PROBES = 8  # slides opened at a time to look at their headers
_LISTED = 20  # slides named in one message


def usable_cpus() -> int:
    """Cores that this process may use: what Slurm gave the task, else what the system allows."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many ROIs of all slides together: at most ``per_group`` of each group and ``max_rois`` shared out evenly."""

    per_group: int | None
    max_rois: int | None
    seed: int


class Slides(Source):
    """``wsi:PATH``: a slide, or the slides of a folder and the folders within, cut into squares of tissue with nuclei.

    The um per pixel comes from ``mpp.csv`` (``image,mpp[,slide][,split]``) beside the slides or given as ``mpp_csv``,
    then from the option ``mpp``, then from the header.

    Attributes:
        found: number of slides at ``PATH``.
        files: those that are not left out before any is opened.
        refused: why a slide is left out, by its file; complete once ``usable`` has been called.
        excluded: the same for those that share a slide or patient with ``exclude``.
    """

    kind = "wsi"
    title = "whole slides"
    layouts = tuple((f"*{suffix}",) for suffix in SUFFIXES)
    options: ClassVar[dict[str, tuple[type, float, float]]] = {
        "mpp": (float, *MPP_RANGE),
        "mpp_csv": (str, 0, 0),
        "roi_um": (float, 16, 4096),  # side of a ROI in um
        "tissue": (str, 0, 0),  # folder of masks (PNG) or outlines (GeoJSON), named as the slides
        "min_tissue": (float, 0, 1),  # lowest share of tissue in a ROI
        "nuclei": (str, 0, 0),  # folder of CSV, GeoJSON or HDF5, named as the slides; else they are detected
        "labels": (str, 0, 0),  # names of the classes of the user's nuclei
        "detector": (str, 0, 0),  # of nuclei: default, classical, resnet18 or a .safetensors file
        "threshold": (float, 0, 1),  # of the detector, in place of its own
        "min_nuclei": (int, 0, 1_000_000),
        "max_unreadable": (int, 0, 1_000_000),  # ROIs of a slide; with more, the slide is left out
        "per_slide": (int, 1, 1_000_000),  # most ROIs of a slide, drawn at random
        "groups": (str, 0, 0),  # CSV slide,group
        "per_group": (int, 1, 10**9),  # most ROIs of a group, drawn at random
        "max_rois": (int, 1, 10**9),  # most ROIs in all, the same number of each group
        "seed": (int, 0, 2**31),
        "exclude": (str, 0, 0),  # sources, ROI sets or lists of names whose slides and patients are left out
        "workers": (int, 0, 1024),  # processes; the ROIs are the same with any number
    }

    def __init__(
        self,
        path: str,
        mpp: float | None = None,
        mpp_csv: str = "",
        roi_um: float = 512.0,
        tissue: str = "",
        min_tissue: float = 0.5,
        nuclei: str = "",
        labels: str = "",
        detector: str = "default",
        threshold: float | None = None,
        min_nuclei: int = 20,
        max_unreadable: int = 20,
        per_slide: int | None = None,
        groups: str = "",
        per_group: int | None = None,
        max_rois: int | None = None,
        seed: int = 0,
        exclude: str = "",
        workers: int | None = None,
    ) -> None:
        super().__init__()
        require(bool(groups) or per_group is None, "per_group", per_group, "groups=FILE beside it, a CSV slide,group")
        self.label_names = tuple(filter(None, labels.split(",")))
        self.workers = usable_cpus() if workers is None else workers
        self.settings = CutSettings(
            roi_um, min_tissue, min_nuclei, threshold, per_slide, seed, max_unreadable, self.label_names, detector
        )
        load_finder(detector)  # a mistake in it is told before hours of work
        self.sampling = Sampling(per_group, max_rois, seed)
        self.refused: dict[Path, str] = {}
        self.excluded: dict[Path, str] = {}
        root, paths = Path(path), find_slides(Path(path))
        self.found = len(paths)
        self._mpp, self._root = mpp, root if root.is_dir() else root.parent
        self._table = self._mpp_table(mpp_csv)
        self._groups = (groups, read_groups(Path(groups)) if groups else {})
        self._not_with = {side: read_names(side) for side in exclude.split(",") if side}
        self._tissue, self._nuclei = (_folder(name, text) for name, text in (("tissue", tissue), ("nuclei", nuclei)))
        self.files = self._described(paths)
        if self._tissue and all(file.tissue is None for file in self.files):
            raise UserError(f"tissue={tissue}: nothing in it has the name of a slide ({', '.join(TISSUE_SUFFIXES)})")

    def _mpp_table(self, given: str) -> dict[str, MppRow]:
        beside = self._root / "mpp.csv"
        path = Path(given) if given else beside
        return read_mpp_file(path) if given or beside.is_file() else {}

    def _described(self, paths: Sequence[Path]) -> list[SlideFile]:
        files: dict[str, SlideFile] = {}
        for path in paths:
            if path.stem in files:
                self.refused[path] = f"{files[path.stem].path} has the same name; slides need names of their own"
                continue
            try:
                file = self._describe(path)
            except UserError as error:
                self.refused[path] = str(error)
                continue
            if reason := self._shared(file):
                self.excluded[path] = reason
            else:
                files[path.stem] = file
        if not files:
            raise UserError(f"no slide can be used\n{listed(self.refused | self.excluded)}")
        return list(files.values())

    def _describe(self, path: Path) -> SlideFile:
        """What the tables and folders say of a slide.

        Raises:
            UserError: its group or its nuclei are missing there.
        """
        name = path.stem
        row = _row(self._table, path.relative_to(self._root).as_posix(), path.name, name)
        mpp, mpp_from = (row.mpp, "mpp.csv") if row else (self._mpp, "header" if self._mpp is None else "option mpp")
        slide = row.slide if row and row.slide else name
        where, groups = self._groups
        group = _row(groups, slide, path.name, name)
        if where and group is None:
            raise UserError(f"it has no row in groups={where}")
        nuclei = _beside(self._nuclei, name, NUCLEI_SUFFIXES)
        if self._nuclei and nuclei is None:
            raise UserError(f"nuclei={self._nuclei} holds no {name} with {', '.join(NUCLEI_SUFFIXES)}")
        tissue = _beside(self._tissue, name, TISSUE_SUFFIXES)
        return SlideFile(path, name, slide, row.split if row else "", group or "", mpp, mpp_from, tissue, nuclei)

    def _shared(self, file: SlideFile) -> str:
        """What of ``exclude`` a slide has in common with it; "" for nothing."""
        for side, names in self._not_with.items():
            if shared := names.reason(file.slide) or names.reason(file.name):
                return f"{shared} stands in {side}"
        return ""

    def slides(self) -> Iterator[tuple[str, str]]:
        """Slide and split of all slides but the excluded ones, without opening them."""
        yield from ((file.slide, file.split) for file in self.files)

    def usable(self, files: Sequence[SlideFile]) -> list[SlideFile]:
        """Those of ``files`` whose header can be used; the others are told in ``refused``.

        All are opened once before the work begins, so that what is wrong is told then and not hours later.
        """
        with ThreadPoolExecutor(_PROBES) as threads:
            problems = list(threads.map(self._problem, files))
        for file, problem in zip(files, problems, strict=True):
            if problem:
                self.refused[file.path] = problem
        return [file for file, problem in zip(files, problems, strict=True) if not problem]

    def _problem(self, file: SlideFile) -> str:
        try:
            slide = Slide(file.path, file.mpp)
        except UserError as error:
            return reason_of(error, file.path)
        slide.close()
        side = round(self.settings.roi_um / slide.mpp)
        if side > MAX_SIDE:
            return f"roi_um={self.settings.roi_um:g} is {side} px, expected {MAX_SIDE} at most"
        return "" if side else f"roi_um={self.settings.roi_um:g} is no pixel of {slide.mpp:g} um"

    def __iter__(self) -> Iterator[SourceImage]:
        """The ROIs of all usable slides, one slide after the other, in this process; without sampling over slides."""
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
        surveyed = survey(file, self.settings)
        if isinstance(surveyed, UserError):
            raise surveyed
        cut = Cut(surveyed, self.settings)
        try:
            for square, found in cut.rois():
                assert not isinstance(found.image, bytes)
                name, origin, nuclei = f"{file.name}_{square.x}_{square.y}", (square.x, square.y), found.nuclei
                yield SourceImage(
                    name, file.slide, file.split, found.image, square.mpp, nuclei.xy, nuclei.label, nuclei.score, origin
                )
        finally:
            self.dropped += cut.dropped


def listed(reasons: Mapping[Path, str]) -> str:
    """Slides and reasons, a line each, the first twenty."""
    lines = [f"  {path}: {reason}" for path, reason in list(reasons.items())[:_LISTED]]
    more = len(reasons) - len(lines)
    return "\n".join([*lines, f"  and {more} more"] if more else lines)


def reason_of(error: UserError, path: Path) -> str:
    """The message without the slide's path, which stands before it wherever reasons are shown."""
    return str(error).removeprefix(f"{path}: ")


def _row(table: Mapping[str, _T], *names: str) -> _T | None:
    return next((table[name] for name in names if name in table), None)


def _folder(option: str, text: str) -> Path | None:
    if not text:
        return None
    require(Path(text).is_dir(), option, text, "a folder with a file for each slide")
    return Path(text)


def _beside(folder: Path | None, name: str, suffixes: Sequence[str]) -> Path | None:
    """The file of a slide in a folder of masks or nuclei."""
    paths = (folder / f"{name}{suffix}" for suffix in suffixes) if folder else ()
    return next((path for path in paths if path.is_file()), None)
