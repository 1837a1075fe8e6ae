"""The figures of README's first result are those of the committed reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.ablation import compare, runs

ROOT = Path(__file__).parents[2]
REPORTS = {1600: "2026-11-29-cpu-ablation-1600.json", 400: "2026-11-29-cpu-ablation.json"}  # by number of steps
SCALE, FIGURE = "0.5", "balanced_accuracy"
CLASSIFIERS = ("knn raw", "knn standardised", "balanced ridge")
COMPARED = ("knn raw", "balanced ridge")  # with the untrained network
VARIANT_OF = {
    "both losses": runs.BOTH,
    "nucleus loss": runs.NUCLEUS,
    "image loss": runs.IMAGE,
    "no training": runs.UNTRAINED,
    "the classes (supervised)": runs.SUPERVISED,
}


def report_of(steps: int) -> dict[str, Any]:
    return json.loads((ROOT / "bench/results" / REPORTS[steps]).read_text())


def section() -> str:
    return (ROOT / "README.md").read_text().split("## What it learns")[1].split("\n## ")[0]


def rows() -> list[list[str]]:
    """Cells of README's table."""
    lines = [line for line in section().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


def difference(report: dict[str, Any], better: str, worse: str, classifier: str) -> str:
    return of_points(found(report, better, worse, classifier)["mean"])


def found(report: dict[str, Any], better: str, worse: str, classifier: str) -> dict[str, Any]:
    wanted = [better, worse, classifier, SCALE, FIGURE]
    keys = ("better", "worse", "classifier", "mpp", "figure")
    (one,) = (row for row in report["differences"] if [row[key] for key in keys] == wanted)
    return one


def of_points(one: dict[str, Any]) -> str:
    low, high = one["ci95"]
    return f"{one['points']:+.1f} [{low:+.1f}, {high:+.1f}]"


def test_the_table_of_the_readme() -> None:
    shown = rows()
    assert [name for _, name, *_ in shown].count("both losses") == 2
    for steps, name, *cells in shown:
        report, variant = report_of(int(steps.replace(",", "")) or 1600), VARIANT_OF[name]
        spread = compare.spread(report["results"], SCALE, FIGURE)[variant]
        expected = ["{:.1f} ({:.1f} .. {:.1f})".format(*spread[classifier]) for classifier in CLASSIFIERS]
        gains = variant in (runs.BOTH, runs.NUCLEUS, runs.IMAGE)
        for classifier in COMPARED:
            expected.append(difference(report, variant, runs.UNTRAINED, classifier) if gains else "")
        assert cells == expected, (steps, name)
        assert {row["seed"] for row in report["results"]} == {0, 1, 2}


def test_every_seed_gains() -> None:
    """What README says of the longer runs: all intervals are above 0, by each classifier."""
    for classifier in CLASSIFIERS:
        for seed in found(report_of(1600), runs.BOTH, runs.UNTRAINED, classifier)["seeds"]:
            assert seed["ci95"][0] > 0
            assert classifier != "knn raw" or of_points(seed) in section().replace("\n  ", " ")


@pytest.mark.parametrize("pair", [(runs.BOTH, runs.NUCLEUS), (runs.NUCLEUS, runs.IMAGE)])
@pytest.mark.parametrize("classifier", COMPARED)
def test_the_order_of_the_losses(pair: tuple[str, str], classifier: str) -> None:
    assert difference(report_of(400), *pair, classifier) in section().replace("\n  ", " ")
