"""GeoJSON as QuPath writes and reads it: points and outlines in level-0 pixels, x right, y down."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muse_fast.atomic import replacing
from muse_fast.errors import UserError

# A polygon is its outline and then its holes, each a ring ``[n, 2]`` float64.
Polygon = list[NDArray[np.float64]]

_CORNERS = {"Point": 0, "MultiPoint": 1, "Polygon": 2, "MultiPolygon": 3}  # depth of the list of positions


@dataclass(frozen=True, slots=True)
class Shape:
    """One feature of a file.

    Attributes:
        points: ``[n, 2]`` float64.
        label: name of the feature's class, "" where it has none.
    """

    points: NDArray[np.float64]
    polygons: list[Polygon] = field(default_factory=list)
    label: str = ""


def read_shapes(path: Path, *, nuclei: bool = False) -> Iterator[Shape]:
    """The features of a file with points or polygons; others, lines for example, are passed over.

    A ``FeatureCollection``, a list of features, one feature and a bare geometry are all taken.

    Args:
        nuclei: of QuPath's cells take the outline of the nucleus, not that of the cell.

    Raises:
        UserError: no such file, or what stands in it is no GeoJSON; names file and feature.
    """
    for number, feature in enumerate(_features(path), start=1):
        where = f"{path}, feature {number}"
        if not isinstance(feature, dict):
            raise UserError(f"{where}: expected a GeoJSON feature, found {type(feature).__name__}")
        geometry = feature.get("geometry", feature)
        if nuclei and feature.get("nucleusGeometry"):
            geometry = feature["nucleusGeometry"]
        properties = feature.get("properties") or {}
        classification = properties.get("classification") or {}
        label = str(classification.get("name", "")) if isinstance(classification, dict) else str(classification)
        parts = geometry.get("geometries", [geometry]) if isinstance(geometry, dict) else []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in _CORNERS:
                yield _shape(kind, part.get("coordinates"), label, where)


def _features(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error}), expected GeoJSON") from error
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and isinstance(content.get("features"), list):
        return content["features"]
    if isinstance(content, dict) and content.get("type") in ("Feature", "GeometryCollection", *_CORNERS):
        return [content]
    raise UserError(f"{path}: expected GeoJSON: a FeatureCollection, a list of features, a feature or a geometry")


def _shape(kind: str, coordinates: Any, label: str, where: str) -> Shape:
    if kind == "Point":
        return Shape(_positions([coordinates], where), label=label)
    if kind == "MultiPoint":
        return Shape(_positions(coordinates, where), label=label)
    several = [coordinates] if kind == "Polygon" else coordinates
    if not isinstance(several, list) or not all(isinstance(rings, list) and rings for rings in several):
        raise UserError(f"{where}: expected the rings of a {kind}")
    polygons = [[_ring(ring, where) for ring in rings] for rings in several]
    return Shape(np.zeros((0, 2)), polygons, label)


def _ring(coordinates: Any, where: str) -> NDArray[np.float64]:
    ring = _positions(coordinates, where)
    if len(ring) < 3:
        raise UserError(f"{where}: a polygon of {len(ring)} positions, expected 3 at least")
    return ring


def _positions(coordinates: Any, where: str) -> NDArray[np.float64]:
    """``[n, 2]``; a third coordinate is dropped."""
    try:
        positions = np.array([position[:2] for position in coordinates], np.float64).reshape(-1, 2)
    except (TypeError, ValueError, IndexError, KeyError):
        positions = np.full((1, 2), np.nan)
    if not np.isfinite(positions).all():
        raise UserError(f"{where}: expected positions [x, y] in level-0 pixels, finite numbers")
    return positions


def centroid(polygon: Polygon) -> NDArray[np.float64]:
    """Centre of area ``[2]`` of an outline less its holes; the mean of the outline where it encloses no area."""
    moments = np.zeros(3)
    origin = polygon[0][0]  # near zero the sums lose no digits
    for number, ring in enumerate(polygon):
        (x, y), (x1, y1) = (ring - origin).T, (np.roll(ring, -1, axis=0) - origin).T
        cross = x * y1 - x1 * y
        ring_moments = np.array([cross.sum() / 2, ((x + x1) * cross).sum() / 6, ((y + y1) * cross).sum() / 6])
        turn = np.sign(ring_moments[0]) * (1 if number == 0 else -1)  # whichever way round the rings go
        moments += turn * ring_moments
    area, sum_x, sum_y = moments
    if area <= 1e-9:
        return polygon[0].mean(axis=0)
    return origin + np.array([sum_x, sum_y]) / area


def write_outlines(path: Path, polygons: list[Polygon], name: str, colour: tuple[int, int, int]) -> None:
    """Write polygons as QuPath annotations of the class ``name``. The same polygons give the same bytes."""
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{path.stem}/{name}/{number}")),
            "geometry": {"type": "Polygon", "coordinates": [_closed(ring) for ring in polygon]},
            "properties": {"objectType": "annotation", "classification": {"name": name, "color": list(colour)}},
        }
        for number, polygon in enumerate(polygons)
    ]
    with replacing(path) as temporary:
        text = json.dumps({"type": "FeatureCollection", "features": features}, allow_nan=False)
        temporary.write_text(text + "\n")


def _closed(ring: NDArray[np.float64]) -> list[list[float]]:
    positions = ring.round(2).tolist()
    return positions if positions[0] == positions[-1] else [*positions, positions[0]]
