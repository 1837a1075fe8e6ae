"""KNN and linear probe compared with independent implementations, prediction by prediction, on real nuclei."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import muse_fast
from muse_fast.classification.features import NucleusSet, extract_features
from muse_fast.classification.probes import (
    KNN_NEIGHBOURS,
    class_probabilities,
    knn_probabilities,
    linear_probe,
    step_over_stable,
)
from muse_fast.classification.splits import Splits
from muse_fast.classification.tiles import cut_tiles, tiles_by_split
from muse_fast.models.timm.backbone import load_timm
from muse_fast.sources import open_source
from tests.support.probe_in_float64 import linear_probe_in_float64
from tests.support.thin import thin_networks

IMAGES = {"train": 8, "val": 2, "test": 4}
Sets = dict[str, NucleusSet]


@pytest.fixture(scope="module")
def real(shared_data: Path) -> dict[str, Sets]:
    """Features of nuclei of some BRCA-M2C images by two networks, raw and standardised."""
    left = dict(IMAGES)
    images = []
    for image in open_source(f"brcam2c:{shared_data / 'brcam2c'}"):
        if left.get(image.split, 0):
            left[image.split] -= 1
            images.append(image)
    tiles = tiles_by_split(images, partial(cut_tiles, size=96))
    torch.manual_seed(2025)
    with thin_networks():
        ours = extract_features(muse_fast.load_backbone(None, "random:vit_tiny"), tiles)
    theirs = extract_features(load_timm("timm:resnet10t", image_size=96, align_corners=True).backbone, tiles)
    assert len(ours["train"].labels) > 3 * max(KNN_NEIGHBOURS)
    return {
        "vit_tiny": ours,
        "vit_tiny, standardised": standardised(ours),
        "resnet10t": theirs,
        "resnet10t, standardised": standardised(theirs),
    }


def standardised(sets: Sets) -> Sets:
    """By mean and standard deviation of train."""
    mean, std = sets["train"].features.mean(0), sets["train"].features.std(0, correction=0).clamp_min(1e-6)
    return {name: NucleusSet((one.features - mean) / std, one.labels, one.patients) for name, one in sets.items()}


def knn_of_scikit_learn(train: Tensor, labels: Tensor, queries: Tensor, k: int) -> list[int]:
    """scikit-learn's distance is 1 - cosine, so these weights are the published ones."""
    classifier = KNeighborsClassifier(
        k, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    classifier.fit(train.double().numpy(), labels.numpy())
    return classifier.predict(queries.double().numpy()).tolist()


@pytest.mark.parametrize("features", ["vit_tiny", "vit_tiny, standardised", "resnet10t", "resnet10t, standardised"])
def test_knn_agrees_with_scikit_learn_on_real_nuclei(real: dict[str, Sets], features: str) -> None:
    train, test = real[features]["train"], real[features]["test"]
    ours = knn_probabilities(train.features, train.labels, test.features, KNN_NEIGHBOURS, num_classes=3)
    answers = set()
    for k in KNN_NEIGHBOURS:
        assert ours[k].argmax(1).tolist() == knn_of_scikit_learn(train.features, train.labels, test.features, k), k
        answers.add(tuple(ours[k].argmax(1).tolist()))
    assert len(answers) > 2  # k matters, so a wrong one would show


@pytest.mark.parametrize("seed", range(8))
def test_knn_agrees_with_scikit_learn_if_neighbours_tie(seed: int) -> None:
    """Each row has many copies, all of one class: k ends inside a tie, and any choice among them is right."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(60, 5, generator=generator)
    kinds = torch.randint(4, (60,), generator=generator)
    copies = torch.randint(60, (700,), generator=generator)
    queries = torch.randn(300, 5, generator=generator)
    ours = knn_probabilities(rows[copies], kinds[copies], queries, KNN_NEIGHBOURS, num_classes=4, chunk=128)
    for k in KNN_NEIGHBOURS:
        assert ours[k].argmax(1).tolist() == knn_of_scikit_learn(rows[copies], kinds[copies], queries, k), k


def test_knn_agrees_with_scikit_learn_if_votes_tie() -> None:
    """Two classes at the same cosine, and a zero query: the lowest class with the most votes wins."""
    train = torch.eye(4).repeat(3, 1)
    labels = torch.tensor([3, 1, 2, 0]).repeat(3)
    queries = torch.tensor([[1.0, 1, 0, 0], [0, 2, 2, 0], [1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    ours = knn_probabilities(train, labels, queries, (12,), num_classes=4)[12].argmax(1).tolist()
    assert ours == [1, 1, 0, 0, 0] == knn_of_scikit_learn(train, labels, queries, 12)
    more = torch.cat([labels[:-1], torch.tensor([2])])
    undirected = queries[-1:]
    assert knn_probabilities(train, more, undirected, (12,), num_classes=4)[12].argmax(1).tolist() == [2]
    assert knn_of_scikit_learn(train, more, undirected, 12) == [2]


@pytest.mark.parametrize("features", ["vit_tiny, standardised", "resnet10t", "resnet10t, standardised"])
def test_linear_probe_agrees_with_float64_on_real_nuclei(real: dict[str, Sets], features: str) -> None:
    sets = real[features]
    result = linear_probe(Splits(sets), 3)
    assert result.step < 1
    weight, bias, epoch = linear_probe_in_float64(sets, 2025, 0.01, 100, 256)
    assert result.epoch == epoch
    for split in ("val", "test"):
        expected = (sets[split].features.double().numpy() @ weight.T + bias).argmax(1)
        assert class_probabilities(result.head, sets[split].features).argmax(1).tolist() == expected.tolist()
    assert len(np.unique(expected)) > 1


def test_an_unstable_step_is_reported(real: dict[str, Sets]) -> None:
    """The untrained ViT's features are so large that the published step oscillates, in every implementation."""
    sets = real["vit_tiny"]
    x = sets["train"].features.double().numpy()
    curvature = np.linalg.eigvalsh(x.T @ x / len(x))[-1] / 3
    assert step_over_stable(sets["train"].features, 3, 0.01) == pytest.approx(0.01 * curvature / 3.8, rel=1e-3)
    assert 0.01 * curvature / 3.8 > 2


@pytest.mark.parametrize(("ratio", "settles"), [(0.5, True), (4.0, False)])
def test_two_precisions_diverge_beyond_the_stable_step(ratio: float, settles: bool) -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(3, 6))
    sets = {}
    for split, count in (("train", 768), ("val", 200), ("test", 200)):
        labels = rng.integers(0, 3, count)
        features = centres[labels] + rng.normal(size=(count, 6)) * 2
        sets[split] = NucleusSet(torch.tensor(features).float(), torch.tensor(labels), torch.zeros(count).long())
    lr = 0.01 * ratio / step_over_stable(sets["train"].features, 3, 0.01)
    result = linear_probe(Splits(sets), 3, lr=lr, epochs=60)
    assert result.step == pytest.approx(ratio, rel=1e-5)
    weight, _, _ = linear_probe_in_float64(sets, 2025, lr, 60, 256)
    apart = np.abs(result.head.weight.detach().numpy() - weight).max()
    assert (apart < 1e-3) == settles
