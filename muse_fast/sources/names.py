"""Which slides are the same: by their names, normalised to compare sets, or by their content.

A slide of TCGA is identified by its barcode, ``TCGA-XX-XXXX-...``, up to the first dot and in either case; the first
twelve characters are the patient. Other slides are compared by their full name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from muse_fast.images.slide import slide_suffixes
from muse_fast.runtime.atomic import file_sha256
from muse_fast.runtime.names import key_of

_PATIENT = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE)


def slide_name(name: str) -> str:
    """Normalise the name of a slide: without folder and file suffix; for TCGA up to the first dot, in upper case."""
    name = key_of(name).strip().replace("\\", "/").rsplit("/", 1)[-1]
    if name.lower().endswith(slide_suffixes()):
        name = name[: name.rindex(".")]
    return name.split(".", 1)[0].upper() if _PATIENT.match(name) else name


def patient(name: str) -> str | None:
    """Return ``TCGA-XX-XXXX`` for a slide of TCGA, None for others."""
    found = _PATIENT.match(slide_name(name))
    return found[0] if found else None


def patient_or_slide(name: str) -> str:
    """Return the patient of a slide, or the slide's normalised name where no patient is known."""
    return patient(name) or slide_name(name)


@dataclass(frozen=True, slots=True)
class Names:
    """The slides and patients of one set."""

    slides: frozenset[str]
    patients: frozenset[str]

    @classmethod
    def of(cls, slides: Iterable[str]) -> Names:
        names = frozenset(map(slide_name, slides))
        return cls(names, frozenset(filter(None, map(patient, names))))

    def __and__(self, other: Names) -> Names:
        return Names(self.slides & other.slides, self.patients & other.patients)

    def reason(self, slide: str) -> str:
        """Name the slide or patient that ``slide`` shares with this set; "" if neither."""
        if (name := slide_name(slide)) in self.slides:
            return f"slide {name}"
        return f"patient {found}" if (found := patient(slide)) in self.patients else ""

    def without(self, slides: Iterable[str]) -> list[str]:
        """The slides of this set that share neither name nor patient with ``slides``, sorted."""
        others = Names.of(slides)
        return sorted(name for name in self.slides - others.slides if patient(name) not in others.patients)


class SlidesSeen:
    """Finds files that contain the same slide: the files of a series, copies and links."""

    def __init__(self) -> None:
        self._first: dict[str, Path] = {}  # by identity or hash
        self._of_size: dict[int, Path] = {}  # without an identity: the first file of each size
        self._sha256 = cache(file_sha256)

    def first(self, path: Path, identity: str | None) -> Path:
        """The file in which a slide was seen first, which is ``path`` itself if it is new.

        Args:
            identity: see `Slide.identity`; None: files are the same slide if their bytes are.
        """
        if identity is None:
            other = self._of_size.setdefault(path.stat().st_size, path)
            if other == path:
                return path
            self._first.setdefault(self._sha256(other), other)
            identity = self._sha256(path)
        return self._first.setdefault(identity, path)
