"""Folds of patients, and what classifiers are chosen on, trained on and scored on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.model_selection import GroupKFold

from muse_fast.classification.features import NucleusSet, extract_features
from muse_fast.classification.probes import class_probabilities, knn, linear_probe
from muse_fast.classification.ridge import ridge_probe
from muse_fast.classification.splits import Pair, Splits, folds_of_nuclei, patient_folds
from muse_fast.classification.tiles import Tile
from muse_fast.errors import UserError
from tests.support.probe_in_float64 import linear_probe_in_float64


def patients(count: int, seed: int = 0) -> dict[str, int]:
    sizes = np.random.default_rng(seed).lognormal(5, 1, count).astype(int) + 1
    return {f"patient {i}": int(size) for i, size in enumerate(sizes)}


def nuclei_per_fold(fold_of: dict[str, int], nuclei: dict[str, int], folds: int) -> list[int]:
    return [sum(nuclei[name] for name, fold in fold_of.items() if fold == number) for number in range(folds)]


@pytest.mark.parametrize(("count", "folds"), [(83, 5), (10, 5), (7, 7), (31, 2), (2, 2)])
def test_folds_have_nearly_as_many_nuclei(count: int, folds: int) -> None:
    nuclei = patients(count)
    fold_of = patient_folds(nuclei, folds, 0)
    assert fold_of.keys() == nuclei.keys()
    found = nuclei_per_fold(fold_of, nuclei, folds)
    assert min(found) > 0
    # scikit-learn places the largest group into the lightest fold, without a seed.
    groups = np.repeat(np.arange(count), list(nuclei.values()))
    theirs = [len(held_out) for _, held_out in GroupKFold(folds).split(groups, groups=groups)]
    assert max(found) - min(found) <= max(1.2 * (max(theirs) - min(theirs)), 0.02 * sum(found))


def test_folds_depend_on_names_and_seed_only() -> None:
    nuclei = patients(40)
    fold_of = patient_folds(nuclei, 4, 3)
    assert patient_folds(dict(reversed(nuclei.items())), 4, 3) == fold_of
    assert patient_folds(nuclei, 4, 4) != fold_of
    with pytest.raises(UserError, match=r"folds=41: .* nuclei of 40 patients .* choose fewer folds"):
        patient_folds(nuclei, 41, 0)


def tile(slide: str, nuclei: int) -> Tile:
    return Tile(np.zeros((8, 8, 3), np.uint8), np.ones((nuclei, 2), np.float32), np.zeros(nuclei, np.int64), slide)


def test_no_patient_is_in_two_folds() -> None:
    """Slides and images of one patient of TCGA in train and in val; other slides are their own patients."""
    slides = [f"TCGA-A7-A0{i:02d}-{tube}.svs" for i in range(10) for tube in ("01Z-00-DX1", "01Z-00-DX2", "06A-00")]
    slides += [f"local {i}" for i in range(6)] * 2
    tiles = [tile(slide, 1 + i % 5) for i, slide in enumerate(slides)]
    fold = folds_of_nuclei(tiles, 3, 0).tolist()
    rows = iter(fold)
    of_patient: dict[str, set[int]] = {}
    for one in tiles:
        for _ in one.label:
            of_patient.setdefault(one.slide[:12], set()).add(next(rows))
    assert len(of_patient) == 16
    assert all(len(found) == 1 for found in of_patient.values())
    assert set(fold) == {0, 1, 2}


def leaking_sets() -> tuple[dict[str, NucleusSet], torch.Tensor]:
    """Features that name the patient and say nothing about the class, which is random per patient.

    Whoever has seen another nucleus of the patient knows the class; for other patients it is a guess.
    """
    rng = np.random.default_rng(0)
    kind, code = rng.integers(0, 2, 60), rng.normal(size=(60, 16))
    sets = {}
    for split, who in (
        ("train", np.arange(40).repeat(8)),
        ("val", np.arange(40).repeat(2)),
        ("test", np.arange(40, 60).repeat(5)),
    ):
        features = code[who] + 0.01 * rng.normal(size=(len(who), 16))
        sets[split] = NucleusSet(torch.tensor(features).float(), torch.tensor(kind[who]), torch.tensor(who))
    fold_of = patient_folds({str(i): 10 for i in range(40)}, 5, 0)
    both = torch.cat([sets["train"].patients, sets["val"].patients])
    return sets, torch.tensor([fold_of[str(i)] for i in both.tolist()])


def test_planted_leakage_shows_on_val_but_not_on_folds() -> None:
    sets, fold = leaking_sets()
    for splits, leaks in ((Splits(sets), True), (Splits(sets, fold), False)):
        by_knn, linear = knn(splits, 2, (5,)), linear_probe(splits, 2, epochs=8, batch_size=32, lr=0.2)
        ridge = ridge_probe(splits, 2, balanced=True, lambdas=[1e-3])
        for held_out in (by_knn.held_out[5], linear.held_out, ridge.held_out[1e-3]):
            assert (held_out["accuracy"] > 0.75) == leaks
    assert by_knn.held_out[5]["count"] == 400


@pytest.mark.parametrize("standardise", [False, True])
def test_every_nucleus_is_held_out_once_and_pairs_share_no_patient(standardise: bool) -> None:
    sets, fold = leaking_sets()
    splits = Splits(sets, fold, standardise)
    trials = list(splits.trials())
    assert len(trials) == 5
    assert torch.equal(torch.cat([pair.other.patients for pair in trials]), splits.held_out.patients)
    assert torch.equal(torch.cat([pair.other.labels for pair in trials]), splits.held_out.labels)
    for train, other in trials:
        assert not set(train.patients.tolist()) & set(other.patients.tolist())
        assert len(train.labels) + len(other.labels) == 400
        assert (train.features.mean(0).abs().max() < 1e-5) == standardise
    assert splits.fewest_to_train_on == min(len(train.labels) for train, _ in trials)
    train, test = splits.final()
    assert len(train.labels) == 400 and len(test.labels) == 100
    plain = Splits(sets, None, standardise)
    ((train, other),) = plain.trials()
    assert len(train.labels) == 320 == plain.fewest_to_train_on and len(other.labels) == 80
    assert torch.equal(other.labels, plain.held_out.labels)


def test_standardising_uses_only_what_is_trained_on() -> None:
    rng = np.random.default_rng(0)
    rows = [torch.tensor(rng.normal(3, 2, (count, 4))).float() for count in (50, 20)]
    rows[0][:, 0] = 3.0  # a constant feature stays finite
    pair = Pair(*(NucleusSet(one, torch.zeros(len(one)).long(), torch.zeros(len(one)).long()) for one in rows))
    done = pair.standardised()
    expected = (rows[1].double() - rows[0].double().mean(0)) / rows[0].double().std(0, correction=0)
    torch.testing.assert_close(done.other.features[:, 1:].double(), expected[:, 1:], atol=1e-5, rtol=1e-5)
    assert all(torch.isfinite(one.features).all() for one in done)


def overlapping(seed: int, count: int) -> NucleusSet:
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, count, p=[0.5, 0.3, 0.2])
    features = 0.6 * np.random.default_rng(9).normal(size=(3, 8))[labels] + rng.normal(size=(count, 8))
    return NucleusSet(torch.tensor(features).float(), torch.tensor(labels), torch.tensor(rng.integers(0, 30, count)))


def test_the_choice_of_folds_is_applied_to_train_and_val() -> None:
    """k and epoch from written-out folds; then one classifier of train and val is scored on test."""
    sets = {
        split: overlapping(i, count) for i, (split, count) in enumerate((("train", 150), ("val", 60), ("test", 90)))
    }
    who = torch.cat([sets["train"].patients, sets["val"].patients])
    splits = Splits(sets, who % 3)
    both = NucleusSet.joined([sets["train"], sets["val"]])
    parts = [(both[who % 3 != number], both[who % 3 == number]) for number in range(3)]

    result = knn(splits, 3, (1, 5, 20, 500))
    hits = {k: sum(knn(Splits({"train": a, "val": b, "test": b}), 3, (k,)).test[k]["accuracy"] * len(b.labels)
                   for a, b in parts) for k in (1, 5, 20)}  # fmt: skip
    assert result.held_out.keys() == hits.keys() and result.skipped == (500,)
    assert {k: s["accuracy"] * 210 for k, s in result.held_out.items()} == pytest.approx(hits)
    assert (
        list(result.test) == [result.k_chosen] == [max(hits, key=lambda k: hits[k])] and result.k_best_on_test is None
    )
    alone = knn(Splits({"train": both, "val": sets["val"], "test": sets["test"]}), 3, (result.k_chosen,))
    assert result.test == alone.test

    linear = linear_probe(splits, 3, seed=2, epochs=12, batch_size=32, lr=0.05)
    total = np.zeros(12)
    for a, b in parts:
        for epoch in range(12):
            weight, bias, _ = head_in_float64(a, epoch)
            total[epoch] += (b.features.double().numpy() @ weight.T + bias).argmax(1).__eq__(b.labels.numpy()).sum()
    assert linear.epoch == max(range(12), key=lambda epoch: (total[epoch], epoch))
    assert linear.held_out["accuracy"] == pytest.approx(total.max() / 210)
    weight, bias, _ = head_in_float64(both, linear.epoch)
    np.testing.assert_allclose(linear.head.weight.detach(), weight, atol=1e-5)
    expected = (sets["test"].features.double().numpy() @ weight.T + bias).argmax(1)
    assert class_probabilities(linear.head, sets["test"].features).argmax(1).tolist() == expected.tolist()


def head_in_float64(train: NucleusSet, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The head after ``epoch`` of a schedule of 12."""
    return linear_probe_in_float64({"train": train, "val": train}, 2, 0.05, 12, 32, stop_after=epoch)


def test_patients_have_one_number_in_all_splits() -> None:
    class Nothing(torch.nn.Module):
        def nucleus_features(self, images: torch.Tensor, xy: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return xy

    tiles = {"train": [tile("b", 2), tile("TCGA-A7-A0DB-01A", 1)], "val": [tile("TCGA-A7-A0DB-01Z", 1), tile("a", 2)]}
    sets = extract_features(Nothing(), tiles)
    assert sets["train"].patients.tolist() == [2, 2, 0]
    assert sets["val"].patients.tolist() == [0, 1, 1]
