"""Compare the scores of the variants, seed by seed and over all seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.ablation.runs import BOTH, FIXED_20X, FIXED_40X, IMAGE, NUCLEUS, UNTRAINED, Row
from muse_fast.classification.bootstrap import FIGURES, mean_paired_difference
from muse_fast.classification.metrics import Scores

EXPECTED = (
    (BOTH, UNTRAINED),
    (NUCLEUS, UNTRAINED),
    (IMAGE, UNTRAINED),
    (NUCLEUS, IMAGE),
    (BOTH, IMAGE),
    (BOTH, NUCLEUS),
    (BOTH, FIXED_20X),
    (BOTH, FIXED_40X),
    (FIXED_20X, FIXED_40X),
    (FIXED_20X, UNTRAINED),
    (FIXED_40X, UNTRAINED),
)
"""Pairs of which the first variant beats the second in the paper (at 20x), or should, as it has learned."""


def spread(rows: Sequence[Row], mpp: str, figure: str) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return mean, minimum and maximum over the seeds in percent, by variant and classifier."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        of_seeds = [row["scores"][mpp] for row in rows if row["variant"] == variant]
        by_classifier = {name: [100 * one[name][figure] for one in of_seeds] for name in of_seeds[0]}
        found[variant] = {name: (sum(v) / len(v), min(v), max(v)) for name, v in by_classifier.items()}
    return found


def differences(rows: Sequence[Row], mpp: str, figure: str) -> list[Row]:
    """Return by how many points the first variant of each expected pair is above the second, per classifier.

    ``seeds`` has the difference and its 95 % interval for each seed, ``mean`` those of the mean over the seeds: both by
    bootstrap over the patients of the test split, who are the same in all runs.
    """
    of_run = {(row["variant"], row["seed"]): row["scores"][mpp] for row in rows}
    seeds = dict.fromkeys(row["seed"] for row in rows)
    found = []
    for better, worse in EXPECTED:
        pairs = {s: (of_run[better, s], of_run[worse, s]) for s in seeds if {(better, s), (worse, s)} <= of_run.keys()}
        for name in next(iter(pairs.values()))[0] if pairs else ():
            of_seed = {seed: (ours[name], theirs[name]) for seed, (ours, theirs) in pairs.items()}
            found.append(
                {
                    "better": better,
                    "worse": worse,
                    "mpp": mpp,
                    "classifier": name,
                    "figure": figure,
                    "mean": _points(of_seed.values(), figure),
                    "seeds": [{"seed": seed, **_points([pair], figure)} for seed, pair in of_seed.items()],
                }
            )
    return found


def _points(pairs: Iterable[tuple[Scores, Scores]], figure: str) -> dict[str, Any]:
    mean, low, high = mean_paired_difference(list(pairs), figure)
    return {"points": 100 * mean, "ci95": [100 * low, 100 * high]}


def without_counts(row: Row) -> Row:
    """Return the row without the confusion matrices of single patients, which would make reports long."""
    scores = {
        mpp: {name: {figure: one[figure] for figure in FIGURES} for name, one in of_scale.items()}
        for mpp, of_scale in row["scores"].items()
    }
    return row | {"scores": scores}
