"""Every protocol compared with its rule in plain Python: lists and loops, sharing no code with the package."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.spatial import KDTree

from muse_fast.errors import UserError
from muse_fast.images.points import Points
from muse_fast.scoring.protocols import PROTOCOLS, find_protocol
from muse_fast.scoring.scores import evaluate

CASES = 200


# A point is (x, y, label, score); an image is a pair of lists of points, (predictions, truths).


def distance(a, b):
    return math.sqrt((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2)


def confident_first(predictions, truths, radius):
    """OCELOT, PromptNucSeg: number of pairs."""
    free, hits = list(truths), 0
    for prediction in sorted(predictions, key=lambda p: -p[3]):
        nearest = min(free, key=lambda t: distance(prediction, t), default=None)
        if nearest is not None and distance(prediction, nearest) <= radius:
            free.remove(nearest)
            hits += 1
    return hits


def truth_by_raster(predictions, truths, radius):
    """MCSpatNet: one query of SciPy per true point, which decides between predictions that are equally near.

    Its limit of 50 candidates is never reached here.
    """
    places = sorted((y, x) for x, y, *_ in predictions)
    tree, free = KDTree(np.reshape(places, (-1, 2)), leafsize=2048), set(range(len(places)))
    hits = 0
    for place in sorted((y, x) for x, y, *_ in truths):
        near = [i for i in free if distance(places[i], place) < radius]
        if near:
            ranks = tree.query(place, k=50, distance_upper_bound=radius)[1].tolist()
            free.remove(min(near, key=lambda i: (distance(places[i], place), ranks.index(i))))
            hits += 1
    return hits


def truth_in_order(predictions, truths, radius):
    """PUMA, which removes the first prediction at the position of the chosen one."""
    waiting, hits = list(predictions), 0
    for truth in truths:
        eligible = [p for p in waiting if distance(p, truth) < radius]
        if eligible:
            chosen = min(eligible, key=lambda p: (-p[3], distance(p, truth)))
            for i, other in enumerate(waiting):
                if other[:2] == chosen[:2]:
                    del waiting[i]
                    break
            hits += 1
    return hits


def most_pairs(predictions, truths, radius):
    """Try every prediction unpaired and with each free true point."""
    if not predictions:
        return 0
    best = most_pairs(predictions[1:], truths, radius)
    for i, truth in enumerate(truths):
        if distance(predictions[0], truth) <= radius:
            best = max(best, 1 + most_pairs(predictions[1:], truths[:i] + truths[i + 1 :], radius))
    return best


def least_total(predictions, truths, radius):
    """HoVer-Net: pairs of indices of the assignment with the smallest total distance, restricted to the radius."""
    if len(predictions) > len(truths):
        return [(p, t) for t, p in least_total(truths, predictions, radius)]
    orders = itertools.permutations(range(len(truths)), len(predictions))
    best = min(orders, key=lambda order: sum(distance(p, truths[t]) for p, t in zip(predictions, order, strict=True)))
    return [(p, t) for p, t in enumerate(best) if distance(predictions[p], truths[t]) <= radius]


RULES = {
    "ocelot": confident_first,
    "mcspatnet": truth_by_raster,
    "promptnucseg": confident_first,
    "puma": truth_in_order,
    "max-matching": most_pairs,
}


def count(name, image, radius, classes):
    """(TP, FP, FN) per class, then of detection."""
    predictions, truths = image
    if name == "hovernet":
        pairs = least_total(predictions, truths, radius)
        rows = []
        for c in range(classes):
            both = [(predictions[p][2], truths[t][2]) for p, t in pairs]
            tp = both.count((c, c))
            alone_p = [p for i, p in enumerate(predictions) if i not in {q for q, _ in pairs} and p[2] == c]
            alone_t = [t for i, t in enumerate(truths) if i not in {u for _, u in pairs} and t[2] == c]
            fp = len(alone_p) + 2 * sum(a == c != b for a, b in both)
            fn = len(alone_t) + 2 * sum(b == c != a for a, b in both)
            rows.append((tp, fp, fn))
        hits = len(pairs)
    else:
        rows = []
        for c in range(classes):
            of_class = [[point for point in side if point[2] == c] for side in image]
            tp = RULES[name](*of_class, radius)
            rows.append((tp, len(of_class[0]) - tp, len(of_class[1]) - tp))
        hits = RULES[name](predictions, truths, radius)
    return [*rows, (hits, len(predictions) - hits, len(truths) - hits)]


def f1_of(name, tp, fp, fn):
    """(precision, recall, F1) of counts, in the arithmetic of each published code."""
    if name in ("ocelot", "promptnucseg"):
        precision, recall = tp / (tp + fp + 1e-7), tp / (tp + fn + 1e-7)
        f1 = 2 * precision * recall / (precision + recall + 1e-7)
        return tuple(round(x, 4) for x in (precision, recall, f1)) if name == "ocelot" else (precision, recall, f1)
    if name == "hovernet":
        f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0
        return tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0, f1
    empty = 1 if name == "mcspatnet" else 0
    precision, recall = tp / (tp + fp) if tp + fp else empty, tp / (tp + fn) if tp + fn else empty
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0


def score(name, images, radius, classes):
    """Counts summed over images, figures, mean F1."""
    counts = [count(name, image, radius, classes) for image in images]
    sums = [tuple(sum(image[row][i] for image in counts) for i in range(3)) for row in range(classes + 1)]
    if name == "puma":
        per_file = [[f1_of(name, *image[row]) for image in counts] for row in range(classes + 1)]
        figures = [tuple(sum(one[i] for one in row) / len(images) for i in range(3)) for row in per_file]
        occurring = [c for c in range(classes) if sum(sums[c]) > 0]
    else:
        figures = [f1_of(name, *row) for row in sums]
        in_truth = {point[2] for _, truths in images for point in truths}
        occurring = sorted(in_truth) if name == "hovernet" else list(range(classes))
    mean = sum(figures[c][2] for c in occurring) / len(occurring) if occurring else 0
    return sums, figures, mean


def random_images(rng, name, classes):
    """A few points on a small grid, so that distances, scores and positions tie, and distances equal the radius."""
    images = []
    for _ in range(rng.integers(1, 4)):
        sides = []
        for most in (6, 6):
            size = int(rng.integers(0, most + 1))
            # The solver would choose among assignments of equal cost, so hovernet gets points in general position.
            xy = rng.uniform(0, 9, (size, 2)) if name == "hovernet" else rng.integers(0, 9, (size, 2)).astype(float)
            sides.append(
                [(*place, int(rng.integers(classes)), float(rng.choice([0.1, 0.5, 0.5, 0.9]))) for place in xy.tolist()]
            )
        images.append(tuple(sides))
    return images


def as_points(side):
    table = np.array(side, np.float64).reshape(-1, 4)
    return Points(table[:, :2], table[:, 2].astype(np.int64), table[:, 3])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_agrees_with_the_rule_in_plain_python(name: str) -> None:
    rng = np.random.default_rng(list(PROTOCOLS).index(name))
    pairs = 0
    for case in range(CASES):
        classes = int(rng.integers(1, 4))
        images = random_images(rng, name, classes)
        radius = float(rng.choice([1, 2, 3, 5, math.sqrt(5)]))
        predictions, truths = ([as_points(image[side]) for image in images] for side in (0, 1))
        found = evaluate(predictions, truths, 0.25, classes, name, radius_um=radius * 0.25)
        sums, figures, mean = score(name, images, round(radius, 9), classes)
        rows = [*found.classes, found.detection]
        assert [(row.tp, row.fp, row.fn) for row in rows] == sums, case
        for row, expected in zip(rows, figures, strict=True):
            assert (row.precision, row.recall, row.f1) == pytest.approx(expected, abs=1e-12), case
        assert found.mean_f1 == pytest.approx(mean, abs=1e-12), case
        pairs += sums[-1][0]
    assert pairs > CASES  # the cases are not trivial


def test_default_radii_are_the_published_pixels() -> None:
    """At the scale of each data set, radii are whole pixels despite floating-point division; MCSpatNet's always are."""
    for name, mpp, pixels, on_the_border in [
        ("ocelot", 0.2, 15, True),
        ("mcspatnet", 0.5, 6, False),
        ("mcspatnet", 0.508, 6, False),
        ("mcspatnet", 0.465, 6, False),
        ("mcspatnet", 0.25, 12, False),
        ("mcspatnet", 1.0, 3, False),
        ("promptnucseg", 0.25, 12, True),
        ("puma", 0.25, 15, False),
        ("hovernet", 0.25, 12, True),
        ("hovernet", 0.5, 6, True),
    ]:
        truth = Points(np.array([[50.0, 50.0]]), np.array([0]))
        for offset, expected in ((pixels - 0.001, True), (pixels, on_the_border), (pixels + 0.001, False)):
            moved = Points(np.array([[50.0 + offset, 50.0]]), np.array([0]), np.array([0.5]))
            assert evaluate([moved], [truth], mpp, 1, name).detection.tp == expected, (name, offset)


def test_an_unknown_protocol_suggests_the_closest() -> None:
    with pytest.raises(UserError, match=r"no protocol 'hover-net' among ocelot, .*; did you mean 'hovernet'\?"):
        find_protocol("hover-net")
