"""Scores of point sets: aggregation, empty sets, intervals, invariances, differences of protocols, real nuclei."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from muse_fast.errors import UserError
from muse_fast.images.points import Points
from muse_fast.scoring.protocols import PROTOCOLS
from muse_fast.scoring.scores import Scores, evaluate, evaluate_all, figures_table, scores_table
from muse_fast.sources import open_source

EMPTY = Points(np.zeros((0, 2)), np.zeros(0, np.int64), np.zeros(0))


def points(xy: object, label: object, score: object = None) -> Points:
    confidence = None if score is None else np.array(score)
    return Points(np.array(xy, np.float64).reshape(-1, 2), np.array(label, np.int64), confidence)


def jittered(rng: np.random.Generator, truth: Points, jitter: float, lost: float, side: float, classes: int) -> Points:
    """``truth`` with jitter, a share of its points removed, and as many random points added."""
    count = len(truth.xy)
    kept = rng.permutation(count)[int(lost * count) :]
    added = rng.uniform(0, side, (count - len(kept), 2))
    xy = np.concatenate([truth.xy[kept] + rng.normal(0, jitter, (len(kept), 2)), added])
    label = np.concatenate([truth.label[kept], rng.integers(0, classes, len(added))])
    order = rng.permutation(len(xy))
    return Points(xy[order], label[order], rng.random(len(xy)))


def images(seed: int, count: int = 5, classes: int = 3) -> tuple[list[Points], list[Points]]:
    rng = np.random.default_rng(seed)
    truths = [points(rng.uniform(0, 60, (n, 2)), rng.integers(0, classes, n)) for n in rng.integers(0, 40, count)]
    return [jittered(rng, truth, 1.5, 0.2, 60, classes) for truth in truths], truths


# ------------------------------------------------------------------------------------------------------------- empty


@pytest.mark.parametrize("name", PROTOCOLS)
def test_empty_sets(name: str) -> None:
    one = points([(5, 5)], [0], [0.5])
    nothing = evaluate([EMPTY], [EMPTY], 0.5, 2, name).detection
    missed = evaluate([EMPTY], [one], 0.5, 2, name).detection
    invented = evaluate([one], [EMPTY], 0.5, 2, name).detection
    found = evaluate([one], [one], 0.5, 2, name).detection
    assert (nothing.tp, nothing.fp, nothing.fn) == (0, 0, 0)
    assert (missed.tp, missed.fp, missed.fn, missed.recall, missed.f1) == (0, 0, 1, 0, 0)
    assert (invented.tp, invented.fp, invented.fn, invented.precision, invented.f1) == (0, 1, 0, 0, 0)
    assert (found.tp, found.fp, found.fn) == (1, 0, 0)
    assert found.f1 == pytest.approx(1, abs=1e-6)
    # A figure of 0 / 0 is 1 in MCSpatNet's code, 0 elsewhere.
    empty = 1.0 if name == "mcspatnet" else 0.0
    assert (nothing.precision, nothing.recall, nothing.f1) == (empty, empty, empty)
    assert (missed.precision, invented.recall) == (empty, empty)


def test_an_absent_class_in_the_mean() -> None:
    """Of three classes, the second does not occur and the third is only predicted."""
    prediction, truth = points([(5, 5), (20, 20)], [0, 2], [0.5, 0.5]), points([(5, 5)], [0])
    scores, _ = evaluate_all([prediction], [truth], 0.5, 3, draws=0)
    means = {name: one.mean_f1 for name, one in scores.items()}
    expected = {"ocelot": 1 / 3, "mcspatnet": 2 / 3, "promptnucseg": 1 / 3, "max-matching": 1 / 3}
    assert means == pytest.approx({**expected, "puma": 1 / 2, "hovernet": 1}, abs=1e-6)


def test_puma_averages_over_all_files_even_without_the_class() -> None:
    """Class 0 is found in the first of four files and does not occur in the others: 1/4, but 1 with sums."""
    there, absent = points([(5, 5)], [0], [0.5]), points([(5, 5)], [1], [0.5])
    truths = [there, absent, absent, absent]
    puma = evaluate(truths, truths, 0.5, 2, "puma")
    assert [one.f1 for one in puma.classes] == [0.25, 0.75]
    assert (puma.mean_f1, puma.detection.f1) == (0.5, 1.0)
    assert [one.tp for one in puma.classes] == [1, 3]
    others = [evaluate(truths, truths, 0.5, 2, name) for name in PROTOCOLS if name != "puma"]
    assert all(one.mean_f1 == pytest.approx(1, abs=1e-6) for one in others)


def test_ocelot_rounds_before_averaging() -> None:
    predictions = points([(10 * i, 0) for i in range(7)], [0, 0, 0, 0, 1, 1, 1], np.full(7, 0.5))
    truths = points([(10 * i, 0) for i in range(5)], [0, 0, 0, 1, 1])
    one = evaluate([predictions], [truths], 0.2, 2)
    # Class 0: 3 of 4 predictions are right, 3 of 3 nuclei found. Class 1: 1 of 3, 1 of 2.
    assert [score.f1 for score in one.classes] == [round(6 / 7, 4), round(2 / 5, 4)]
    assert one.mean_f1 == (0.8571 + 0.4) / 2


def test_each_image_has_its_own_scale() -> None:
    apart = points([(5, 0)], [0], [0.5]), points([(0, 0)], [0])
    both = [apart[0]] * 2, [apart[1]] * 2
    assert evaluate(*both, (0.5, 0.7), 1, "promptnucseg").detection.tp == 1  # 2.5 and 3.5 um
    assert evaluate(*both, 0.5, 1, "promptnucseg").detection.tp == 2
    assert evaluate(*both, 0.5, 1, "promptnucseg", radius_um=2.4).detection.tp == 0


# --------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", PROTOCOLS)
@settings(max_examples=settings.default.max_examples // 10)
@given(seed=st.integers(0, 2**16))
def test_scores_do_not_depend_on_order_labels_or_origin(name: str, seed: int) -> None:
    predictions, truths = images(seed)
    base = evaluate(predictions, truths, 0.5, 3, name)

    order = np.random.default_rng(seed).permutation(len(truths))
    shuffled = evaluate([predictions[i] for i in order], [truths[i] for i in order], 0.5, 3, name)
    assert flat(shuffled) == pytest.approx(flat(base), abs=1e-12)

    classes = np.array([2, 0, 1])  # class c becomes classes[c]
    renamed = evaluate(
        [Points(one.xy, classes[one.label], one.score) for one in predictions],
        [Points(one.xy, classes[one.label], one.score) for one in truths],
        0.5,
        3,
        name,
    )
    assert [renamed.classes[c] for c in classes] == list(base.classes)
    assert renamed.mean_f1 == pytest.approx(base.mean_f1, abs=1e-12)
    assert renamed.detection == base.detection

    # Whole pixels, so that rounding does not change; exact ties are broken only by order.
    moved = [
        [Points(one.xy + np.array([64, 128]), one.label, one.score) for one in side] for side in (predictions, truths)
    ]
    assert flat(evaluate(*moved, 0.5, 3, name)) == pytest.approx(flat(base), abs=1e-12)


@pytest.mark.parametrize("name", sorted(set(PROTOCOLS) - {"hovernet"}))
def test_a_far_false_positive_lowers_only_precision(name: str) -> None:
    predictions, truths = images(1)
    before = evaluate(predictions, truths, 0.5, 3, name)
    first = predictions[0]
    with_far = Points(
        np.concatenate([first.xy, [[900.0, 900.0]]]), np.append(first.label, 1), np.append(first.score, 1)
    )
    after = evaluate([with_far, *predictions[1:]], truths, 0.5, 3, name)
    for c in (0, 2):
        assert after.classes[c] == before.classes[c]
    for new, old in ((after.classes[1], before.classes[1]), (after.detection, before.detection)):
        assert (new.tp, new.fp, new.fn, new.recall) == (old.tp, old.fp + 1, old.fn, old.recall)
        assert new.precision < old.precision
        assert new.f1 < old.f1


def test_in_hovernet_a_far_false_positive_can_undo_pairs() -> None:
    """A far prediction opposite a surplus of true points shifts all pairs: a flaw of that rule."""
    truths = points([(0, 0), (4, 0), (8, 0), (12, 0)], [0, 0, 0, 0])
    near = [(0.5, 0), (4.5, 0), (8.5, 0)]
    before = evaluate([points(near, [0, 0, 0])], [truths], 1.0, 1, "hovernet").detection
    after = evaluate([points([(-4, 0), *near], [0, 0, 0, 0])], [truths], 1.0, 1, "hovernet").detection
    assert (before.tp, after.tp) == (3, 0)


def test_no_rule_finds_more_pairs_than_the_maximum() -> None:
    for seed in range(20):
        predictions, truths = images(seed)
        scores, _ = evaluate_all(predictions, truths, 0.5, 3, radius_um=3.0, draws=0)
        most = scores["max-matching"].detection.tp
        assert all(one.detection.tp <= most for one in scores.values())


def flat(scores: Scores) -> list[float]:
    rows = [dataclasses.astuple(score)[:-1] for score in (*scores.classes, scores.detection)]
    return [*(value for row in rows for value in row), scores.mean_f1]


# ---------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("name", PROTOCOLS)
def test_intervals_are_percentiles_over_redrawn_images(name: str) -> None:
    """Compared with scoring the points of images repeated as often as drawn."""
    predictions, truths = images(5, count=6)
    one = evaluate(predictions, truths, 0.5, 3, name, draws=50, seed=1)
    drawn = []
    for times in np.random.default_rng(1).multinomial(6, [1 / 6] * 6, size=50):
        chosen = np.repeat(np.arange(6), times)
        again = evaluate([predictions[i] for i in chosen], [truths[i] for i in chosen], 0.5, 3, name)
        drawn.append([*(score.f1 for score in again.classes), again.detection.f1, again.mean_f1])
    expected = np.quantile(drawn, (0.025, 0.975), axis=0).T
    found = [*(score.f1_ci95 for score in one.classes), one.detection.f1_ci95, one.mean_f1_ci95]
    np.testing.assert_allclose(np.array(found), expected, atol=1e-12)
    assert np.ptp(expected, axis=1).min() > 0.02


def test_intervals_follow_the_seed_and_do_not_change_scores() -> None:
    predictions, truths = images(5, count=6)
    plain = evaluate(predictions, truths, 0.5, 3)
    first, again, other = (evaluate(predictions, truths, 0.5, 3, draws=200, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert flat(first) == flat(plain)
    assert plain.mean_f1_ci95 is None
    alone = evaluate(predictions[:1], truths[:1], 0.5, 3, draws=50)
    assert alone.mean_f1_ci95 == (alone.mean_f1, alone.mean_f1)


# ------------------------------------------------------------------------------------------- differences of protocols


def test_the_protocol_changes_f1_by_more_than_ten_points() -> None:
    """900 nuclei in 500 x 500 px, an eighth removed and as many added, 3 px of jitter, a radius of 6 px."""
    rng = np.random.default_rng(0)
    truths = [points(rng.uniform(0, 500, (900, 2)), np.zeros(900)) for _ in range(10)]
    predictions = [jittered(rng, truth, 3.0, 0.12, 500, 1) for truth in truths]
    scores, _ = evaluate_all(predictions, truths, 0.5, 1, radius_um=3.0, draws=0)
    f1 = {name: 100 * one.detection.f1 for name, one in scores.items()}
    assert f1["hovernet"] < f1["puma"] < f1["mcspatnet"] < f1["max-matching"]
    assert f1["puma"] < f1["ocelot"] < f1["max-matching"]
    assert abs(f1["ocelot"] - f1["mcspatnet"]) < 0.5
    assert 10 < f1["puma"] - f1["hovernet"] < 15
    assert f1["max-matching"] == pytest.approx(79, abs=1)


def test_real_nuclei_against_themselves_with_jitter(shared_data: Path) -> None:
    """On BRCA-M2C's test images, the truth scores 1, and less with more jitter."""
    folder = shared_data / "brcam2c"
    truths = []
    for image in open_source(f"brcam2c:{folder}"):
        if image.split == "test":
            assert image.label is not None
            truths.append(Points(image.xy, image.label))
    assert len(truths) == 30
    perfect, _ = evaluate_all(truths, truths, 0.5, 3, draws=0)
    for name, one in perfect.items():
        assert one.detection.tp == sum(len(truth.xy) for truth in truths), name
        present = np.mean([[(truth.label == c).any() for c in range(3)] for truth in truths])
        assert one.mean_f1 == pytest.approx(present if name == "puma" else 1, abs=1e-6)
    rng = np.random.default_rng(0)
    means: dict[str, list[float]] = {name: [] for name in PROTOCOLS}
    for jitter in (2.0, 4.0, 8.0):
        moved = [jittered(rng, truth, jitter, 0.0, 490, 3) for truth in truths]
        scores, _ = evaluate_all(moved, truths, 0.5, 3, draws=0)
        for name, one in scores.items():
            means[name].append(one.detection.f1)
    for name, (little, some, much) in means.items():
        assert 1.0 > little > some > much > 0.2, name
        assert little > 0.9, name


# ------------------------------------------------------------------------------------------------- reports and checks


def test_a_table_of_protocols_and_classes() -> None:
    predictions, truths = images(1)
    scores, _ = evaluate_all(predictions, truths, 0.5, 3, draws=20)
    shown = printed(scores_table(scores, ["lymphocyte", "tumour", "stromal"]))
    for name, one in scores.items():
        (row,) = [line for line in shown.splitlines() if f" {name} " in line]
        f1 = [*(score.f1 for score in one.classes), one.mean_f1, one.detection.f1]
        assert [cell.split()[0] for cell in row.split("│")[3:-1]] == [f"{100 * value:.2f}" for value in f1]
    assert "stromal" in shown and "95 % intervals" in shown
    alone = printed(scores_table({"ocelot": evaluate(predictions, truths, 0.5, 3)}, []))
    assert "intervals" not in alone and "mean" not in alone and "detection" in alone
    details = printed(figures_table(scores["ocelot"], ["lymphocyte", "tumour", "stromal"]))
    assert str(scores["ocelot"].classes[1].tp) in details.split("tumour")[1].split("\n")[0]


def printed(table: object) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_scores_are_json() -> None:
    predictions, truths = images(1)
    one = evaluate(predictions, truths, 0.5, 3, draws=10)
    content = json.loads(json.dumps(dataclasses.asdict(one), allow_nan=False))
    assert content["classes"][2]["tp"] == one.classes[2].tp
    assert content["mean_f1_ci95"] == list(one.mean_f1_ci95 or ())


GOOD = points([(1, 1)], [0], [0.5])


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (points([(1, 1)], [0], [np.nan]), "predictions of image 1: scores must be .* not NaN"),
        (points([(1, np.nan)], [0]), r"predictions of image 1: xy is \[1, 2\]; expected \[n, 2\] finite"),
        (points([(1, 1)], [2]), "predictions of image 1: labels must be .* from 0 to 1"),
        (points([(1, 1)], [-1]), "predictions of image 1: labels must be .* from 0 to 1"),
        (points([(1, 1)], [0, 1]), r"predictions of image 1: labels must be \[1\]"),
        (Points(np.ones((1, 2)), np.zeros(1)), "predictions of image 1: labels must be .* whole numbers"),
        (Points(np.ones((1, 3)), np.zeros(1, np.int64)), r"predictions of image 1: xy is \[1, 3\]"),
        (points([(1, 1)], [0], [0.5, 0.5]), r"predictions of image 1: scores must be \[1\]"),
    ],
)
def test_invalid_arrays_are_reported(prediction: Points, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate([GOOD, prediction], [GOOD, GOOD], 0.5, 2)


def test_invalid_settings_are_reported() -> None:
    with pytest.raises(UserError, match="predictions for 1 images, truth for 2"):
        evaluate([GOOD], [GOOD, GOOD], 0.5, 1)
    with pytest.raises(UserError, match="for 0 images"):
        evaluate([], [], 0.5, 1)
    with pytest.raises(UserError, match="2 values of mpp for 1 images"):
        evaluate([GOOD], [GOOD], (0.5, 0.5), 1)
    with pytest.raises(UserError, match=r"mpp=0\.0: expected um per pixel"):
        evaluate([GOOD], [GOOD], 0.0, 1)
    with pytest.raises(UserError, match="radius_um=-1: expected um above 0"):
        evaluate_all([GOOD], [GOOD], 0.5, 1, radius_um=-1)
    with pytest.raises(UserError, match=r"no protocol 'puna'.*did you mean 'puma'"):
        evaluate([GOOD], [GOOD], 0.5, 1, "puna")
