"""Procedural images are repeatable, correctly labelled, and coloured like H&E."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from skimage.color import rgb2hed

from muse_fast.images.synthetic import LABEL_NAMES, synthetic_image


def test_another_process_generates_the_same_bytes() -> None:
    script = (
        "import hashlib; from muse_fast.images.synthetic import synthetic_image as f; a, b, c = f((5, 7), 96, 0.5);"
        "print(hashlib.sha256(a.tobytes() + b.tobytes() + c.tobytes()).hexdigest())"
    )
    image, xy, label = synthetic_image((5, 7), 96, 0.5)
    here = hashlib.sha256(image.tobytes() + xy.tobytes() + label.tobytes()).hexdigest()
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


@pytest.mark.parametrize(("size", "mpp"), [(512, 0.25), (511, 0.5), (33, 2.0), (16, 0.25)])
def test_shapes_and_places(size: int, mpp: float) -> None:
    image, xy, label = synthetic_image(1, size, mpp)
    assert image.shape == (size, size, 3)
    assert (image.dtype, xy.dtype, label.dtype) == (np.uint8, np.float32, np.int16)
    assert xy.shape == (len(label), 2)
    assert ((xy >= 0) & (xy < size)).all()
    if len(xy) > 1:
        assert pdist(xy).min() * mpp > 4  # um: nuclei do not coincide


def test_scale_is_physical() -> None:
    """The density of nuclei is per um^2: four times the area has about four times as many."""
    small = sum(len(synthetic_image(i, 256, 0.5)[1]) for i in range(8))
    large = sum(len(synthetic_image(i, 512, 0.5)[1]) for i in range(8))
    assert 3 < large / small < 5


def test_nuclei_are_hematoxylin_and_their_surroundings_eosin() -> None:
    image, xy, label = synthetic_image(2)
    hed = rgb2hed(image)
    column, row = xy.astype(int).T
    at_nuclei = hed[row, column, 0]
    assert at_nuclei.min() > np.median(hed[..., 0])
    colour = np.median(image.reshape(-1, 3), axis=0)  # mostly stroma: pink
    assert colour[0] > colour[2] > colour[1]
    assert set(label.tolist()) == {0, 1, 2}
    assert len(LABEL_NAMES) == 3
    darkness = [at_nuclei[label == kind].mean() for kind in range(3)]
    assert darkness[0] > darkness[2] > darkness[1]  # lymphocytes darkest, tumour palest


def test_types_differ_in_size_and_shape() -> None:
    """Measured from the pixels: second moments of the dark pixels around each centre, in um."""
    area: dict[int, list[float]] = {0: [], 1: [], 2: []}
    elongation: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for seed in range(3):
        image, xy, label = synthetic_image(seed)
        dark = image[..., 0] < 140
        apart = np.sqrt(((xy[:, None] - xy) ** 2).sum(-1)) + 1e9 * np.eye(len(xy))
        v, u = np.mgrid[: dark.shape[0], : dark.shape[1]] + 0.5
        for (x, y), kind, gap in zip(xy, label, apart.min(1), strict=True):
            if gap < 60 or min(x, y) < 40 or max(x, y) > 472:
                continue
            near = dark & (np.hypot(u - x, v - y) < 32)
            moments = np.sort(np.linalg.eigvalsh(np.cov(np.stack([u[near], v[near]]))))
            area[kind].append(near.sum() * 0.25**2)
            elongation[kind].append(np.sqrt(moments[1] / moments[0]))
    assert all(area.values())
    assert np.median(area[1]) > 1.8 * np.median(area[0])
    assert np.median(elongation[0]) < 1.3 < 2 < np.median(elongation[2])
