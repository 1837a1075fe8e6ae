"""Where ROIs come from: public datasets, folders of images with points, procedural images, whole slides.

``open_source("brcam2c:DIR")`` opens a source, which yields one ``SourceImage`` at a time and keeps none in memory. Each
dataset has a file here; what several of them need is in ``muse_fast.images``: tables, geojson, instances.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muse_fast.errors import UserError, did_you_mean
from muse_fast.runtime.options import expanded, load_settings
from muse_fast.sources.base import Dataset, Source, SourceImage

__all__ = ["Dataset", "Source", "SourceImage", "open_source", "source_kinds"]


def source_kinds() -> dict[str, type[Source]]:
    """The classes of sources by kind, those with specific layouts first: `inspect` uses the first match."""
    from muse_fast.sources.brcam2c import BrcaM2C
    from muse_fast.sources.cellvit import CellViT
    from muse_fast.sources.consep import CoNSeP
    from muse_fast.sources.images import Images
    from muse_fast.sources.lizard import Lizard
    from muse_fast.sources.muse import Muse
    from muse_fast.sources.ocelot import Ocelot
    from muse_fast.sources.pannuke import PanNuke
    from muse_fast.sources.prepared import Prepared
    from muse_fast.sources.puma import Puma
    from muse_fast.sources.sidecar import CsvPoints, QuPath
    from muse_fast.sources.synthetic import Synthetic
    from muse_fast.sources.wsi import Slides

    datasets = (BrcaM2C, Ocelot, Puma, CoNSeP, PanNuke, Lizard, CellViT, Muse, QuPath, CsvPoints)
    return {source.kind: source for source in (*datasets, Slides, Images, Prepared, Synthetic)}


def open_source(spec: str, **options: Any) -> Source:
    """Open ``KIND:PATH``. The options are those of the source's ``Options``, as text (``"0.5"``) or values.

    Raises:
        UserError: the kind or an option is unknown (names the nearest known one), or the target cannot be read.
    """
    kinds = source_kinds()
    kind, _, target = spec.partition(":")
    if kind not in kinds or not target:
        hint = did_you_mean(kind, kinds) if kind not in kinds else ""
        if Path(spec).is_dir():
            hint = f"; `python -m muse_fast.prepare inspect {spec}` suggests one"
        raise UserError(f"{spec!r} is not a source, expected KIND:PATH with KIND one of {', '.join(kinds)}{hint}")
    source, target = kinds[kind], ",".join(map(expanded, target.split(",")))
    return source(target, load_settings(source.Options, items=options, prefix=f"{kind}: "))
