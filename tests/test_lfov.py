"""Samples with a large field of view: where the region lies, what stands around it, and that nuclei move along."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from muse_fast.config import ViewsConfig
from muse_fast.data.sources import open_source
from muse_fast.data.surroundings import GLASS, cut_square
from muse_fast.errors import UserError
from muse_fast.ndc.lfov import (
    ANNOTATED,
    EMPTY,
    UNLABELLED,
    LabelledImage,
    LfovDataset,
    class_names,
    draw_corner,
    read_splits,
)
from muse_fast.train.finetuner import proposal_places

PLAIN = ViewsConfig(jitter=0.0, grey=0.0, solarise=0.0, blur=False)


def dotted(height: int, width: int, nuclei: int, region: NDArray[np.bool_] | None = None) -> LabelledImage:
    """A black image with one white pixel per nucleus, on the middle of it."""
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


def test_the_corner_is_uniform_and_the_region_inside() -> None:
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
        assert int((sample.image[0][annotated] == 255).sum()) == len(sample.xy)  # none is lost, none invented
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
        sample = dataset(image, 48).sample(epoch, 0)  # 29 px across, so it fits, and mostly among the image's own
        assert (sample.places == ANNOTATED).sum() == disc.sum() and len(sample.xy) == 10
        assert (sample.places == UNLABELLED).sum() > 0.5 * (48 * 48 - disc.sum())


def test_reflection_repeats_like_numpy() -> None:
    image = torch.randint(0, 255, (3, 7, 5), dtype=torch.uint8)
    ours = cut_square(image, -13, -20, 40, "reflect")
    theirs = np.pad(image.numpy(), ((0, 0), (20, 40), (13, 40)), mode="symmetric")[:, :40, :40]
    assert np.array_equal(ours.numpy(), theirs)


def test_the_same_sample_whatever_came_before() -> None:
    images = read_splits(open_source("synthetic:6", size=96), ("train",), 0.5)["train"]
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
    assert not torch.equal(two.plain, two.images)  # the colours of one of them are augmented


def test_a_proposal_stands_where_its_place_is_read() -> None:
    places = torch.zeros(1, 32, 32, dtype=torch.uint8)
    places[0, 8:16, 16:24] = ANNOTATED
    assert proposal_places(places, 8).nonzero().tolist() == [[0, 1 * 4 + 2]]


def test_reading_splits() -> None:
    splits = read_splits(open_source("synthetic:10", size=64), ("train", "val"), 0.5)
    assert [len(splits[name]) for name in ("train", "val")] == [7, 2]
    assert splits["train"][0].image.shape == (3, 32, 32) and splits["train"][0].scale == (0.5, 0.5)
    assert len(read_splits(open_source("synthetic:10", size=64), ("",), 0.5)[""]) == 10
    with pytest.raises(UserError, match=r"split 'valid'.* 7 in train, 2 in val"):
        read_splits(open_source("synthetic:10", size=64), ("valid",), 0.5)


def test_labels_without_classes_are_of_one(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("x,y,label\n3,4,7\n9,9,-1\n")
    plain = open_source(f"points:{tmp_path}", mpp=0.5)
    named = open_source(f"points:{tmp_path}", mpp=0.5, labels="a,b,c,d,e,f,g,h")
    assert class_names(plain) == ("nucleus",)
    assert read_splits(plain, ("",), 0.5)[""][0].label.tolist() == [0, 0]
    assert read_splits(named, ("",), 0.5)[""][0].label.tolist() == [7, -1]
