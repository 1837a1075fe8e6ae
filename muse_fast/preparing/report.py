"""The report of ``prepare wsi:``: a table of all slides, and a picture of each with tissue and ROIs."""

from __future__ import annotations

import csv
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw

from muse_fast.images.geojson import read_shapes
from muse_fast.images.tissue import COLOUR
from muse_fast.preparing.assemble import Chosen
from muse_fast.runtime.drawn import save_drawn
from muse_fast.runtime.names import text_of

NOT_SAMPLED = "not sampled"
REASONS = ("too little tissue", "unscanned", "too few nuclei", "unreadable", "beyond per_slide", NOT_SAMPLED)
COLOURS = {
    "in the set": (0, 150, 60),
    NOT_SAMPLED: (120, 120, 120),
    "too few nuclei": (240, 150, 0),
    "unreadable": (220, 30, 30),
    "unscanned": (40, 40, 40),
}
_STYLE = """
body { font: 14px sans-serif; margin: 2em; } table { border-collapse: collapse; }
th, td { border: 1px solid #ccc; padding: 4px 8px; text-align: left; vertical-align: top; }
td.number { text-align: right; } img { max-width: 320px; max-height: 320px; }
.skipped, .excluded, .empty { background: #fee; }
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One slide in the report.

    Attributes:
        status: "used", "empty" if it has no ROI, "skipped", "excluded" or "repeated", if it is read from another file.
        reason: why it is not used or empty.
        dropped: number of dropped squares, by reason.
        picture: path of its picture, relative to the report.
    """

    file: Path
    slide: str
    status: str
    reason: str = ""
    group: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    rois: int = 0
    nuclei: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    picture: str = ""

    def cells(self) -> dict[str, Any]:
        """Return the values of the row, by column."""
        facts = ("mpp", "mpp_from", "tissue_mm2", "unreadable_mm2", "tissue_from", "nuclei_from")
        return {
            "slide": text_of(self.slide),
            "file": text_of(self.file),
            "status": self.status,
            "reason": text_of(self.reason),
            "group": self.group,
            **{name: self.facts.get(name, "") for name in facts},
            "rois": self.rois,
            "nuclei": self.nuclei,
            **{reason: self.dropped[reason] for reason in REASONS},
        }


def row_of(chosen: Chosen) -> Row:
    """Return the row of a slide that could be used."""
    part = chosen.part
    nothing: str = part.facts["nothing_found"]
    dropped = part.dropped + Counter({NOT_SAMPLED: len(chosen.not_sampled)})
    nuclei = int(part.rois.num_nuclei[chosen.ids].sum())
    picture = f"report/{part.file.name}.jpg"
    return Row(
        part.file.path,
        part.file.slide,
        "empty" if nothing else "used",
        nothing,
        part.file.group,
        facts=part.facts,
        rois=len(chosen.ids),
        nuclei=nuclei,
        dropped=dropped,
        picture=picture,
    )


def write_report(folder: Path, rows: Sequence[Row], title: str) -> None:
    """Write ``report.csv`` and ``report.html`` into ``folder``."""
    columns = list(Row(Path(), "", "").cells())
    with open(folder / "report.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.replace(" ", "_") for column in columns])
        writer.writeheader()
        for row in rows:
            writer.writerow({column.replace(" ", "_"): value for column, value in row.cells().items()})
    (folder / "report.html").write_text(_page(rows, columns, title), encoding="utf-8")


def _page(rows: Sequence[Row], columns: Sequence[str], title: str) -> str:
    counts = Counter(row.status for row in rows)
    legend = " ".join(
        f'<span style="color: rgb{colour}">&#9632;</span> {html.escape(name)}'
        for name, colour in {**COLOURS, "outline of the tissue": COLOUR}.items()
    )
    head = "".join(f"<th>{html.escape(column.replace('_', ' '))}</th>" for column in ["picture", *columns])
    lines = "\n".join(_html_row(row) for row in rows)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        f"<p>Slides: {summary}. Squares: {legend}.</p>\n<table>\n<tr>{head}</tr>\n{lines}\n</table></body></html>\n"
    )


def _html_row(row: Row) -> str:
    picture = f'<a href="{_url(row)}"><img loading="lazy" src="{_url(row)}" alt=""></a>' if row.picture else ""
    cells = "".join(
        f'<td class="number">{value:g}</td>' if isinstance(value, int | float) else f"<td>{html.escape(value)}</td>"
        for value in row.cells().values()
    )
    return f'<tr class="{row.status}"><td>{picture}</td>{cells}</tr>'


def _url(row: Row) -> str:
    return quote(row.picture)


def draw_slide(path: Path, chosen: Chosen) -> None:
    """Write the thumbnail of a slide with the outlines of its tissue and the squares that were examined."""
    part = chosen.part
    with Image.open(part.folder / "thumbnail.jpg") as opened:
        picture = opened.convert("RGB")
    scale = np.array(picture.size) / (part.facts["width"], part.facts["height"])
    draw = ImageDraw.Draw(picture)
    origin = part.rois.origin
    places = {
        **part.refused,
        NOT_SAMPLED: origin[chosen.not_sampled].tolist(),
        "in the set": origin[chosen.ids].tolist(),
    }
    for name, corners in places.items():
        for corner in corners:
            low, high = np.array(corner) * scale, (np.array(corner) + part.facts["side"]) * scale
            draw.rectangle((*(low + 1).tolist(), *np.maximum(high - 2, low + 1).tolist()), None, COLOURS[name], 2)
    for shape in read_shapes(part.folder / "tissue.geojson"):
        for ring in (ring for polygon in shape.polygons for ring in polygon):
            draw.line([(x, y) for x, y in (ring * scale).tolist()], COLOUR, 2)
    save_drawn(picture, path, quality=88)
