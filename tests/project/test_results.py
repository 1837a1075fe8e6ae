"""The figures of README's first result are those of the committed report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.ablation import compare, runs

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "bench/results/2026-11-29-cpu-ablation.json"
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


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(REPORT.read_text())


def section() -> str:
    return (ROOT / "README.md").read_text().split("## What it learns")[1].split("\n## ")[0]


def table() -> dict[str, list[str]]:
    """Cells of README's table by what the network was trained with, which is the first column."""
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section().splitlines() if line.startswith("| ")
    ]
    return {first: cells for first, *cells in lines[1:]}


def difference(report: dict[str, Any], better: str, worse: str, classifier: str) -> str:
    (found,) = (
        one["mean"]
        for one in report["differences"]
        if [one[key] for key in ("better", "worse", "classifier", "mpp", "figure")]
        == [better, worse, classifier, SCALE, FIGURE]
    )
    low, high = found["ci95"]
    return f"{found['points']:+.1f} [{low:+.1f}, {high:+.1f}]"


def test_the_table_of_the_readme(report: dict[str, Any]) -> None:
    spread = compare.spread(report["results"], SCALE, FIGURE)
    shown = table()
    assert list(shown) == list(VARIANT_OF)
    for name, cells in shown.items():
        variant = VARIANT_OF[name]
        found = ["{:.1f} ({:.1f} .. {:.1f})".format(*spread[variant][classifier]) for classifier in CLASSIFIERS]
        gains = variant in (runs.BOTH, runs.NUCLEUS, runs.IMAGE)
        for classifier in COMPARED:
            found.append(difference(report, variant, runs.UNTRAINED, classifier) if gains else "")
        assert cells == found, name


@pytest.mark.parametrize("pair", [(runs.BOTH, runs.NUCLEUS), (runs.NUCLEUS, runs.IMAGE)])
@pytest.mark.parametrize("classifier", COMPARED)
def test_the_order_of_the_losses(report: dict[str, Any], pair: tuple[str, str], classifier: str) -> None:
    assert difference(report, *pair, classifier) in section()
