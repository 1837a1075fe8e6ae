"""The ridge probe against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from muse_fast.classification.features import NucleusSet
from muse_fast.classification.ridge import LAMBDAS, LEAST_LAMBDA, predictions, ridge, ridge_probe
from muse_fast.classification.splits import Pair, Splits
from muse_fast.errors import UserError


def nuclei(count: int, seed: int, dim: int = 12) -> NucleusSet:
    """Three overlapping, unbalanced classes; features of different scales, far from 0, and one that is constant."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(3, dim))
    labels = rng.choice(3, count, p=[0.65, 0.3, 0.05])
    features = (0.5 * centres[labels] + rng.normal(size=(count, dim))) * np.logspace(-2, 2, dim) + 100
    features[:, 3] = 7.0
    return NucleusSet(torch.tensor(features).float(), torch.tensor(labels), torch.tensor(rng.integers(0, 9, count)))


def three(counts: tuple[int, int, int] = (400, 150, 200)) -> dict[str, NucleusSet]:
    return {
        split: nuclei(count, i) for i, (split, count) in enumerate(zip(("train", "val", "test"), counts, strict=True))
    }


def of_scikit_learn(train: NucleusSet, value: float, balanced: bool) -> tuple[Ridge, StandardScaler]:
    """Its penalty is on the sum over nuclei, ours on the mean."""
    scaler = StandardScaler().fit(train.features.double().numpy())
    x, labels = scaler.transform(train.features.double().numpy()), train.labels.numpy()
    weight = compute_sample_weight("balanced" if balanced else None, labels)
    return Ridge(alpha=value * len(x), solver="svd").fit(x, np.eye(3)[labels], sample_weight=weight), scaler


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("count", [400, 7])  # 7: fewer nuclei than features
def test_outputs_are_those_of_scikit_learn(balanced: bool, count: int) -> None:
    splits = Splits(three((count, 150, 200)))
    pair = splits.final()
    for value, found in zip(LAMBDAS, predictions(pair, 3, LAMBDAS, balanced=balanced), strict=True):
        theirs, scaler = of_scikit_learn(pair.train, value, balanced)
        expected = theirs.predict(scaler.transform(pair.other.features.double().numpy()))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("balanced", [False, True])
def test_classes_are_those_of_its_classifier(balanced: bool) -> None:
    pair = Splits(three()).final()
    train, test = pair.standardised()
    theirs = RidgeClassifier(alpha=0.1 * 400, class_weight="balanced" if balanced else None)
    theirs.fit(train.features.double().numpy(), train.labels.numpy())
    (found,) = predictions(pair, 3, [0.1], balanced=balanced)
    expected = theirs.predict(test.features.double().numpy())
    assert found.argmax(1).tolist() == expected.tolist()
    assert (
        np.bincount(expected, minlength=3)[2] > 20
    ) == balanced  # the rare class, which the plain probe hardly finds


def test_absent_classes_and_one_nucleus() -> None:
    features, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2] * 10)
    for balanced in (False, True):
        ((weight, intercept),) = ridge(features, labels, 4, [0.1], balanced=balanced)
        assert weight[:, [1, 3]].abs().max() < 1e-12 and intercept[[1, 3]].abs().max() < 1e-12
        ((weight, intercept),) = ridge(features[:1], labels[:1], 3, [0.1], balanced=balanced)
        assert weight.abs().max() < 1e-12 and intercept.tolist() == [1, 0, 0]


@pytest.mark.parametrize(("balanced", "figure"), [(False, "accuracy"), (True, "balanced_accuracy")])
def test_lambda_is_chosen_on_val_and_test_is_scored_with_it(balanced: bool, figure: str) -> None:
    sets = three((60, 150, 200))
    lambdas = (1e-4, 0.03, 1.0, 30.0)
    result = ridge_probe(Splits(sets), 3, balanced=balanced, lambdas=lambdas)
    assert tuple(result.held_out) == lambdas
    best = max(scores[figure] for scores in result.held_out.values())
    assert result.chosen == max(value for value, scores in result.held_out.items() if scores[figure] == best)
    assert len({scores[figure] for scores in result.held_out.values()}) > 2  # the choice matters
    theirs, scaler = of_scikit_learn(sets["train"], result.chosen, balanced)
    predicted = theirs.predict(scaler.transform(sets["test"].features.double().numpy())).argmax(1)
    truth = sets["test"].labels.numpy()
    assert result.test["accuracy"] == pytest.approx((predicted == truth).mean(), abs=1e-12)
    assert result.test["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted), abs=1e-12)


def test_the_least_lambda_is_solved_although_features_repeat() -> None:
    """Copies of one feature make the normal equations singular."""
    train = nuclei(300, 0)
    copies = NucleusSet(train.features[:, :1].repeat(1, 200), train.labels, train.patients)
    ((weight, intercept),) = ridge(
        Pair(copies, copies).standardised().train.features, copies.labels, 3, [LEAST_LAMBDA], balanced=False
    )
    x = copies.features[:, 0].double()
    x = ((x - x.mean()) / x.std(correction=0)).numpy()
    expected = Ridge(alpha=1e-12).fit(x[:, None], np.eye(3)[copies.labels])
    np.testing.assert_allclose(weight.sum(0), expected.coef_[:, 0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(intercept, expected.intercept_, rtol=1e-3, atol=1e-6)


def test_infinite_features_are_refused() -> None:
    sets = three()
    sets["train"].features[5, 2] = float("inf")
    with pytest.raises(UserError, match="features are not finite"):
        ridge_probe(Splits(sets), 3, balanced=False)
