"""Tiny copies of the public datasets, in their exact layouts, with nuclei at known places.

Every nucleus is a dark rectangle of whole pixels, so its centroid is known in closed form: its centre. Each set has an
image with several nuclei, one with a single nucleus and one without nuclei, all of odd sizes.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

from muse_fast.sources import Dataset, SourceImage, open_source

CELL = 16  # a nucleus lies within a cell of this grid


class Box(NamedTuple):
    """Pixels x0 <= x < x1, y0 <= y < y1, and the class from 0."""

    x0: int
    y0: int
    x1: int
    y1: int
    label: int

    @property
    def centre(self) -> tuple[float, float]:
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2


@dataclass
class Tiny:
    """A written set and its true content."""

    folder: Path
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)  # by name of the image
    boxes: dict[str, list[Box]] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    files: dict[str, tuple[Path, Path]] = field(default_factory=dict)  # image and labels
    slides: dict[str, str] = field(default_factory=dict)  # only where they differ from the names
    mpp: float = 0.25
    integer: bool = False  # whether the format stores whole coordinates

    @property
    def spec(self) -> str:
        return f"{self.kind}:{self.folder}"

    def add(
        self, name: str, split: str, count: int, size: tuple[int, int], classes: int
    ) -> tuple[np.ndarray, list[Box]]:
        boxes = plant(len(self.boxes), count, size, classes)
        image = draw(boxes, size)
        self.splits[name], self.boxes[name], self.images[name] = split, boxes, image
        return image, boxes

    def xy(self, name: str) -> np.ndarray:
        xy = np.array([box.centre for box in self.boxes[name]], np.float64).reshape(-1, 2)
        return np.floor(xy) if self.integer else xy

    def label(self, name: str) -> np.ndarray:
        return np.array([box.label for box in self.boxes[name]], np.int16)


def plant(seed: int, count: int, size: tuple[int, int], classes: int) -> list[Box]:
    rng = np.random.default_rng(seed)
    columns, rows = size[0] // CELL, size[1] // CELL
    boxes = []
    for i, place in enumerate(rng.permutation(columns * rows)[:count]):
        x0, y0 = (int(place) % columns) * CELL + rng.integers(0, 4), (int(place) // columns) * CELL + rng.integers(0, 4)
        boxes.append(Box(int(x0), int(y0), int(x0 + rng.integers(7, 12)), int(y0 + rng.integers(7, 12)), i % classes))
    return boxes


def draw(boxes: list[Box], size: tuple[int, int]) -> np.ndarray:
    image = np.full((size[1], size[0], 3), (230, 200, 220), np.uint8)
    image[::3, ::5] -= 9  # so that a rotated or shifted image is noticed
    for box in boxes:
        image[box.y0 : box.y1, box.x0 : box.x1] = (80, 40 + 20 * (box.label % 5), 120)
    return image


def instance_map(boxes: list[Box], size: tuple[int, int], numbers: list[int] | None = None) -> np.ndarray:
    found = np.zeros((size[1], size[0]), np.int64)
    for number, box in zip(numbers or range(1, len(boxes) + 1), boxes, strict=True):
        found[box.y0 : box.y1, box.x0 : box.x1] = number
    return found


def type_map(boxes: list[Box], size: tuple[int, int]) -> np.ndarray:
    return instance_map(boxes, size, [box.label + 1 for box in boxes])


def feature(box: Box, name: str, kind: str = "annotation", **more: Any) -> dict[str, Any]:
    """Return a polygon with most vertices on one side, so that their mean is not its centre."""
    top = [[x, box.y0] for x in np.linspace(box.x0, box.x1, 5)]
    ring = [*top, [box.x1, box.y1], [box.x0, box.y1], [box.x0, box.y0]]
    properties = {"objectType": kind, "classification": {"name": name, "color": [200, 0, 0]}}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties} | more


def write_geojson(path: Path, features: list[dict[str, Any]]) -> None:
    text = json.dumps({"type": "FeatureCollection", "features": features})
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def save_image(image: np.ndarray, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


# ------------------------------------------------------------------------------------------------------- the datasets


def brcam2c(folder: Path) -> Tiny:
    tiny = Tiny(folder, "brcam2c", mpp=0.5, integer=True)
    (folder / "labels").mkdir(parents=True)
    for number, (split, count) in enumerate((("train", 6), ("val", 1), ("test", 3))):
        slide = f"TCGA-A1-000{number}-01Z-00-DX1"
        name = f"{slide}_{100 + number}_200_1000_1000_0.93.png"
        image, boxes = tiny.add(name, split, count, (61, 47), 3)
        labels = folder / "labels" / f"{Path(name).stem}_gt_class_coords.txt"
        labels.write_text("".join(f"{int(box.centre[1])} {int(box.centre[0])} {box.label + 1}\n" for box in boxes))
        tiny.files[name], tiny.slides[name] = (save_image(image, folder / "images" / name), labels), slide
        (folder / f"brca_ds_{split}.txt").write_text(f"{name}\n")
    return tiny


def ocelot(folder: Path) -> Tiny:
    tiny = Tiny(folder, "ocelot", mpp=0.201)
    pairs = {}
    for number, (split, count) in enumerate((("train", 7), ("train", 0), ("val", 1), ("test", 4)), start=1):
        name = f"{number:03d}"
        image, boxes = tiny.add(name, split, count, (64, 48), 2)
        path = save_image(image, folder / "images" / split / "cell" / f"{name}.jpg", quality=97, subsampling=0)
        save_image(image, folder / "images" / split / "tissue" / f"{name}.jpg")
        labels = folder / "annotations" / split / "cell" / f"{name}.csv"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text("".join(f"{box.centre[0]:g},{box.centre[1]:g},{box.label + 1}\n" for box in boxes))
        place = {"x_start": 1000 * number, "y_start": 70, "x_end": 1000 * number + 819, "y_end": 889}
        place |= {"resized_mpp_x": 0.2, "resized_mpp_y": 0.202}
        slide = f"TCGA-AA-000{number}-01Z-00-DX1"
        pairs[name] = {"slide_name": slide, "subset": split, "organ": "kidney", "cell": place, "tissue": place}
        tiny.files[name], tiny.slides[name] = (path, labels), slide
    (folder / "metadata.json").write_text(json.dumps({"version": "1.0.1", "sample_pairs": pairs}))
    return tiny


def puma(folder: Path) -> Tiny:
    """Alternating classes tumor, lymphocyte and plasma_cell; RGB and RGBA; one MultiPolygon."""
    tiny = Tiny(folder, "puma", {"mpp": 0.23, "coarse": "none"}, mpp=0.23)
    (folder / "01_training_dataset_geojson_nuclei").mkdir(parents=True)
    for number, count in enumerate((6, 1, 0), start=1):
        name = f"training_set_metastatic_roi_{number:03d}"
        image, boxes = tiny.add(name, ("train", "val", "test")[number - 1], count, (63, 49), 3)
        alpha = np.full((*image.shape[:2], 1), 255 if number > 1 else 0, np.uint8)
        stored = image if number == 3 else np.concatenate([image, alpha], axis=2)
        path = save_image(stored, folder / "01_training_dataset_tif_ROIs" / f"{name}.tif")
        features = [feature(box, f"nuclei_{('tumor', 'lymphocyte', 'plasma_cell')[box.label]}") for box in boxes]
        if features:
            ring = features[0]["geometry"]["coordinates"]
            features[0]["geometry"] = {"type": "MultiPolygon", "coordinates": [ring]}
        labels = folder / "01_training_dataset_geojson_nuclei" / f"{name}_nuclei.geojson"
        write_geojson(labels, features)
        tiny.files[name] = path, labels
    (folder / "split").mkdir()
    for name, split in tiny.splits.items():
        content = {"classes": ["tumor", "tils", "other"], "anno": {f"{name}.png": [[], [], []]}}
        (folder / "split" / f"{split}.json").write_text(json.dumps(content))
    return tiny


def consep(folder: Path) -> Tiny:
    tiny = Tiny(folder, "consep", {"merge": "no", "val": 1})
    for part, number, split, count in (("Train", 1, "val", 1), ("Train", 2, "train", 9), ("Test", 1, "test", 0)):
        name = f"{part.lower()}_{number}"
        image, boxes = tiny.add(name, split, count, (67, 51), 7)
        path = save_image(image, folder / part / "Images" / f"{name}.png")
        labels = folder / part / "Labels" / f"{name}.mat"
        labels.parent.mkdir(parents=True, exist_ok=True)
        maps = {"inst_map": instance_map(boxes, (67, 51)), "type_map": type_map(boxes, (67, 51))}
        savemat(labels, {key: value.astype(np.float64) for key, value in maps.items()}, do_compression=True)
        tiny.files[name] = path, labels
    return tiny


def _pannuke_fold(tiny: Tiny, fold: str, split: str, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    size = (48, 48)
    images, masks = np.zeros((len(counts), 48, 48, 3)), np.zeros((len(counts), 48, 48, 6))
    for row, count in enumerate(counts):
        name = f"{fold}_{row:05d}"
        images[row], boxes = tiny.add(name, split, count, size, 5)
        boxes.sort(key=lambda box: box.label)  # the order of the channels
        for label in range(5):
            mine = [box for box in boxes if box.label == label]
            masks[row, ..., label] = instance_map(mine, size, list(range(3, 3 + 2 * len(mine), 2)))  # with gaps
        masks[row, ..., 5] = masks[row, ..., :5].sum(axis=2) == 0
    return images, masks


def _pannuke(folder: Path, names: tuple[str, ...], image_file: str, mask_file: str) -> Tiny:
    tiny = Tiny(folder, "pannuke")
    for i, (split, counts) in enumerate((("train", (7, 0)), ("val", (1,)), ("test", (5,)))):
        fold = names[i].replace(" ", "").lower()
        pair = [folder / names[i] / part.format(fold) for part in (image_file, mask_file)]
        for path, array in zip(pair, _pannuke_fold(tiny, fold, split, counts), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
        tiny.files |= {name: (pair[0], pair[1]) for name in tiny.splits if name.startswith(fold)}
    return tiny


def pannuke_zip(folder: Path) -> Tiny:
    names = ("Fold 1", "Fold 2", "Fold 3")
    return _pannuke(folder, names, "images/{}/images.npy", "masks/{}/masks.npy")


def pannuke_flat(folder: Path) -> Tiny:
    return _pannuke(folder, ("fold0", "fold1", "fold2"), "images.npy", "masks.npy")


def pannuke_cellvit(folder: Path) -> Tiny:
    """CellViT's conversion, in which labels are pickled mappings."""
    tiny = Tiny(folder, "pannuke")
    for fold, row, split, count in ((0, 0, "train", 6), (0, 1, "train", 0), (1, 0, "val", 1), (2, 0, "test", 3)):
        name, stem = f"fold{fold}_{fold}_{row}", f"{fold}_{row}"
        image, boxes = tiny.add(name, split, count, (48, 48), 5)
        path, labels = folder / f"fold{fold}" / "images" / f"{stem}.png", folder / f"fold{fold}" / "labels"
        labels.mkdir(parents=True, exist_ok=True)
        maps = {"inst_map": instance_map(boxes, (48, 48)).astype(np.int32), "type_map": type_map(boxes, (48, 48))}
        np.save(labels / f"{stem}.npy", maps)  # type: ignore[arg-type]
        tiny.files[name] = save_image(image, path), labels / f"{stem}.npy"
    return tiny


def lizard(folder: Path) -> Tiny:
    """Ids with gaps and in descending order, rows of ``class`` in that order; leftover files of a Mac's zip."""
    tiny = Tiny(folder, "lizard", mpp=0.5)
    rows = ["Filename,Source,Split"]
    (folder / "Lizard_Labels" / "Labels").mkdir(parents=True)
    for number, (split, count) in enumerate((("train", 8), ("val", 1), ("test", 0)), start=1):
        name = f"consep_{number}"
        image, boxes = tiny.add(name, split, count, (65, 53), 6)
        ids = [5 * (i + 1) for i in range(count)]
        listed = list(reversed(range(count)))
        labels = folder / "Lizard_Labels" / "Labels" / f"{name}.mat"
        content = {
            "inst_map": instance_map(boxes, (65, 53), ids).astype(np.int32),
            "id": np.array([ids[i] for i in listed], np.int32).reshape(-1, 1),
            "class": np.array([boxes[i].label + 1 for i in listed], np.int32).reshape(-1, 1),
            "centroid": np.array([boxes[i].centre for i in listed]).reshape(-1, 2) - 0.5,
        }
        savemat(labels, content)
        part = folder / f"Lizard_Images{1 + number % 2}"
        tiny.files[name] = save_image(image, part / f"{name}.png"), labels
        rows.append(f"{name},consep,{number}")
    (folder / "Lizard_Labels" / "info.csv").write_text("\n".join(rows) + "\n")
    (folder / "__MACOSX" / "Labels").mkdir(parents=True)
    (folder / "__MACOSX" / "Labels" / "._consep_1.mat").write_bytes(b"Mac OS X")
    (folder / "Lizard_Labels" / "Labels" / "._consep_2.mat").write_bytes(b"Mac OS X")
    return tiny


def cellvit(folder: Path) -> Tiny:
    tiny = Tiny(folder, "cellvit", {"mpp": 0.25, "fold": 1})
    for number, (part, split, count) in enumerate((("train", "train", 6), ("train", "val", 1), ("test", "test", 0))):
        name = f"img_{number}.png"
        image, boxes = tiny.add(name, split, count, (59, 45), 3)
        labels = folder / part / "labels" / f"img_{number}.csv"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text("".join(f"{box.centre[0]},{box.centre[1]},{box.label}\n" for box in boxes))
        tiny.files[name], tiny.slides[name] = (save_image(image, folder / part / "images" / name), labels), name[:-4]
    for fold, (train, val) in enumerate((("img_1", "img_0"), ("img_0", "img_1"))):
        (folder / "splits" / f"fold_{fold}").mkdir(parents=True)
        (folder / "splits" / f"fold_{fold}" / "train.csv").write_text(f"{train}\n")
        (folder / "splits" / f"fold_{fold}" / "val.csv").write_text(f"{val}\n")
    (folder / "label_map.yaml").write_text('labels:\n  0: "Tumour"\n  1: "Lymphocyte"\n  2: "Other"\n')
    return tiny


def qupath(folder: Path) -> Tiny:
    """Plain and gzipped files, outlines and points, both spellings of the type; classes in alphabetical order."""
    tiny = Tiny(folder, "qupath")
    folder.mkdir(parents=True)
    names = ("Lymphocyte", "Stroma", "Tumor: Positive")
    rows = ["image,mpp,slide,split"]
    for number, (split, count) in enumerate((("train", 6), ("val", 1), ("test", 0))):
        name = f"tile{number}.png"
        image, boxes = tiny.add(name, split, count, (69, 55), 3)
        features = [feature(box, names[box.label], "detection") for box in boxes]
        if number == 0:
            point = {"type": "Point", "coordinates": list(boxes[1].centre)}
            features[1] |= {"geometry": point}
            features[2]["properties"] = {
                "object_type": "detection",
                "classification": {"names": ["Tumor", "Positive"]},
            }
        labels = folder / (f"tile{number}.geojson.gz" if number == 1 else f"tile{number}.geojson")
        write_geojson(labels, features)
        tiny.files[name], tiny.slides[name] = (save_image(image, folder / name), labels), f"slide{number}"
        rows.append(f"{name},0.25,slide{number},{split}")
    (folder / "mpp.csv").write_text("\n".join(rows) + "\n")
    return tiny


def points(folder: Path) -> Tiny:
    tiny = Tiny(folder, "points", {"mpp": 0.25, "labels": "a,b"})
    folder.mkdir(parents=True)
    for number, count in enumerate((6, 1, 0)):
        name = f"tile{number}.png"
        image, boxes = tiny.add(name, "", count, (57, 43), 2)
        labels = folder / f"tile{number}.csv"
        lines = [f"{box.centre[0]},{box.centre[1]},{box.label}\n" for box in boxes]
        labels.write_text("x,y,label\n" + "".join(lines))
        tiny.files[name], tiny.slides[name] = (save_image(image, folder / name), labels), f"tile{number}"
    return tiny


def muse(folder: Path) -> Tiny:
    """Pixels as an array, pixels as the bytes of a JPEG, and an image without cells."""
    tiny = Tiny(folder, "muse")
    (folder / "samples").mkdir(parents=True)
    rows = ["sample_name,wsi_name,patch_id,n_cell"]
    for number, count in enumerate((6, 1, 0)):
        name = f"TCGA-AA-0001-01Z-00-DX{number}_{number}"
        image, boxes = tiny.add(name, "", count, (64, 64), 1)
        path = folder / "samples" / f"{name}.h5"
        patch = image
        if number == 1:
            jpeg = folder / "jpeg"
            save_image(image, jpeg, format="JPEG", quality=97, subsampling=0)
            patch = np.frombuffer(jpeg.read_bytes(), np.uint8)
            jpeg.unlink()
        with h5py.File(path, "w") as file:
            file["patch"] = patch
            file["cell"] = np.array([box.centre for box in boxes], np.float64).reshape(-1, 2)
        tiny.files[name], tiny.slides[name] = (path, path), f"TCGA-AA-0001-01Z-00-DX{number}"
        rows.append(f"{name},TCGA-AA-0001-01Z-00-DX{number},{number},{count}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return tiny


DATASETS: dict[str, Callable[[Path], Tiny]] = {
    build.__name__: build
    for build in (
        brcam2c,
        ocelot,
        puma,
        consep,
        pannuke_zip,
        pannuke_flat,
        pannuke_cellvit,
        lizard,
        cellvit,
        qupath,
        points,
        muse,
    )
}


def build(name: str, tmp_path: Path) -> Tiny:
    return DATASETS[name](tmp_path / name)


def opened(tiny: Tiny, **options: Any) -> Dataset:
    source = open_source(tiny.spec, **(tiny.options | options))
    assert isinstance(source, Dataset)
    return source


def by_name(source: Dataset) -> dict[str, SourceImage]:
    return {item.name: item for item in source}
