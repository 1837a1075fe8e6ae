"""Tiles, features and classifiers of the nucleus-classification benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from muse_fast.classification.features import NucleusSet, TileBatch, extract_features, stack_tiles
from muse_fast.classification.metrics import score
from muse_fast.classification.probes import (
    class_probabilities,
    knn,
    knn_probabilities,
    linear_probe,
    new_head,
)
from muse_fast.classification.splits import Splits
from muse_fast.classification.tiles import Tile, cut_crops, cut_tiles, tiles_by_split
from muse_fast.classification.tuned import NucleusClassifier, finetune, predict, turn_tiles
from muse_fast.errors import UserError
from tests.support.probe_in_float64 import linear_probe_in_float64


@dataclass
class Labelled:
    """A labelled image as sources yield it."""

    image: np.ndarray
    xy: np.ndarray
    label: np.ndarray | None
    mpp: float = 0.5
    name: str = "image"
    slide: str = "slide"
    split: str = "train"


def with_dots(rng: np.random.Generator, width: int, height: int, count: int) -> Labelled:
    """A grey image with a bright 3 px dot around each nucleus; nuclei do not touch."""
    grid = np.stack(np.meshgrid(np.arange(6, width - 6, 16), np.arange(6, height - 6, 16)), -1).reshape(-1, 2)
    xy = rng.permutation(grid)[:count] + rng.integers(-3, 4, (count, 2))
    image = np.full((height, width, 3), 20, np.uint8)
    for x, y in xy:
        image[y - 1 : y + 2, x - 1 : x + 2] = 255
    return Labelled(image, (xy + 0.5).astype(np.float32), rng.integers(0, 3, count).astype(np.int16))


# ------------------------------------------------------------------------------------------------------------ tiles


@pytest.mark.parametrize(
    ("width", "height", "size", "mpp"),
    [(491, 465, 224, 0.5), (491, 465, 512, 0.5), (500, 333, 224, 0.25), (328, 328, 96, 0.7), (100, 90, 224, 0.5)],
)
def test_every_nucleus_lies_once_under_its_dot(width: int, height: int, size: int, mpp: float) -> None:
    source = with_dots(np.random.default_rng(width + size), width, height, 25)
    source.label = np.arange(25, dtype=np.int16)  # unique, to count them
    tiles = cut_tiles(source, size=size, mpp=mpp, truncate=False)

    assert sorted(np.concatenate([tile.label for tile in tiles])) == list(range(25))
    for tile in tiles:
        assert tile.image.shape == (size, size, 3)
        for x, y in tile.xy:
            assert 0 <= x < size
            assert 0 <= y < size
            radius = 3 * 0.5 / mpp
            x0, y0 = max(int(x - radius), 0), max(int(y - radius), 0)
            window = tile.image[y0 : math.ceil(y + radius), x0 : math.ceil(x + radius), 0].astype(float)
            weight = np.clip(window - 60, 0, None)
            rows, columns = np.indices(window.shape) + 0.5
            assert abs(x0 + (weight * columns).sum() / weight.sum() - x) < 0.5
            assert abs(y0 + (weight * rows).sum() / weight.sum() - y) < 0.5


def test_tiles_follow_the_grid_and_stay_inside() -> None:
    image = np.arange(300 * 500 * 3, dtype=np.uint32).reshape(300, 500, 3).astype(np.uint8)
    xy = np.array([[0, 0], [223.9, 223.9], [224, 0], [499.9, 299.9], [500, 10]], np.float32)
    tiles = cut_tiles(Labelled(image, xy, np.array([0, 1, 2, 3, 4])), size=224)
    # Cells (0, 0), (1, 0) and (2, 1): the last cell is 52 x 76 px, and its tile moves back to (276, 76). The point on
    # the right edge is outside the image.
    assert [tile.label.tolist() for tile in tiles] == [[0, 1], [2], [3]]
    assert tiles[0].xy.tolist() == [[0, 0], [223, 223]]
    assert tiles[2].xy.tolist() == [[223, 223]]
    assert np.array_equal(tiles[2].image, image[76:300, 276:500])

    larger = cut_tiles(Labelled(image, xy, np.array([0, 1, 2, 3, 4])), size=288)
    # 32 px of context on every side, as far as the image reaches.
    assert np.array_equal(larger[1].image, image[0:288, 192:480])
    assert larger[1].xy.tolist() == [[32, 0]]


def test_small_image_is_reflected_and_unknown_classes_are_skipped() -> None:
    image = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    (tile,) = cut_tiles(Labelled(image, np.array([[5, 6], [7, 8]], np.float32), np.array([1, -1])), size=96)
    assert tile.xy.tolist() == [[5, 6]]
    assert np.array_equal(tile.image[:50, :60], image)
    assert np.array_equal(tile.image[50:96, :60], image[:3:-1])


@pytest.mark.parametrize("size", [1, 2, 31, 32, 200])
def test_each_crop_has_its_nucleus_in_the_middle(size: int) -> None:
    """Also at corners and edges, and where a crop is larger than the image; nuclei without class have none."""
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    xy = np.array([[0, 0], [89.9, 59.9], [45, 0.4], [10.4, 20.6], [70, 30], [90.1, 5]], np.float32)
    crops = cut_crops(Labelled(image, xy, np.array([0, 1, 2, 0, -1, 1])), size=size, mpp=0.5)
    assert [tile.label.tolist() for tile in crops] == [[0], [1], [2], [0]]
    mirrored = np.pad(image, ((240, 240), (240, 240), (0, 0)), mode="symmetric")
    for tile, (x, y) in zip(crops, xy.tolist(), strict=False):
        (place,) = tile.xy.tolist()
        left, top = round(x - place[0]), round(y - place[1])
        assert max(abs(place[0] - size / 2), abs(place[1] - size / 2)) <= 0.5
        np.testing.assert_allclose(place, (x - left, y - top), atol=1e-5)
        assert (tile.image == mirrored[top + 240 :, left + 240 :][:size, :size]).all()


def test_image_without_nuclei_yields_no_tiles() -> None:
    empty = Labelled(np.zeros((300, 300, 3), np.uint8), np.empty((0, 2), np.float32), np.empty(0, np.int16))
    assert cut_tiles(empty) == cut_crops(empty, size=48, mpp=0.5) == []


def test_sources_that_cannot_be_evaluated_are_refused() -> None:
    bare = Labelled(np.zeros((300, 300, 3), np.uint8), np.ones((1, 2), np.float32), None, name="slide_7")
    with pytest.raises(UserError, match=r"slide_7.*no classes"):
        cut_tiles(bare)
    only_train = with_dots(np.random.default_rng(0), 100, 100, 3)
    with pytest.raises(UserError, match=r"split val, test; the source has the splits \['train'\]"):
        tiles_by_split([only_train])


def test_brcam2c_nuclei_are_dark_under_their_tiles(shared_data: Path) -> None:
    """Nuclei of real tissue stain darker than the mean; positions a few pixels off would miss that."""
    folder = shared_data / "brcam2c"
    path = sorted((folder / "images").glob("*.png"))[0]
    rows = np.loadtxt(folder / "labels" / f"{path.stem}_gt_class_coords.txt", dtype=int)
    image = np.asarray(Image.open(path).convert("RGB"))
    tiles = cut_tiles(Labelled(image, rows[:, [1, 0]].astype(np.float32), rows[:, 2] - 1), mpp=0.25)
    assert sum(len(tile.label) for tile in tiles) == len(rows)

    def red_at(shift: int) -> float:
        return float(np.mean([t.image[int(y), (int(x) + shift) % 224, 0] for t in tiles for x, y in t.xy]))

    assert red_at(0) < min(red_at(24), red_at(-24)) - 20


# --------------------------------------------------------------------------------------------------------- features


class PointBackbone(nn.Module):
    """Reads the normalised colour under each nucleus, and its position."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def nucleus_features(self, images: Tensor, xy: Tensor, image_index: Tensor) -> Tensor:
        x, y = xy.long().unbind(1)
        return torch.cat([images[image_index, :, y, x], xy / images.shape[-1] - 0.5], dim=1) * self.scale


def test_features_follow_their_nuclei() -> None:
    rng = np.random.default_rng(1)
    tiles = [
        Tile(rng.integers(0, 255, (32, 32, 3), np.uint8), rng.integers(0, 32, (n, 2)).astype(np.float32),
             rng.integers(0, 3, n), slide)
        for n, slide in ((1, "a"), (4, "b"), (2, "a"))
    ]  # fmt: skip
    calls = []
    sets = extract_features(
        PointBackbone(), {"train": tiles, "val": tiles[:1]}, batch_size=2, progress=lambda *a: calls.append(a)
    )
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = [(t.image[int(y), int(x)] / 255 - mean) / std for t in tiles for x, y in t.xy]
    np.testing.assert_allclose(sets["train"].features[:, :3], expected, atol=1e-6)
    assert sets["train"].labels.tolist() == np.concatenate([t.label for t in tiles]).tolist()
    assert sets["train"].patients.tolist() == [0, 1, 1, 1, 1, 0, 0]
    assert sets["val"].features.shape == (1, 5)
    assert calls[-1] == (4, 4, "tiles")


# ------------------------------------------------------------------------------------------------------ classifiers


def random_sets(seed: int = 0, counts: tuple[int, int, int] = (600, 200, 300), dim: int = 24) -> dict[str, NucleusSet]:
    """Three overlapping, unbalanced classes."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, dim))
    sets = {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        labels = rng.choice(3, count, p=[0.6, 0.3, 0.1])
        features = centres[labels] * 0.4 + rng.normal(size=(count, dim))
        sets[split] = NucleusSet(
            torch.tensor(features, dtype=torch.float32), torch.tensor(labels), torch.tensor(rng.integers(0, 9, count))
        )
    return sets


def knn_in_float64(train: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float) -> np.ndarray:
    """Each class's share of the votes, ``[Q, 3]``."""

    def unit(rows: Tensor) -> np.ndarray:
        values = rows.double().numpy()
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    similarity = unit(queries) @ unit(train).T
    votes = np.zeros((len(queries), 3))
    for row, similar in zip(votes, similarity, strict=True):
        for j in np.argsort(-similar, kind="stable")[:k]:
            row[labels[j]] += math.exp(similar[j] / temperature)
    return votes / votes.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("queries", [1, 7, 300])
def test_knn_is_the_weighted_vote(queries: int) -> None:
    sets = random_sets()
    train, asked = sets["train"], sets["test"].features[:queries]
    ours = knn_probabilities(train.features, train.labels, asked, (1, 10, 200), num_classes=3, chunk=64)
    for k in (1, 10, 200):
        expected = knn_in_float64(train.features, train.labels, asked, k, 0.07)
        np.testing.assert_allclose(ours[k], expected, rtol=1e-4, atol=1e-5)
        assert ours[k].argmax(1).tolist() == expected.argmax(1).tolist()


def test_knn_votes_by_weight_not_by_number() -> None:
    # Cosines 1.0 for class 0 and 0.9, 0.9 for class 1: exp(1 / 0.07) > 2 exp(0.9 / 0.07), as exp(0.1 / 0.07) = 4.17.
    side = math.sqrt(1 - 0.81)
    train = torch.tensor([[5.0, 0, 0], [0.9, side, 0], [0.9, 0, side]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[3.0, 0, 0]])
    (sharp,) = knn_probabilities(train, labels, query, (3,), num_classes=2)[3].tolist()
    assert sharp == pytest.approx([4.1727 / 6.1727, 2 / 6.1727], rel=1e-4)
    (smooth,) = knn_probabilities(train, labels, query, (3,), num_classes=2, temperature=1.0)[3].tolist()
    assert smooth == pytest.approx([1.10517 / 3.10517, 2 / 3.10517], rel=1e-4)


def test_votes_that_differ_in_the_last_bit_do_not_tie() -> None:
    """The class with the most votes is the most probable one; shares in float32 would sometimes round to a tie."""
    query = torch.ones(1, 5)
    query[0, 4] = torch.nextafter(query[0, 4], torch.tensor(2.0))
    train, labels = torch.eye(5), torch.arange(5)
    tied = 0
    for temperature in torch.linspace(0.3, 2, 200).tolist():
        votes = (nn.functional.normalize(query, dim=1) / temperature).exp()
        found = knn_probabilities(train, labels, query, (5,), num_classes=5, temperature=temperature)[5]
        assert found.argmax(1).tolist() == votes.argmax(1).tolist()
        tied += int((votes / votes.sum()).argmax() != votes.argmax())
    assert tied


def test_knn_chooses_k_on_val_and_reports_the_best_on_test() -> None:
    sets = random_sets(counts=(90, 60, 70))
    result = knn(Splits(sets), 3)
    assert result.skipped == (100, 200, 500)
    assert list(result.test) == [10, 20]
    assert result.held_out[result.k_chosen]["accuracy"] == max(s["accuracy"] for s in result.held_out.values())
    assert result.test[result.k_best_on_test]["accuracy"] == max(s["accuracy"] for s in result.test.values())
    with pytest.raises(UserError, match=r"5 nuclei.*smallest number of neighbours \(10\)"):
        knn(Splits(random_sets(counts=(5, 60, 70))), 3)


@pytest.mark.parametrize(("count", "batch_size"), [(600, 256), (100, 256), (513, 256)])
def test_linear_probe_equals_float64_reference(count: int, batch_size: int) -> None:
    sets = random_sets(counts=(count, 200, 300))
    result = linear_probe(Splits(sets), 3, seed=7, epochs=30, batch_size=batch_size)
    weight, bias, epoch = linear_probe_in_float64(sets, 7, 0.01, 30, min(batch_size, count))
    assert result.epoch == epoch
    np.testing.assert_allclose(result.head.weight.detach(), weight, atol=1e-5)
    np.testing.assert_allclose(result.head.bias.detach(), bias, atol=1e-5)
    expected = (sets["test"].features.double().numpy() @ weight.T + bias).argmax(1)
    assert class_probabilities(result.head, sets["test"].features).argmax(1).tolist() == expected.tolist()
    assert result.test["accuracy"] == pytest.approx((expected == sets["test"].labels.numpy()).mean())


def test_linear_probe_reports_divergence() -> None:
    sets = random_sets()
    sets["train"].features[5, 2] = float("nan")
    with pytest.raises(UserError, match="diverged in epoch 0"):
        linear_probe(Splits(sets), 3, epochs=2)


# ----------------------------------------------------------------------------------------------------- fine-tuning


def bright_or_dark_tiles(count: int, seed: int) -> list[Tile]:
    rng = np.random.default_rng(seed)
    tiles = []
    for i in range(count):
        image = rng.integers(0, 255, (32, 32, 3), np.uint8)
        xy = rng.integers(0, 32, (6, 2))
        label = (image[xy[:, 1], xy[:, 0], 1] > 128).astype(np.int64)  # a function of the features, to be learned
        tiles.append(Tile(image, xy.astype(np.float32), label, f"slide {i % 4}"))
    return tiles


def test_finetuning_equals_plain_adamw_and_selects_on_val() -> None:
    tiles = {"train": bright_or_dark_tiles(9, 0), "val": bright_or_dark_tiles(4, 1), "test": bright_or_dark_tiles(4, 2)}
    head = new_head(5, 2, torch.Generator().manual_seed(0))
    sets = extract_features(PointBackbone(), tiles)
    expected = NucleusClassifier(PointBackbone(), nn.Linear(5, 2))
    expected.head.load_state_dict(head.state_dict())
    result = finetune(PointBackbone(), head, tiles, sets, seed=3, lr=0.05, epochs=4, batch_size=4)

    # AdamW without weight decay is Adam; cosine per epoch; two batches of four per epoch of nine tiles.
    generator = torch.Generator().manual_seed(3)
    optimiser = torch.optim.Adam(expected.parameters(), lr=0.05)
    best, kept = -1.0, {}
    for epoch in range(4):
        for group in optimiser.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2
        order = torch.randperm(9, generator=generator).tolist()
        for rows in (order[:4], order[4:8]):
            batch = stack_tiles([tiles["train"][i] for i in rows])
            loss = nn.functional.cross_entropy(expected(batch), batch.labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        accuracy = (predict(expected, tiles["val"], 4).argmax(1) == sets["val"].labels).float().mean().item()
        assert result.history[epoch]["val_accuracy"] == pytest.approx(accuracy, abs=1e-6)
        if accuracy >= best:
            best, kept, kept_epoch = accuracy, {k: v.clone() for k, v in expected.state_dict().items()}, epoch
    assert result.epoch == kept_epoch
    for name, value in result.model.state_dict().items():
        torch.testing.assert_close(value, kept[name], atol=1e-5, rtol=1e-5)


def test_finetuning_learns_with_turned_tiles() -> None:
    tiles = {
        "train": bright_or_dark_tiles(16, 0),
        "val": bright_or_dark_tiles(4, 1),
        "test": bright_or_dark_tiles(8, 2),
    }
    head = new_head(5, 2, torch.Generator().manual_seed(0))
    sets = extract_features(PointBackbone(), tiles)
    before = score(class_probabilities(head, sets["test"].features), sets["test"])["accuracy"]
    steps = []
    result = finetune(
        TurnedPointBackbone(), head, tiles, sets, lr=0.05, epochs=20, batch_size=4, augment=True,
        progress=lambda *a: steps.append(a),
    )  # fmt: skip
    assert before < 0.8
    assert result.test["accuracy"] > 0.9
    assert steps[-1] == (80, 80, "steps")


class TurnedPointBackbone(PointBackbone):
    """`PointBackbone` on whole pixels, where pixel x is mirrored to size - 1 - x, not to size - x."""

    def nucleus_features(self, images: Tensor, xy: Tensor, image_index: Tensor) -> Tensor:
        return super().nucleus_features(images, xy.clamp(max=images.shape[-1] - 1), image_index)


@pytest.mark.parametrize("turn", range(8))
def test_a_turned_tile_reads_the_same_value_from_the_turned_map(turn: int) -> None:
    """At `u = x / size * (W - 1)`, the turned map has the same value as the original, for any point."""
    size = 17
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(turn))
    xy = torch.rand(40, 2, generator=torch.Generator().manual_seed(9)) * size
    batch = TileBatch(images, xy, torch.zeros(40, dtype=torch.int64), torch.zeros(40, dtype=torch.int64))
    done = turn_tiles(batch, torch.tensor([turn]))

    def read(one: TileBatch) -> Tensor:
        return nn.functional.grid_sample(one.images, (2 * one.xy / size - 1)[None, None], align_corners=True)

    torch.testing.assert_close(read(done), read(batch), atol=1e-5, rtol=1e-5)
    assert turn == 0 or not torch.equal(done.images, images)


def test_each_tile_has_its_own_turn() -> None:
    images = torch.randn(3, 3, 8, 8)
    xy = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    batch = TileBatch(images, xy, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    done = turn_tiles(batch, torch.tensor([0, 1, 6]))
    assert done.xy.tolist() == [[1, 2], [7, 2], [6, 1]]  # unchanged; mirrored in x; mirrored in y, then swapped
    assert torch.equal(done.images[0], images[0])
    assert torch.equal(done.images[1], images[1].flip(-1))
    assert torch.equal(done.images[2], images[2].flip(-2).transpose(-1, -2))
