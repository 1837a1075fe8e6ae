"""Pictures of vectors, and a page with all of them that needs no other file.

``python -m muse_fast.embed report H5AD ... --out DIR`` draws them for the files of one or several commands.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muse_fast.exploring.atlas import CROP_UM, METHODS, Atlas, check_method, draw_atlas
from muse_fast.exploring.components import Components, Sample, fit_colours, fit_components
from muse_fast.exploring.crops import read_crops
from muse_fast.exploring.neighbours import Neighbours, Place, describe, find_neighbours
from muse_fast.exploring.overview import MOST_SLIDES, Overview, draw_overview
from muse_fast.exploring.vectors import Nucleus, VectorFile, find_vectors, open_vectors
from muse_fast.runtime.atomic import new_folder, replacing
from muse_fast.runtime.cli import written_to
from muse_fast.runtime.names import text_of

OVERVIEW, ATLAS, PAGE = "overview.png", "atlas.png", "report.html"
_QUERIES, _TOP = 8, 6  # nuclei whose neighbours are shown, and how many
_ELSEWHERE_UM = 100.0  # neighbours on the same slide are at least this far away
_CROP_SIDE = 96  # pixels
_CLUSTERED = 2_000  # nuclei of the sample among which typical ones are looked for
# The policy makes the browser itself refuse whatever is not in the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 14px sans-serif; margin: 2em; max-width: 1560px; } table { border-collapse: collapse; }
th, td { border: 1px solid #ccc; padding: 4px 8px; text-align: left; } td.number { text-align: right; }
figure { margin: 1em 0; } figcaption { max-width: 60em; margin-bottom: 0.5em; } img { max-width: 100%; }
.row { display: flex; gap: 8px; } .row figure { margin: 4px 0; width: 110px; overflow-wrap: anywhere; }
.row figcaption { font-size: 12px; } .query img { outline: 3px solid #282828; } .problem { background: #fee; }
"""
_PROBLEM, _QUERY = ' class="problem"', ' class="query"'


@dataclass(frozen=True, slots=True)
class _Group:
    """A nucleus and its nearest neighbours, with their crops."""

    query: Place
    neighbours: Neighbours
    nuclei: list[Nucleus]  # the query, then the neighbours
    crops: list[Image.Image]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m muse_fast.embed report", description="Draw the vectors of some slides: two pictures and a page."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="H5AD", help="files of embed, or folders with them")
    parser.add_argument("--out", type=Path, required=True, help=f"new folder, for {OVERVIEW}, {ATLAS} and {PAGE}")
    parser.add_argument("--slides", type=Path, metavar="DIR", help="where the slides are now, if they have moved")
    parser.add_argument("--atlas", choices=METHODS, default=METHODS[0], help="how the map is made (%(default)s)")
    args = parser.parse_args(argv)
    check_method(args.atlas)
    files = open_vectors(find_vectors(args.files))
    with written_to(args.out), new_folder(args.out) as built:
        problems = write_pictures(built, files, args.atlas, args.slides)
    print(f"{args.out}: pictures of {sum(file.count for file in files):,} nuclei of {len(files)} slides")
    for line in missing(problems):
        print(line)
    return 0


def missing(problems: Mapping[str, str]) -> list[str]:
    """Lines for the user about pictures that are missing, from `write_pictures`."""
    return [f"not all pictures of {text_of(slide)}: {reason}" for slide, reason in problems.items()]


def write_pictures(
    out: Path, files: Sequence[VectorFile], atlas_by: str = METHODS[0], folder: Path | None = None
) -> dict[str, str]:
    """Write ``overview.png``, ``atlas.png`` and ``report.html`` into ``out``.

    The vectors are read three times, in blocks. Without nuclei there is no atlas.

    Args:
        files: from `open_vectors`.
        atlas_by: how the atlas is made, one of `muse_fast.exploring.atlas.METHODS`.
        folder: where the slides are now, see `open_slide_of`.

    Returns:
        Why pictures of some slides are missing, by slide.
    """
    components, sample = fit_components(files)
    colours = fit_colours(components, sample)
    overview = draw_overview(files, colours, folder)
    overview.sheet.save(out / OVERVIEW)
    atlas, groups, problems = None, list[_Group](), dict(overview.problems)
    if len(sample.row):
        atlas = draw_atlas(files, sample, colours, atlas_by, folder)
        atlas.sheet.save(out / ATLAS)
        groups, lacking = _groups(files, sample, folder)
        problems = {**lacking, **atlas.problems, **problems}
    with replacing(out / PAGE) as temporary:
        temporary.write_text(_page(files, components, overview, atlas, groups, problems), encoding="utf-8")
    return problems


def _groups(files: Sequence[VectorFile], sample: Sample, folder: Path | None) -> tuple[list[_Group], dict[str, str]]:
    places = [Place(int(sample.file[i]), int(sample.row[i])) for i in typical(sample.vectors, _QUERIES)]
    apart = math.inf if sum(file.count > 0 for file in files) > 1 else _ELSEWHERE_UM
    found = find_neighbours(files, places, _TOP, apart_um=apart)
    shown = [place for query, near in zip(places, found, strict=True) for place in (query, *near.places)]
    nuclei = describe(files, shown)
    xy = np.array([(nucleus.x, nucleus.y) for nucleus in nuclei])
    crops = read_crops(files, np.array([place.file for place in shown]), xy, CROP_UM, _CROP_SIDE, folder)
    groups, first = [], 0
    for query, near in zip(places, found, strict=True):
        here = slice(first, first + 1 + len(near.places))
        groups.append(_Group(query, near, nuclei[here], crops.pictures[here]))
        first = here.stop
    return groups, crops.problems


def typical(vectors: NDArray[np.floating], count: int) -> list[int]:
    """Positions of vectors that differ: each is the nearest to the centre of one of ``count`` clusters by k-means.

    Vectors ``[n, D]``, n at least 1, are scaled to length 1. There are fewer clusters if there are fewer vectors.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    among = np.linspace(0, len(vectors) - 1, min(len(vectors), _CLUSTERED)).round().astype(int)
    length = np.linalg.norm(vectors[among], axis=1, keepdims=True)
    scaled = vectors[among] / np.where(length > 0, length, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different vectors than clusters
        means = KMeans(min(count, len(among)), n_init=1, random_state=0).fit(scaled)
    nearest = means.transform(scaled).argmin(axis=0)
    return among[np.unique(nearest)].tolist()


def _page(
    files: Sequence[VectorFile],
    components: Components,
    overview: Overview,
    atlas: Atlas | None,
    groups: Sequence[_Group],
    problems: Mapping[str, str],
) -> str:
    total = sum(file.count for file in files)
    title = f"{total:,} nuclei of {len(files)} slide{'s' if len(files) != 1 else ''}"
    shares = ", ".join(f"{share:.1%}" for share in components.share)
    shown = f" {MOST_SLIDES} of {len(files)} slides are shown." if len(files) > MOST_SLIDES else ""
    parts = [
        f"<h1>{title}</h1>",
        _facts(files[0]),
        _table(files, problems),
        "<h2>Overview</h2>",
        _figure(
            overview.sheet.canvas,
            "Each slide beside its nuclei. The first three principal components of the vectors, over all slides, are "
            f"red, green and blue; they have {shares} of the variance. Equal colours mean similar vectors.{shown}",
        ),
    ]
    if atlas:
        parts += [
            "<h2>Atlas</h2>",
            _figure(
                atlas.sheet.canvas,
                f"{atlas.shown:,} nuclei placed by {atlas.method}: neighbours have similar vectors. Each crop of "
                f"{CROP_UM:g} um is the nucleus nearest to the middle of its cell; its frame is its colour above.",
            ),
        ]
    if groups:
        parts += ["<h2>Neighbours</h2>", _explained(files), *(_row(files, group) for group in groups)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _facts(file: VectorFile) -> str:
    record = file.record
    facts = {
        "weights": f"{record['weights']} (sha256 {str(record['weights_sha256'])[:12] or 'none'})",
        "vectors": f"{file.dim} numbers, protocol {record['protocol']}, {float(record['mpp']):g} um/px",
        "made with": f"muse_fast {record.get('version', '')}",
    }
    return "<p>" + "<br>".join(f"{name}: {_escaped(value)}" for name, value in facts.items()) + "</p>"


def _table(files: Sequence[VectorFile], problems: Mapping[str, str]) -> str:
    kinds = list(dict.fromkeys(kind for file in files for kind in file.classes))
    columns = ["slide", "nuclei", *(kinds if len(kinds) > 1 else []), *(["pictures"] if problems else [])]
    head = "".join(f"<th>{_escaped(column)}</th>" for column in columns)
    lines = []
    for file in files:
        counts = [file.count, *([file.classes.get(kind, 0) for kind in kinds] if len(kinds) > 1 else [])]
        cells = f"<td>{_escaped(file.slide)}</td>" + "".join(f'<td class="number">{count:,}</td>' for count in counts)
        problem = problems.get(file.slide, "")
        cells += f"<td>{_escaped(problem) or 'complete'}</td>" if problems else ""
        lines.append(f"<tr{_PROBLEM if problem else ''}>{cells}</tr>")
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(lines) + "\n</table>"


def _explained(files: Sequence[VectorFile]) -> str:
    where = (
        "in other slides"
        if sum(file.count > 0 for file in files) > 1
        else f"on the slide, at least {_ELSEWHERE_UM:g} um away"
    )
    return (
        f"<p>Nuclei nearest to the centres of k-means clusters (left), and the nuclei {where} whose vectors are the "
        "most similar to theirs, with the cosine of the angle between the two and the place in level-0 pixels.</p>"
    )


def _row(files: Sequence[VectorFile], group: _Group) -> str:
    cosines = ["query", *(f"{value:.3f}" for value in group.neighbours.similarity.tolist())]
    places = [group.query, *group.neighbours.places]
    figures = []
    for crop, cosine, place, nucleus in zip(group.crops, cosines, places, group.nuclei, strict=True):
        slide = f"{_escaped(files[place.file].slide)}<br>" if len(files) > 1 else ""
        text = f"{cosine}<br>{slide}{nucleus.x:.0f}, {nucleus.y:.0f}"
        opening = f"<figure{_QUERY if place == group.query else ''}>"
        figures.append(f"{opening}{_image(crop)}<figcaption>{text}</figcaption></figure>")
    return f'<div class="row">{"".join(figures)}</div>'


def _figure(picture: Image.Image, caption: str) -> str:
    return f"<figure><figcaption>{_escaped(caption)}</figcaption>{_image(picture)}</figure>"


def _image(picture: Image.Image) -> str:
    """The picture itself as an HTML element."""
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=90, subsampling=0)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _escaped(text: str) -> str:
    return html.escape(text_of(text))
