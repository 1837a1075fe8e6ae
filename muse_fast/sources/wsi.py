"""``wsi:PATH``: whole slides, the tables and files that belong to them, and which of them cannot be used."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from muse_fast.errors import UserError, require
from muse_fast.finders.learned import load_finder
from muse_fast.images.mpp import MppTables
from muse_fast.images.nuclei_files import SUFFIXES as NUCLEI_SUFFIXES
from muse_fast.images.slide import find_slides, open_slide, slide_identity, slide_suffixes
from muse_fast.images.tables import names_of, read_groups, some_of
from muse_fast.images.tissue import SUFFIXES as TISSUE_SUFFIXES
from muse_fast.roiset.records import MAX_SIDE
from muse_fast.runtime.folders import find_files
from muse_fast.runtime.names import key_of, text_of
from muse_fast.runtime.options import setting
from muse_fast.sources.base import Source, SourceImage, mpp_setting
from muse_fast.sources.cut import Cut, CutSettings, SlideFile, close_slides, survey
from muse_fast.sources.names import Names, SlidesSeen

_PROBES = 8  # slides opened at a time to check their headers
_LISTED = 20  # slides listed in one message


def usable_cpus() -> int:
    """Return the number of cores of this process, as allocated by Slurm or else allowed by the system."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))


class Slides(Source):
    """``wsi:PATH``: a slide, or the slides in a folder and its subfolders, cut into squares of tissue with nuclei.

    The um per pixel comes from ``mpp_csv`` or the nearest ``mpp.csv`` (``image,mpp[,slide][,split]``) in the folder of
    a slide or above, then from the option ``mpp``, then from the header.

    Attributes:
        found: number of files at ``PATH``.
        files: the slides neither refused nor excluded so far.
        refused: why slides are skipped, by file; complete after ``usable``.
        excluded: why slides were removed by ``exclude``, by file.
        repeated: files of slides that are read from another file, and from which; complete after ``usable``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Options(CutSettings):
        mpp: float | None = mpp_setting()
        """Um per pixel of slides without a row in ``mpp.csv``."""
        mpp_csv: str = ""
        """File to use instead of the ``mpp.csv`` in the folders of the slides."""
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
        self.repeated: dict[Path, str] = {}
        root, paths = Path(target), find_slides(Path(target))
        self.found = len(paths)
        self._root = root if root.is_dir() else root.parent
        self._tables = MppTables(Path(options.mpp_csv) if options.mpp_csv else None)
        if root.is_dir():
            self._tables.read_all(root)
        self._groups = read_groups(Path(options.groups)) if options.groups else None
        self._tissue, self._nuclei = _folder("tissue", options.tissue), _folder("nuclei", options.nuclei)
        self._tissue_of = files_by_name(self._tissue, TISSUE_SUFFIXES)
        self._nuclei_of = files_by_name(self._nuclei, NUCLEI_SUFFIXES)
        self.files = self._describe_all(paths)
        self.without_effect = [
            *self._tables.without_effect(),
            *(self._groups.without_effect() if self._groups else ()),
            *_unused(self._tissue, self._tissue_of, {file.tissue for file in self.files}),
            *_unused(self._nuclei, self._nuclei_of, {file.nuclei for file in self.files}),
        ]
        if self._tissue and all(file.tissue is None for file in self.files):
            raise UserError(f"tissue={options.tissue}: no file is named like a slide ({', '.join(TISSUE_SUFFIXES)})")

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
        row = self._tables.find(path, self._root)
        given = self.options.mpp
        mpp, mpp_from = (row.mpp, "mpp.csv") if row else (given, "header" if given is None else "option mpp")
        slide = row.slide if row and row.slide else name
        group = self._groups.find(slide, *names_of(path, self._root)) if self._groups else None
        if self._groups and group is None:
            raise UserError(f"not listed in groups={self.options.groups}")
        nuclei = file_named(self._nuclei_of, name)
        if self._nuclei and nuclei is None:
            raise UserError(f"nuclei={self._nuclei} has no file {name} with suffix {', '.join(NUCLEI_SUFFIXES)}")
        tissue = file_named(self._tissue_of, name)
        return SlideFile(
            path, text_of(name), text_of(slide), row.split if row else "", group or "", mpp, mpp_from, tissue, nuclei
        )

    def exclude(self, names: Mapping[str, Names]) -> None:
        """Exclude slides that share a slide or a patient with one of the sets in ``names``, keyed by their titles.

        Raises:
            UserError: no slide remains.
        """
        known = [name for file in self.files for name in (file.slide, file.name)]
        known += [path.stem for path in self.refused]
        for side, others in names.items():
            if absent := others.without(known):
                self.without_effect.append(f"exclude={side}: {some_of(absent, len(others.slides), 'slides')}")
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
        """Return one file, with a usable header, of each slide; list the others in ``refused`` and ``repeated``.

        All slides are opened once before the work begins: a problem is reported now, not after hours of work.

        Raises:
            UserError: the tables say different things about two files of the same slide.
        """
        with ThreadPoolExecutor(_PROBES) as threads:
            probed = dict(zip(files, threads.map(self._probe, files), strict=True))
        seen, taken = SlidesSeen(), dict[Path, SlideFile]()
        excluded = {seen.first(path, _identity(path)) for path in self.excluded}
        for file in sorted(files, key=_given, reverse=True):  # of a slide's files, the one that the user's tables list
            problem, identity = probed[file]
            if problem:
                self.refused[file.path] = problem
            elif (first := seen.first(file.path, identity)) in excluded:
                self.excluded[file.path] = f"the same slide as {first}"
            elif first in taken:
                self.repeated[file.path] = f"the same slide as {first}"
                _agree(file, taken[first])
            else:
                taken[file.path] = file
        return [file for file in files if file.path in taken]

    def _probe(self, file: SlideFile) -> tuple[str, str | None]:
        """Return why a slide cannot be used, "" if it can, and its identity."""
        try:
            with closing(open_slide(file.path, file.mpp)) as slide:
                side, mpp, identity = round(self.options.roi_um / slide.mpp), slide.mpp, slide.identity
        except UserError as error:
            return reason_of(error, file.path), None
        if side > MAX_SIDE:
            return f"roi_um={self.options.roi_um:g} is {side} px, expected at most {MAX_SIDE}", None
        return "" if side else f"roi_um={self.options.roi_um:g} is less than a pixel of {mpp:g} um", identity

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


def _identity(path: Path) -> str | None:
    try:
        return slide_identity(path)
    except UserError:
        return None


def _given(file: SlideFile) -> int:
    """How much the user's tables and folders say about a file."""
    return (file.mpp_from == "mpp.csv") + (file.tissue is not None) + (file.nuclei is not None)


def _agree(file: SlideFile, other: SlideFile) -> None:
    """Check that a file, if the user's tables list it, has the same entries as another one of the same slide."""
    for name in ("split", "group", "mpp"):
        value, expected = getattr(file, name), getattr(other, name)
        if value != expected and (name == "group" or file.mpp_from == other.mpp_from == "mpp.csv"):
            raise UserError(
                f"{file.path} is the same slide as {other.path}, but {name} is {value!r} and {expected!r}; "
                "correct your tables, or remove one of the files"
            )


def _folder(option: str, text: str) -> Path | None:
    if not text:
        return None
    require(Path(text).is_dir(), option, text, "a folder with a file for each slide")
    return Path(text)


def files_by_name(folder: Path | None, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """The files in a folder of masks or nuclei by the key of their slide's name."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in find_files(folder, "*") if folder else ():
        for suffix in suffixes:
            if path.name.lower().endswith(suffix):
                found[key_of(path.name[: -len(suffix)])].append(path)
    return found


def file_named(by_name: Mapping[str, list[Path]], name: str) -> Path | None:
    """The file of a slide in a folder of masks or nuclei; UserError if there are several."""
    found = by_name.get(key_of(name), [])
    if len(found) > 1:
        raise UserError(f"both {found[0]} and {found[1].name} exist; keep one")
    return found[0] if found else None


def _unused(folder: Path | None, by_name: Mapping[str, list[Path]], used: Set[Path | None]) -> list[str]:
    """A line for the user about the files in a folder of masks or nuclei that no slide has, if there are any."""
    files = sorted(path for found in by_name.values() for path in found)
    names = [path.name for path in files if path not in used]
    return [f"{folder}: {some_of(names, len(files), 'files')}"] if names else []
