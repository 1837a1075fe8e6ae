"""Which nuclei a classifier is chosen on, trained on and scored on.

Normally its settings (k, lambda, epoch) are chosen on the split val. A val of a few images makes that a lottery, so
train and val can be joined instead and divided into folds of whole patients: every candidate is trained on all folds
but one and predicts that one; the candidate with the best predictions over all folds is trained on train and val, and
scored on test.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from muse_fast.classification.features import NucleusSet
from muse_fast.classification.tiles import Tile
from muse_fast.errors import UserError
from muse_fast.sources.names import patient_or_slide


class Pair(NamedTuple):
    """Nuclei to train on, and others to predict."""

    train: NucleusSet
    other: NucleusSet

    def standardised(self) -> Pair:
        """Subtract the mean of ``train`` from both and divide by its standard deviation, per feature."""
        mean, std = self.train.features.mean(0), self.train.features.std(0, correction=0).clamp_min(1e-6)
        return Pair(*(NucleusSet((one.features - mean) / std, one.labels, one.patients) for one in self))


@dataclass(frozen=True, slots=True)
class Splits:
    """The nuclei of an evaluation.

    Args:
        sets: train, val and test.
        fold: ``[M + V]`` int64, fold of every nucleus of train, then of val; None: settings are chosen on val.
        standardise: standardise every `Pair`.
    """

    sets: Mapping[str, NucleusSet]
    fold: Tensor | None = None
    standardise: bool = False

    def trials(self) -> Iterator[Pair]:
        """Yield what settings are chosen on: (train, val), or for each fold (all others, this one)."""
        if self.fold is None:
            yield self._ready(Pair(self.sets["train"], self.sets["val"]))
            return
        both = self._train_and_val()
        for number in self.fold.unique().tolist():
            here = self.fold == number
            yield self._ready(Pair(both[~here], both[here]))

    @property
    def held_out(self) -> NucleusSet:
        """The nuclei that `trials` predict, in that order; features are never standardised here."""
        return self.sets["val"] if self.fold is None else self._train_and_val()[self.fold.argsort(stable=True)]

    @property
    def fewest_to_train_on(self) -> int:
        """Number of nuclei to train on in the smallest of the trials."""
        count = len(self.sets["train"].labels)
        return count if self.fold is None else len(self.fold) - int(self.fold.bincount().max())

    def final(self) -> Pair:
        """Return (train, test), or with folds (train and val, test)."""
        train = self.sets["train"] if self.fold is None else self._train_and_val()
        return self._ready(Pair(train, self.sets["test"]))

    def _train_and_val(self) -> NucleusSet:
        return NucleusSet.joined([self.sets["train"], self.sets["val"]])

    def _ready(self, pair: Pair) -> Pair:
        return pair.standardised() if self.standardise else pair


def patient_folds(nuclei: Mapping[str, int], folds: int, seed: int) -> dict[str, int]:
    """Divide patients into folds of nearly as many nuclei: patient -> fold 0, 1, ...

    Patients are placed one by one into the fold with the fewest nuclei: those with more nuclei first, in classes of
    powers of two, and within a class in an order drawn from the seed and the name. So neither the order of the patients
    nor that of their images matters.

    Raises:
        UserError: there are fewer patients than folds.
    """
    if len(nuclei) < folds:
        raise UserError(
            f"folds={folds}: train and val have nuclei of {len(nuclei)} patients (a slide counts as one if its patient "
            "is unknown); choose fewer folds, or folds=0 to choose settings on val"
        )

    def place_in_order(name: str) -> tuple[int, bytes]:
        return -nuclei[name].bit_length(), hashlib.sha256(f"{seed} {name}".encode()).digest()

    total = [0] * folds
    fold_of = {}
    for name in sorted(nuclei, key=place_in_order):
        fold_of[name] = total.index(min(total))
        total[fold_of[name]] += nuclei[name]
    return fold_of


def nuclei_of_patients(tiles: Iterable[Tile]) -> Counter[str]:
    """Number of nuclei in ``tiles`` by patient; a slide counts as one if its patient is unknown."""
    nuclei: Counter[str] = Counter()
    for tile in tiles:
        nuclei[patient_or_slide(tile.slide)] += len(tile.label)
    return nuclei


def folds_of_nuclei(tiles: Sequence[Tile], folds: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """``[N]`` int64, fold of every nucleus of ``tiles``, see `patient_folds`."""
    fold_of = patient_folds(nuclei_of_patients(tiles), folds, seed)
    of_tile = torch.tensor([fold_of[patient_or_slide(tile.slide)] for tile in tiles])
    return of_tile.repeat_interleave(torch.tensor([len(tile.label) for tile in tiles])).to(device)
