"""GeoJSON as QuPath, CellViT and TIAToolbox write it: points and outlines in pixels, x right, y down.

The type of an object is ``objectType`` or, in older files, ``object_type``, inside ``properties`` or next to them;
before QuPath 0.3 it was the ``id``. Its class is ``properties.classification``: a string, or a mapping with ``name`` or
``names`` (QuPath's composite classes). TIAToolbox has it in ``properties.type``.

Positions in a file count from a point of the slide. Files that are written here record it: ``muse_fast.origin`` of the
FeatureCollection is the level-0 pixel at which they begin. QuPath does not keep the record, nor needs it.
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

MULTI = ("auto", "one", "each")  # see `read_geojson_points`

_GEOMETRIES = ("Point", "MultiPoint", "Polygon", "MultiPolygon")
_LINES = ("LineString", "MultiLineString")  # drawn by hand or rulers: neither nuclei nor outlines
_MAX_AREA_UM2 = 2000.0  # a disc 50 um across; larger outlines are tissue, not nuclei
_MAX_PARTS, _MAX_GAP_UM = 4, 2.0  # of a MultiPolygon that is one nucleus, cut by a drawn line or a tile
_DETECTED = ("detection", "cell")
_REGIONS = {"tile": "tile", "tmaCore": "TMA core", "root": "root object"}  # neither nuclei nor outlines of tissue
_KINDS = {kind: kind for kind in (*_DETECTED, "annotation", *_REGIONS)} | {
    "tma_core": "tmaCore",
    "PathDetectionObject": "detection",
    "PathCellObject": "cell",
    "PathAnnotationObject": "annotation",
    "PathTileObject": "tile",
    "TMACoreObject": "tmaCore",
    "PathRootObject": "root",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One feature of a file.

    Attributes:
        points, polygons: in level-0 pixels.
        label: name of the class, "" if it has none.
        kind: QuPath's object type, such as "detection" or "annotation", "" if the file does not give it.
        where: the feature's position in the file, for messages.
        several: it is a MultiPoint or MultiPolygon.
    """

    points: NDArray[np.float64]  # [n, 2]
    polygons: list[Polygon] = field(default_factory=list)
    label: str = ""
    kind: str = ""
    where: str = ""
    several: bool = False

    @property
    def ignored(self) -> bool:
        """Whether QuPath ignores its class, whose name then ends with an asterisk (``Ignore*``)."""
        return self.label.endswith("*")


@dataclass(frozen=True, slots=True)
class GeoPoints:
    """The nuclei of a file as points."""

    path: Path
    xy: NDArray[np.float64]  # [n, 2] level-0 pixels: the point, or the centroid of the outline
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


def read_geojson_points(path: Path, mpp: float, multi: str = "auto", origin: tuple[float, float] = (0, 0)) -> GeoPoints:
    """The nuclei in a file: its detections and cells or, if it has none, its annotations.

    A cell is placed by the outline of its nucleus if it has one. Objects of a class that QuPath ignores and outlines
    above 2,000 um2 are not nuclei.

    Args:
        mpp: um per pixel.
        multi: ``one``: a MultiPolygon is one nucleus in parts; ``each``: each part is a nucleus, as in files of
            CellViT, where all nuclei of a class are one feature; ``auto``: it is one nucleus if it has at most 4 parts
            with gaps of at most 2 um, unless the file is one of CellViT. A MultiPoint is always several nuclei.
        origin: see `read_shapes`.

    Raises:
        UserError: as in :func:`read_shapes`.
    """
    shapes = list(read_shapes(path, origin=origin, nuclei=True))
    detected = any(shape.kind in _DETECTED for shape in shapes)
    left_out: Counter[str] = Counter()
    kept = []
    for shape in shapes:
        if reason := _reason_to_skip(shape, detected):
            left_out[reason] += 1
        else:
            kept.append(shape)
    if multi == "auto" and _one_feature_per_class(kept, mpp):
        multi = "each"
    xy, label, where = [], [], []
    for shape in kept:
        together = multi == "one" or (multi == "auto" and _is_one_nucleus(shape, mpp))
        outlines = [shape.polygons] if together and shape.polygons else [[one] for one in shape.polygons]
        found = [(point, 0.0) for point in shape.points] + [centroid_and_area(polygons) for polygons in outlines]
        small = [point for point, area in found if area <= _MAX_AREA_UM2 / mpp**2]
        if len(small) < len(found):
            left_out["outline too large for a nucleus"] += len(found) - len(small)
        xy += small
        label += [shape.label] * len(small)
        where += [shape.where] * len(small)
    return GeoPoints(path, np.array(xy, np.float64).reshape(-1, 2), label, where, left_out)


def _reason_to_skip(shape: Shape, detected: bool) -> str:
    """Why a feature is not a nucleus, "" if it is one."""
    if shape.kind in _REGIONS:
        return _REGIONS[shape.kind]
    if detected and shape.kind == "annotation":
        return "annotation beside detections"
    return "ignored class" if shape.ignored else ""


def _one_feature_per_class(shapes: Sequence[Shape], mpp: float) -> bool:
    """Whether the MultiPolygons of a file have a class of their own each, and one of them is not one nucleus."""
    several = [shape for shape in shapes if shape.several and shape.polygons]
    labels = [shape.label for shape in shapes]
    return len(several) == len(labels) == len({*labels}) and any(
        len(shape.polygons) == 1 or not _is_one_nucleus(shape, mpp) for shape in several
    )


def _is_one_nucleus(shape: Shape, mpp: float) -> bool:
    """Whether the parts of a feature are few, and connected once they grow by half of the largest gap."""
    if not 1 < len(shape.polygons) <= _MAX_PARTS:
        return len(shape.polygons) == 1
    grown = _geometry(shape.polygons).buffer(_MAX_GAP_UM / mpp / 2)
    return bool(grown.geom_type == "Polygon")


def read_tissue_outlines(path: Path, origin: tuple[float, float] = (0, 0)) -> tuple[list[Polygon], list[Polygon]]:
    """The outlines of tissue in a file, and those of areas that are not, whose class is ignored (``Ignore*``).

    Detections, cells, tiles and TMA cores are neither.

    Args:
        origin: see `read_shapes`.

    Raises:
        UserError: as in :func:`read_shapes`, or there is no outline of tissue.
    """
    annotations = [shape for shape in read_shapes(path, origin=origin) if shape.kind not in (*_DETECTED, *_REGIONS)]
    tissue, ignored = (
        [polygon for shape in annotations if shape.ignored == which for polygon in shape.polygons]
        for which in (False, True)
    )
    if not tissue:
        raise UserError(
            f"{path}: no polygons, expected outlines of tissue: annotations, of a class without an asterisk"
        )
    return tissue, ignored


def read_shapes(path: Path, *, origin: tuple[float, float] = (0, 0), nuclei: bool = False) -> Iterator[Shape]:
    """The points and polygons in a file, plain or gzipped; lines are skipped.

    The file may contain a ``FeatureCollection``, a list of features, one feature or a bare geometry.

    Args:
        origin: level-0 pixel at which positions begin in a file that does not record it.
        nuclei: use the outline of the nucleus, not of the cell, in QuPath's cells.

    Raises:
        UserError: the file does not exist or is not GeoJSON; names file and feature.
    """
    features, recorded = _read(path)
    shift = np.array(origin if recorded is None else recorded, np.float64)
    for number, feature in enumerate(features, start=1):
        where = f"{path}, feature {number}"
        if not isinstance(feature, dict):
            raise UserError(f"{where}: expected a GeoJSON feature, found {type(feature).__name__}")
        geometry = feature.get("geometry", None if feature.get("type") == "Feature" else feature)
        if nuclei and feature.get("nucleusGeometry"):
            geometry = feature["nucleusGeometry"]
        properties = feature.get("properties") or {}
        if not isinstance(properties, dict):
            raise UserError(f"{where}: properties are {type(properties).__name__}, expected an object")
        label, kind = _class_name(properties), _kind(feature, properties)
        for part in _simple(geometry, where):
            points, polygons = _parse(part["type"], part.get("coordinates"), where)
            moved = [[ring + shift for ring in polygon] for polygon in polygons]
            several = part["type"].startswith("Multi")
            yield Shape(points + shift, moved, label, kind, f"feature {number}", several)


def _simple(geometry: Any, where: str) -> Iterator[dict[str, Any]]:
    """The points and polygons in a geometry, however collections are nested; null and empty ones contain none."""
    if geometry is None:
        return
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "GeometryCollection":
        members = geometry.get("geometries")
        if not isinstance(members, list):
            raise UserError(f"{where}: a GeometryCollection without a list of geometries")
        for member in members:
            yield from _simple(member, where)
    elif kind in _GEOMETRIES:
        if geometry.get("coordinates") != []:
            yield geometry
    elif kind not in _LINES:
        known = ", ".join((*_GEOMETRIES, *_LINES))
        raise UserError(f"{where}: a geometry of type {kind!r}, expected {known} or GeometryCollection")


def centroid_and_area(polygons: Sequence[Polygon]) -> tuple[NDArray[np.float64], float]:
    """Centroid ``[2]`` and area of polygons as one shape, excluding holes.

    An outline that crosses itself is repaired first; one without area has the centroid of its line.
    """
    shape = _geometry(polygons)
    return np.array([shape.centroid.x, shape.centroid.y]), shape.area


def share_inside(polygons: Sequence[Polygon], box: tuple[float, float, float, float]) -> float:
    """Area of polygons in a box (left, top, right, bottom), as a share of their own or of the box's, if smaller."""
    whole, frame = shapely.union_all([_geometry([polygon]) for polygon in polygons]), shapely.box(*box)
    smaller = min(whole.area, frame.area)
    return float(shapely.intersection(whole, frame).area / smaller) if smaller else 1.0


def _geometry(polygons: Sequence[Polygon]) -> Any:
    """Polygons as one shape of shapely, repaired if they cross themselves."""
    shape = shapely.MultiPolygon([(outline, holes) for outline, *holes in polygons])
    return shape if shape.is_valid else shapely.make_valid(shape, method="structure", keep_collapsed=True)


def qupath_record(origin: tuple[int, int]) -> dict[str, Any]:
    """Members of a FeatureCollection whose positions begin at the level-0 pixel ``origin``, as in QuPath."""
    return {"type": "FeatureCollection", "muse_fast": {"frame": "qupath", "origin": list(origin)}}


def write_outlines(
    path: Path,
    polygons: list[Polygon],
    name: str,
    colour: tuple[int, int, int],
    origin: tuple[int, int] = (0, 0),
) -> None:
    """Write polygons as QuPath annotations of the class ``name``. The same polygons give the same bytes.

    Args:
        polygons: in level-0 pixels.
        origin: the level-0 pixel from which QuPath counts.
    """
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{path.stem}/{name}/{number}")),
            "geometry": {"type": "Polygon", "coordinates": [_closed(ring - origin) for ring in polygon]},
            "properties": {"objectType": "annotation", "classification": {"name": name, "color": list(colour)}},
        }
        for number, polygon in enumerate(polygons)
    ]
    with replacing(path) as temporary:
        text = json.dumps(qupath_record(origin) | {"features": features}, allow_nan=False)
        temporary.write_text(text + "\n")


def _closed(ring: NDArray[np.float64]) -> list[list[float]]:
    positions = ring.round(2).tolist()
    return positions if positions[0] == positions[-1] else [*positions, positions[0]]


def _read(path: Path) -> tuple[list[Any], tuple[float, float] | None]:
    """The features of a file, and the level-0 pixel at which its positions begin, if it says so."""
    try:
        data = path.read_bytes()
        content = json.loads((gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}), expected GeoJSON") from error
    if isinstance(content, list):
        return content, None
    if isinstance(content, dict) and isinstance(content.get("features"), list):
        return content["features"], _recorded_origin(path, content.get("muse_fast"))
    if isinstance(content, dict) and content.get("type") in ("Feature", "GeometryCollection", *_GEOMETRIES):
        return [content], None
    raise UserError(f"{path}: expected GeoJSON: a FeatureCollection, a list of features, a feature or a geometry")


def _recorded_origin(path: Path, record: Any) -> tuple[float, float] | None:
    if record is None:
        return None
    try:
        x, y = map(float, record["origin"])
    except (TypeError, ValueError, KeyError):
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise UserError(f"{path}: muse_fast is {record!r}, expected its origin [x, y] in level-0 pixels")
    return x, y


def _kind(feature: dict[str, Any], properties: dict[str, Any]) -> str:
    named = (place.get(key) for place in (properties, feature) for key in ("objectType", "object_type"))
    # `type` and `id` name it only if their value is a type of object: they also have other uses.
    other = (value for value in (properties.get("type"), feature.get("id")) if str(value) in _KINDS)
    kind = str(next(filter(None, (*named, *other)), ""))
    return _KINDS.get(kind, kind)


def _class_name(properties: dict[str, Any]) -> str:
    found = properties.get("classification")
    if isinstance(found, dict):
        names = found.get("names") or []
        found = found.get("name") or ": ".join(map(str, names if isinstance(names, list) else [names]))
    kind = properties.get("type")  # of the nucleus in TIAToolbox, but of the object in some files for QuPath
    if not found and isinstance(kind, str | int) and kind not in _KINDS:
        found = str(kind)
    return str(found or "")


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
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        positions = np.full((1, 2), np.nan)
    if not np.isfinite(positions).all():
        raise UserError(f"{where}: expected positions [x, y] in pixels, finite numbers")
    return positions
