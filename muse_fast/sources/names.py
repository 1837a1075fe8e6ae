"""Slides and patients by name, in the form in which sets are compared.

A slide of TCGA is known by its barcode, ``TCGA-XX-XXXX-...``, up to the first dot and in either case; its first twelve
characters are the patient. Other slides are compared by whole name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from muse_fast.images.slide import slide_suffixes

_PATIENT = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE)


def slide_name(name: str) -> str:
    """The form in which slides are compared: no folder, no suffix of a slide's file, TCGA's up to the first dot."""
    name = name.strip().replace("\\", "/").rsplit("/", 1)[-1]
    if name.lower().endswith(slide_suffixes()):
        name = name[: name.rindex(".")]
    return name.split(".", 1)[0].upper() if _PATIENT.match(name) else name


def patient(name: str) -> str | None:
    """``TCGA-XX-XXXX`` of a slide of TCGA, None for others."""
    found = _PATIENT.match(slide_name(name))
    return found[0] if found else None


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
        """What of this set a slide has in common with it; "" for nothing."""
        if (name := slide_name(slide)) in self.slides:
            return f"slide {name}"
        return f"patient {found}" if (found := patient(slide)) in self.patients else ""
