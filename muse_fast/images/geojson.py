"""GeoJSON as QuPath, CellViT and TIAToolbox write it: points and outlines in pixels, x right, y down.

The type of an object is ``objectType`` or, in older files, ``object_type``, inside ``properties`` or next to them. Its
class is ``properties.classification``: a string, or a mapping with ``name`` or ``names`` (QuPath's composite classes).
"""

from __future__ import annotations

import gzip
import json
import math
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from muse_fast.errors import UserError, did_you_mean
from muse_fast.runtime.atomic import replacing

SUFFIXES = (".geojson", ".geojson.gz")

# A polygon is its outline and then its holes, each a ring ``[n, 2]`` float64.
Polygon = list[NDArray[np.float64]]

_KINDS = ("Point", "MultiPoint", "Polygon", "MultiPolygon")
MAX_AREA_UM2 = 2000.0  # a disc 50 um across; larger outlines are tissue, not nuclei
_MAX_PARTS = 20  # of a MultiPolygon that may be one nucleus
_NOT_NUCLEI = {"tile": "tile", "tmaCore": "TMA core", "root": "root object"}


@dataclass(frozen=True, slots=True)
class Shape:
    """One feature of a file.

    Attributes:
        points: ``[n, 2]`` float64.
        label: name of the class, "" if it has none.
        kind: QuPath's object type, such as "detection" or "annotation", "" if the file does not give it.
        where: the feature's position in the file, for messages.
    """

    points: NDArray[np.float64]
    polygons: list[Polygon] = field(default_factory=list)
    label: str = ""
    kind: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class GeoPoints:
    """The nuclei of a file as points."""

    path: Path
    xy: NDArray[np.float64]  # [n, 2] pixels: the point, or the centroid of the outline
    label: list[str]  # [n] name of the class, "" if it has none
    where: list[str]  # [n] position in the file, for messages
    left_out: Counter[str]  # number of objects that are not nuclei, by reason

    def labels(self, label_names: Sequence[str]) -> NDArray[np.int16]:
        """Indices ``[n]`` of the classes in ``label_names``, -1 without a class.

        Raises:
            UserError: a class is not in ``label_names``; names file and feature.
        """
        position = {name: i for i, name in enumerate(label_names)} | {"": -1}
        for name, where in zip(self.label, self.where, strict=True):
            if name not in position:
                hint = did_you_mean(name, label_names)
                raise UserError(f"{self.path}, {where}: class {name!r}, expected {', '.join(label_names)}{hint}")
        return np.array([position[name] for name in self.label], np.int16)


def read_geojson_points(path: Path, multi: str = "one", max_area: float = math.inf) -> GeoPoints:
    """The nuclei in a file: its detections and cells or, if it has none, its annotations.

    A cell is placed by the outline of its nucleus if it has one. Objects of a class that QuPath ignores, whose name
    ends with an asterisk (``Ignore*``), are not nuclei.

    Args:
        multi: ``one``: a MultiPolygon is one nucleus in parts; ``each``: each part is a nucleus. A MultiPoint is always
            several nuclei.
        max_area: in square pixels; larger outlines are not nuclei.

    Raises:
        UserError: as in :func:`read_shapes`, or a MultiPolygon has too many parts to be one nucleus; names file and
            feature.
    """
    shapes = list(read_shapes(path, nuclei=True))
    detected = any(shape.kind in ("detection", "cell") for shape in shapes)
    left_out: Counter[str] = Counter()
    xy, label, where = [], [], []
    for shape in shapes:
        if reason := _reason_to_skip(shape, detected):
            left_out[reason] += 1
            continue
        if multi == "one" and len(shape.polygons) > _MAX_PARTS:
            raise UserError(
                f"{path}, {shape.where}: a MultiPolygon of {len(shape.polygons)} parts is hardly one nucleus; "
                "give multi=each to count every part as one, as CellViT writes them"
            )
        outlines = [shape.polygons] if multi == "one" and shape.polygons else [[one] for one in shape.polygons]
        found = [(point, 0.0) for point in shape.points] + [centroid_and_area(polygons) for polygons in outlines]
        small = [point for point, area in found if area <= max_area]
        if len(small) < len(found):
            left_out["outline too large for a nucleus"] += len(found) - len(small)
        xy += small
        label += [shape.label] * len(small)
        where += [shape.where] * len(small)
    return GeoPoints(path, np.array(xy, np.float64).reshape(-1, 2), label, where, left_out)


def _reason_to_skip(shape: Shape, detected: bool) -> str:
    """Why a feature is not a nucleus, "" if it is one."""
    if shape.kind in _NOT_NUCLEI:
        return _NOT_NUCLEI[shape.kind]
    if detected and shape.kind == "annotation":
        return "annotation beside detections"
    return "ignored class" if shape.label.endswith("*") else ""


def read_shapes(path: Path, *, nuclei: bool = False) -> Iterator[Shape]:
    """The features with points or polygons in a file, plain or gzipped; others, such as lines, are skipped.

    The file may contain a ``FeatureCollection``, a list of features, one feature or a bare geometry.

    Args:
        nuclei: use the outline of the nucleus, not of the cell, in QuPath's cells.

    Raises:
        UserError: the file does not exist or is not GeoJSON; names file and feature.
    """
    for number, feature in enumerate(_features(path), start=1):
        where = f"{path}, feature {number}"
        if not isinstance(feature, dict):
            raise UserError(f"{where}: expected a GeoJSON feature, found {type(feature).__name__}")
        geometry = feature.get("geometry", feature)
        if nuclei and feature.get("nucleusGeometry"):
            geometry = feature["nucleusGeometry"]
        properties = feature.get("properties") or {}
        label = _class_name(properties.get("classification"))
        named = (place.get(key) for place in (properties, feature) for key in ("objectType", "object_type"))
        kind = str(next(filter(None, named), ""))
        for part in geometry.get("geometries", [geometry]) if isinstance(geometry, dict) else []:
            if isinstance(part, dict) and part.get("type") in _KINDS:
                points, polygons = _parse(part["type"], part.get("coordinates"), where)
                yield Shape(points, polygons, label, kind, f"feature {number}")


def centroid_and_area(polygons: Sequence[Polygon]) -> tuple[NDArray[np.float64], float]:
    """Centroid ``[2]`` and area of polygons as one shape, excluding holes.

    An outline that crosses itself is repaired first; one without area has the centroid of its line.
    """
    shape = shapely.MultiPolygon([(outline, holes) for outline, *holes in polygons])
    if not shape.is_valid:
        shape = shapely.make_valid(shape, method="structure", keep_collapsed=True)
    return np.array([shape.centroid.x, shape.centroid.y]), shape.area


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


def _features(path: Path) -> list[Any]:
    try:
        data = path.read_bytes()
        content = json.loads((gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}), expected GeoJSON") from error
    if isinstance(content, list):
        return content
    if isinstance(content, dict) and isinstance(content.get("features"), list):
        return content["features"]
    if isinstance(content, dict) and content.get("type") in ("Feature", "GeometryCollection", *_KINDS):
        return [content]
    raise UserError(f"{path}: expected GeoJSON: a FeatureCollection, a list of features, a feature or a geometry")


def _class_name(classification: Any) -> str:
    if isinstance(classification, dict):
        names = classification.get("names") or ()
        classification = classification.get("name") or ": ".join(map(str, names))
    return str(classification or "")


def _parse(kind: str, coordinates: Any, where: str) -> tuple[NDArray[np.float64], list[Polygon]]:
    if kind in ("Point", "MultiPoint"):
        return _positions([coordinates] if kind == "Point" else coordinates, where), []
    several = [coordinates] if kind == "Polygon" else coordinates
    if not isinstance(several, list) or not all(isinstance(rings, list) and rings for rings in several):
        raise UserError(f"{where}: expected the rings of a {kind}")
    return np.zeros((0, 2)), [[_ring(ring, where) for ring in rings] for rings in several]


def _ring(coordinates: Any, where: str) -> NDArray[np.float64]:
    ring = _positions(coordinates, where)
    if len(ring) < 3:
        raise UserError(f"{where}: a polygon of {len(ring)} positions, expected at least 3")
    return ring


def _positions(coordinates: Any, where: str) -> NDArray[np.float64]:
    """``[n, 2]``; a third coordinate is dropped."""
    try:
        positions = np.array([position[:2] for position in coordinates], np.float64).reshape(-1, 2)
    except (TypeError, ValueError, IndexError, KeyError):
        positions = np.full((1, 2), np.nan)
    if not np.isfinite(positions).all():
        raise UserError(f"{where}: expected positions [x, y] in pixels, finite numbers")
    return positions
