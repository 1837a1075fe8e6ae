"""Samples with a large field of view: position of the region, its surroundings, and positions of nuclei."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from muse_fast.config import ViewsConfig
from muse_fast.detection.config import SamplesConfig
from muse_fast.detection.detector import Detector, DetectorSpec
from muse_fast.detection.samples import (
    ANNOTATED,
    EMPTY,
    UNLABELLED,
    LabelledImage,
    LfovDataset,
    class_names,
    draw_corner,
    draw_images,
    read_labelled,
)
from muse_fast.detection.score_detector import detect_images, in_source_pixels
from muse_fast.detection.squares import GLASS, cut_square
from muse_fast.detection.targets import proposal_places
from muse_fast.errors import UserError
from muse_fast.images.points import Points
from muse_fast.images.slide import open_slide
from muse_fast.images.synthetic import synthetic_image
from muse_fast.models.backbone import build_backbone
from muse_fast.sources import open_source, puma
from muse_fast.views.colours import Colour, draw_colour
from tests.support.small_slides import write_slide

PLAIN = ViewsConfig(jitter=0.0, grey=0.0, solarise=0.0, blur=False)


def dotted(height: int, width: int, nuclei: int, region: NDArray[np.bool_] | None = None) -> LabelledImage:
    """A black image with one white pixel per nucleus; nuclei are at middles of pixels."""
    rng = np.random.default_rng(height + width)
    region = np.ones((height, width), bool) if region is None else region
    free = rng.permutation(np.argwhere(region))[:nuclei, ::-1]
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, free[:, 1], free[:, 0]] = 255
    xy = (free + 0.5).astype(np.float32)
    return LabelledImage("dots", image, torch.from_numpy(region), xy, np.arange(nuclei), (1.0, 1.0))


def dataset(image: LabelledImage, size: int, surroundings: str = "mask", **more: bool) -> LfovDataset:
    return LfovDataset(
        [image], size=size, surroundings=surroundings, turns=more.get("turns", True), colours=PLAIN, seed=3
    )


def test_a_share_of_the_images() -> None:
    images = [dotted(16, 16 + number, 0) for number in range(20)]
    widths = {
        fraction: [one.image.shape[2] - 16 for one in draw_images(images, fraction, 5)]
        for fraction in (1e-9, 0.1, 0.5, 1.0)
    }
    assert [len(found) for found in widths.values()] == [1, 2, 10, 20]
    assert all(found == sorted(found) for found in widths.values())
    assert set(widths[0.1]) < set(widths[0.5]) and widths[1.0] == list(range(20))
    assert widths[0.5] not in (list(range(10)), [one.image.shape[2] - 16 for one in draw_images(images, 0.5, 6)])


def test_the_region_is_uniformly_distributed_inside_the_sample() -> None:
    rng = np.random.default_rng(0)
    corners = np.array([draw_corner(rng, (100, 40, 30, 20), 40) for _ in range(20_000)])
    offsets = np.array([100, 40]) - corners  # equation 8: from 0 to r' - r
    for axis, room in ((0, 10), (1, 20)):
        counts = np.bincount(offsets[:, axis], minlength=room + 1)
        assert len(counts) == room + 1
        expected = len(offsets) / (room + 1)
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < room + 5 * np.sqrt(2 * room)
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.03


def puma_with_context(folder: Path, large: NDArray[np.uint8], side: int) -> Path:
    """Write the middle of ``large`` as a ROI in PUMA's layout, with a nucleus in the middle of its pixel 10, 20."""
    middle = (large.shape[0] - side) // 2
    for name in (puma.IMAGES, puma.LABELS, puma.CONTEXTS):
        (folder / name).mkdir(parents=True)
    roi = large[middle : middle + side, middle : middle + side]
    Image.fromarray(roi).save(folder / puma.IMAGES / "a.tif")
    Image.fromarray(large).save(folder / puma.CONTEXTS / "a_context.tif")
    ring = [[10, 20], [11, 20], [11, 21], [10, 21], [10, 20]]
    shape = {"type": "Polygon", "coordinates": [ring]}
    nucleus = {"type": "Feature", "geometry": shape, "properties": {"classification": {"name": "nuclei_tumor"}}}
    (folder / puma.LABELS / "a_nuclei.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": [nucleus]})
    )
    return folder


def test_a_roi_is_surrounded_by_its_context(tmp_path: Path) -> None:
    large = synthetic_image(5, 320, 0.25)[0]
    folder = puma_with_context(tmp_path, large, 64)
    source = open_source(f"puma:{folder}", mpp=0.25)
    (image,) = read_labelled(source, ("",), 0.25, sample_size=160)[""]
    seen = image.image.permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(seen, large[32:288, 32:288])  # 96 px on each side, all that a sample can show
    assert image.corner == (96, 96) and image.box() == (96, 96, 64, 64)
    np.testing.assert_allclose(image.xy, [[106.5, 116.5]])

    (coarse,) = read_labelled(source, ("",), 0.5, sample_size=160)[""]
    assert coarse.image.shape == (3, 160, 160) and coarse.corner == (64, 64)
    expected = np.asarray(Image.fromarray(large).resize((160, 160), Image.Resampling.BICUBIC))
    error = np.abs(coarse.image.permute(1, 2, 0).numpy().astype(int) - expected)
    assert error[:62].max() <= 1 and error[98:].max() <= 1  # the ROI was resampled separately
    np.testing.assert_allclose(coarse.xy, [[69.25, 74.25]])

    (alone,) = read_labelled(source, ("",), 0.25, sample_size=64)[""]
    assert alone.image.shape == (3, 64, 64) and alone.corner == (0, 0)
    sample = dataset(image, 160).sample(0, 0)
    assert (sample.places == ANNOTATED).sum() == 64 * 64 and not (sample.places == EMPTY).any()


def test_ocelots_tissue_patch_is_placed_by_the_metadata(tmp_path: Path) -> None:
    """A cell patch at 0.2 um/px, off-centre in a tissue patch with a quarter of the pixels per um."""
    tissue = np.full((256, 256, 3), 230, np.uint8)
    tissue[100:140, 40:60] = (120, 40, 140)
    cell = np.full((128, 128, 3), 200, np.uint8)
    for name, picture in (("cell", cell), ("tissue", tissue)):
        path = tmp_path / "images/train" / name / "001.jpg"
        path.parent.mkdir(parents=True)
        Image.fromarray(picture).save(path, quality=100, subsampling=0)
    labels = tmp_path / "annotations/train/cell/001.csv"
    labels.parent.mkdir(parents=True)
    labels.write_text("64,64,2\n")
    place = {"x_start": 1240, "y_start": 2320, "x_end": 1368, "y_end": 2448, "resized_mpp_x": 0.2, "resized_mpp_y": 0.2}
    around = {"x_start": 1000, "y_start": 2000, "x_end": 2024, "y_end": 3024}
    entry = {"slide_name": "S", "subset": "train", "cell": place, "tissue": around}
    (tmp_path / "metadata.json").write_text(json.dumps({"sample_pairs": {"001": entry}}))
    (image,) = read_labelled(open_source(f"ocelot:{tmp_path}"), ("",), 0.2, sample_size=512)[""]
    # In pixels of the cell patch, the tissue patch extends 240 to the left, 320 upwards, and 384 to the right and down.
    assert image.corner == (240, 320) and image.image.shape == (3, 320 + 128 + 384, 240 + 128 + 384)
    np.testing.assert_allclose(image.xy, [[304, 384]])
    purple = image.image[1] < 100
    rows, columns = purple.any(dim=1).nonzero().flatten(), purple.any(dim=0).nonzero().flatten()
    corners = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    assert np.abs(np.array(corners) - [160, 400, 240, 560]).max() <= 3
    pasted = image.image[:, 320:448, 240:368]
    assert (pasted.to(int) - 200).abs().max() <= 2

    entry["cell"]["x_start"] = 900
    (tmp_path / "metadata.json").write_text(json.dumps({"sample_pairs": {"001": entry}}))
    with pytest.raises(UserError, match=r"metadata.json: the cell patch of 001, .* lies outside"):
        open_source(f"ocelot:{tmp_path}")


def brcam2c_of_a_slide(folder: Path, slide: Path, place: tuple[int, int, int, int]) -> None:
    """Write BRCA-M2C with one image at 0.5 um/px, cut from x, y, width, height of a slide; a nucleus at 40, 60."""
    x, y, width, height = place
    opened = open_slide(slide)
    name = f"{slide.stem}_{x}_{y}_{width}_{height}_{4 * opened.mpp:g}"
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    size = round(width * opened.mpp / 0.5), round(height * opened.mpp / 0.5)
    image = Image.fromarray(opened.read(x, y, width, height)).resize(size, Image.Resampling.BICUBIC)
    image.save(folder / "images" / f"{name}.png")
    (folder / "labels" / f"{name}_gt_class_coords.txt").write_text("60 40 2\n")
    for split in ("train", "val", "test"):
        (folder / f"brca_ds_{split}.txt").write_text(f"{name}.png\n" if split == "train" else "")


def test_an_image_of_brcam2c_is_surrounded_by_its_slide(tmp_path: Path, shared_data: Path) -> None:
    slide = shared_data / "wsi" / "cmu-1-small-region.svs"
    place = x, y, width, height = (300, 900, 402, 320)
    brcam2c_of_a_slide(tmp_path / "set", slide, place)
    source = open_source(f"brcam2c:{tmp_path / 'set'}", slides=str(slide.parent))
    (image,) = read_labelled(source, ("train",), 0.5, sample_size=1024)["train"]
    # The slide ends 300 px (of 0.499 um) to the left of the image; elsewhere at most 1024 - 401 px can be seen.
    assert image.corner == (299, 705) and image.image.shape == (3, 2 * 705 + 319, 299 + 401 + 623)
    np.testing.assert_allclose(image.xy, [[40 + 299, 60 + 705]])
    opened = open_slide(slide)
    across, down = width / 401, height / 319
    field = (x - 299 * across, y - 705 * down, x + width + 623 * across, y + height + 705 * down)
    whole = Image.fromarray(opened.read(0, 0, opened.width, opened.height))
    expected = np.asarray(whole.resize(image.image.shape[:0:-1], Image.Resampling.BICUBIC, box=field))
    error = np.abs(image.image.permute(1, 2, 0).numpy().astype(int) - expected)
    # The filter reaches two pixels beyond borders: those of the image, and those of the area read from the slide.
    for rows in (slice(0, 2), slice(703, 707), slice(1022, 1026), slice(-2, None)):
        error[rows] = 0
    for columns in (slice(0, 2), slice(297, 301), slice(698, 702), slice(-2, None)):
        error[:, columns] = 0
    assert error.max() <= 1 and expected.std() > 20

    (alone,) = read_labelled(open_source(f"brcam2c:{tmp_path / 'set'}"), ("train",), 0.5, sample_size=1024)["train"]
    assert bool(alone.region.all()) and torch.equal(alone.image, image.image[:, 705:1024, 299:700])


def test_a_slide_that_does_not_contain_its_image_is_reported(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "slides" / "a.tif", synthetic_image(5, 640, 0.5)[0])
    brcam2c_of_a_slide(tmp_path / "set", slide, (100, 100, 300, 300))
    write_slide(slide, synthetic_image(5, 320, 0.5)[0])
    source = open_source(f"brcam2c:{tmp_path / 'set'}", slides=str(slide.parent))
    with pytest.raises(UserError, match=r"a.tif: 320 x 320 px, expected a larger image that contains its ROI"):
        read_labelled(source, ("train",), 0.5, sample_size=512)
    with pytest.raises(UserError, match=r"none: no such file or folder"):
        open_source(f"brcam2c:{tmp_path / 'set'}", slides=str(tmp_path / "none"))
    shutil.copy(slide, slide.with_name("a.copy.tif"))
    with pytest.raises(UserError, match=r"a\.tif and .*a\.copy\.tif are both slide a"):
        open_source(f"brcam2c:{tmp_path / 'set'}", slides=str(slide.parent))


def test_a_damaged_or_smaller_context_is_reported(tmp_path: Path) -> None:
    folder = puma_with_context(tmp_path, synthetic_image(5, 128, 0.25)[0], 64)
    path = folder / puma.CONTEXTS / "a_context.tif"
    Image.new("RGB", (50, 50)).save(path)
    with pytest.raises(UserError, match=r"a_context.tif: 50 x 50 px, smaller than the 64 x 64"):
        open_source(f"puma:{folder}", mpp=0.25)
    path.write_bytes(b"II")
    with pytest.raises(UserError, match=r"a_context.tif: not a readable image"):
        open_source(f"puma:{folder}", mpp=0.25)


def test_detections_count_only_inside_the_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector of dark pixels sees the context, but only detections in the region are returned."""
    large = np.full((320, 320, 3), 255, np.uint8)
    for x, y in ((128, 128), (191, 191), (127, 150), (150, 192), (140, 160)):
        large[y, x] = 0
    source = open_source(f"puma:{puma_with_context(tmp_path, large, 64)}", mpp=0.25)
    seen = []

    def detect(images: torch.Tensor) -> list[Points]:
        seen.append(tuple(images.shape))
        y, x = (images[0, 0] == 0).nonzero(as_tuple=True)
        xy = (torch.stack([x, y], dim=1) + 0.5).numpy().astype(np.float32)
        return [Points(xy, np.zeros(len(xy), np.int64), np.ones(len(xy), np.float32))]

    spec = DetectorSpec(arch="vit_tiny", class_names=("a",), mpp=0.25, sample_size=160)
    detector = Detector(build_backbone("vit_tiny"), spec)
    monkeypatch.setattr(detector, "detect", detect)
    images = read_labelled(source, ("",), 0.25, sample_size=160)[""]
    (found,) = detect_images(detector, images)
    assert seen == [(1, 3, 160, 160)]  # one tile, the region in its middle
    in_source = in_source_pixels(found, images[0])
    assert sorted(map(tuple, in_source.xy.tolist())) == [(0.5, 0.5), (12.5, 32.5), (63.5, 63.5)]


def test_a_region_larger_than_the_sample_is_cropped() -> None:
    rng = np.random.default_rng(0)
    corners = np.array([draw_corner(rng, (10, 5, 100, 64), 64) for _ in range(3_000)])
    assert set(corners[:, 0]) == set(range(10, 47)) and set(corners[:, 1]) == {5}


@pytest.mark.parametrize("surroundings", ["reflect", "mask"])
@pytest.mark.parametrize("shape", [(40, 56), (150, 70), (64, 64)])
def test_nuclei_stay_on_their_pixels(shape: tuple[int, int], surroundings: str) -> None:
    image = dotted(*shape, nuclei=30)
    samples = dataset(image, 64, surroundings)
    seen = 0
    for epoch in range(24):
        sample = samples.sample(epoch, 0)
        column, row = np.floor(sample.xy).astype(int).T
        assert (sample.image[:, row, column] == 255).all()
        assert (sample.places[row, column] == ANNOTATED).all()
        annotated = sample.places == ANNOTATED
        assert int((sample.image[0][annotated] == 255).sum()) == len(sample.xy)  # none lost, none added
        assert sorted(sample.label) == sorted(set(sample.label))
        seen += len(sample.xy)
    assert seen > 24 * 4


def test_places_of_both_surroundings() -> None:
    image = dotted(40, 50, nuclei=5)
    for surroundings, beyond in (("reflect", UNLABELLED), ("mask", EMPTY)):
        sample = dataset(image, 96, surroundings).sample(0, 0)
        annotated = sample.places == ANNOTATED
        assert annotated.sum() == 40 * 50
        assert (sample.places[~annotated] == beyond).all()
        if surroundings == "mask":
            assert (sample.image[:, ~annotated] == GLASS).all()


def test_a_region_of_any_shape_and_the_tissue_around_it() -> None:
    y, x = np.mgrid[:80, :80]
    disc = (y - 40) ** 2 + (x - 38) ** 2 < 15**2
    image = dotted(80, 80, nuclei=10, region=disc)
    for epoch in range(8):
        sample = dataset(image, 48).sample(epoch, 0)  # the disc of 29 px fits, mostly surrounded by the image
        assert (sample.places == ANNOTATED).sum() == disc.sum() and len(sample.xy) == 10
        assert (sample.places == UNLABELLED).sum() > 0.5 * (48 * 48 - disc.sum())


def test_reflection_repeats_like_numpy() -> None:
    image = torch.randint(0, 255, (3, 7, 5), dtype=torch.uint8)
    ours = cut_square(image, -13, -20, 40, "reflect")
    theirs = np.pad(image.numpy(), ((0, 0), (20, 40), (13, 40)), mode="symmetric")[:, :40, :40]
    assert np.array_equal(ours.numpy(), theirs)


def test_a_sample_does_not_depend_on_earlier_ones() -> None:
    images = read_labelled(open_source("synthetic:6", size=96), ("train",), 0.5)["train"]
    make = lambda: LfovDataset(  # noqa: E731
        images, size=64, surroundings="reflect", turns=True, colours=ViewsConfig(), seed=1
    )
    first, again = make(), make()
    one = first[[(0, 0), (0, 1), (5, 2)]]
    two = again[[(5, 2)]]
    assert not isinstance(one, UserError) and not isinstance(two, UserError)
    assert torch.equal(one.images[2], two.images[0]) and torch.equal(one.xy[-int(two.counts[0]) :], two.xy)
    other = again[[(6, 2)]]
    assert not isinstance(other, UserError) and not torch.equal(other.images, two.images)
    assert not torch.equal(two.plain, two.images)  # colours are augmented in one of them


def test_stains_change_as_the_settings_say_and_nothing_else_does() -> None:
    """Amounts of stains, solved for in float64, are scaled and shifted; levels are rounded, so by nearly a line."""
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    amounts = np.random.default_rng(0).uniform([[0.2], [0.2], [0.2]], [[0.5], [0.4], [0.3]], (3, 64 * 64))
    levels = torch.from_numpy(255 * np.exp(-vectors.T @ amounts)).round().to(torch.uint8)
    image = dataclasses.replace(dotted(64, 64, 5), image=levels.view(3, 64, 64))
    make = lambda **of: LfovDataset(  # noqa: E731
        [image], size=64, surroundings="mask", turns=True, colours=SamplesConfig(**of).colours(), seed=3
    )
    stained, jittered = make(stain=0.4, stain_shift=0.08, jitter=0.0), make(jitter=0.4)
    lines = []
    for epoch in range(3):
        sample, other = stained.sample(epoch, 0), jittered.sample(epoch, 0)
        assert torch.equal(sample.plain, other.plain) and np.array_equal(sample.xy, other.xy)
        density = [-np.log(one.flatten(1).numpy().astype(float) / 255) for one in (sample.plain, sample.image)]
        before, after = (np.linalg.solve(vectors.T, one) for one in density)
        for one, new in zip(before, after, strict=True):
            slope, offset = np.polyfit(one, new, 1)
            assert np.abs(slope * one + offset - new).max() < 0.06
            lines.append((slope, offset))
    slopes, offsets = np.array(lines).T
    assert np.abs(slopes - 1).max() < 0.41 and np.abs(offsets).max() < 0.09
    assert np.ptp(slopes) > 0.1 and np.ptp(offsets) > 0.02
    both, plain = make(stain=0.4, jitter=0.4), make()
    assert plain.colours.stain == 0 and draw_colours(both) == draw_colours(jittered)


def draw_colours(dataset: LfovDataset) -> list[Colour]:
    """Without the stains."""
    drawn = [draw_colour(np.random.default_rng(seed), "local", dataset.colours) for seed in range(4)]
    return [dataclasses.replace(colour, stain=None) for colour in drawn]


def test_places_are_read_at_the_proposals() -> None:
    places = torch.zeros(1, 32, 32, dtype=torch.uint8)
    places[0, 8:16, 16:24] = ANNOTATED
    assert proposal_places(places, 8).nonzero().tolist() == [[0, 1 * 4 + 2]]


def test_reading_splits() -> None:
    splits = read_labelled(open_source("synthetic:10", size=64), ("train", "val"), 0.5)
    assert [len(splits[name]) for name in ("train", "val")] == [7, 2]
    assert splits["train"][0].image.shape == (3, 32, 32) and splits["train"][0].scale == (0.5, 0.5)
    assert len(read_labelled(open_source("synthetic:10", size=64), ("",), 0.5)[""]) == 10
    with pytest.raises(UserError, match=r"split 'valid'.* 7 in train, 2 in val"):
        read_labelled(open_source("synthetic:10", size=64), ("valid",), 0.5)


def test_labels_without_class_names_are_a_single_class(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("x,y,label\n3,4,7\n9,9,-1\n")
    plain = open_source(f"points:{tmp_path}", mpp=0.5)
    named = open_source(f"points:{tmp_path}", mpp=0.5, labels="a,b,c,d,e,f,g,h")
    assert class_names(plain) == ("nucleus",)
    assert read_labelled(plain, ("",), 0.5)[""][0].label.tolist() == [0, 0]
    assert read_labelled(named, ("",), 0.5)[""][0].label.tolist() == [7, -1]
