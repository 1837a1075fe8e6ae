"""The check of um/px: both measures on discs of known size, and right and wrong scales on real images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from muse_fast.preparing.scale_check import ScaleCheck
from muse_fast.sources import Dataset, SourceImage, open_source


def discs(mpp: float, width_um: float, spacing_um: float, side: int = 256) -> SourceImage:
    """Dark discs on a square grid."""
    steps = np.arange(spacing_um / 2, side * mpp, spacing_um) / mpp
    xy = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    pixels = np.stack(np.mgrid[:side, :side][::-1], axis=-1) + 0.5
    nearest, _ = cKDTree(xy).query(pixels)
    image = np.full((side, side, 3), 220, np.uint8)
    image[nearest <= width_um / 2 / mpp] = 90
    return SourceImage("a", "a", "", image, mpp, xy.astype(np.float32), None, None)


def check(*items: SourceImage) -> ScaleCheck:
    scale = ScaleCheck()
    for item in items:
        scale.add(item)
    return scale


@pytest.mark.parametrize("mpp", [0.2, 0.25, 0.5])
@pytest.mark.parametrize("width_um", [4.5, 7.0])
def test_discs_of_known_size(mpp: float, width_um: float) -> None:
    scale = check(discs(mpp, width_um, 11.0, 512))
    found = scale.summary()
    assert found["spacing_um"] == pytest.approx(11.0, abs=0.01)
    assert found["width_um"] == pytest.approx(width_um, abs=0.5)
    assert found["contrast"] == pytest.approx(np.log10(220 / 90), abs=0.02)
    count = len(discs(mpp, width_um, 11.0, 512).xy)
    assert found["nuclei_per_mm2"] == pytest.approx(count / (512 * mpp / 1000) ** 2, rel=1e-3)
    assert scale.warnings() == []


def test_images_of_several_scales_add_up() -> None:
    found = check(discs(0.25, 6.0, 11.0), discs(0.5, 6.0, 11.0)).summary()
    assert found["width_um"] == pytest.approx(6.0, abs=0.5)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_scale_wrong_by_a_factor_of_two_on_real_images(shared_data: Path, factor: float) -> None:
    source = open_source(f"brcam2c:{shared_data / 'brcam2c'}")
    assert isinstance(source, Dataset)
    items = [source.read(entry) for entry in source.entries[::10]]
    true = check(*items)
    assert true.warnings() == []
    assert true.summary()["spacing_um"] == pytest.approx(8.1, abs=1.5)
    false = check(*(replace(item, mpp=item.mpp * factor) for item in items)).warnings()
    (width,) = [warning for warning in false if "um wide" in warning]
    assert f"{0.5 * factor:g} um/px is probably wrong, about 0." in width
    fitting = float(width.split("about ")[1].split()[0])
    assert fitting == pytest.approx(0.5, rel=0.25)


def test_points_that_miss_the_nuclei(shared_data: Path) -> None:
    """x and y are swapped: the points no longer lie on nuclei."""
    source = open_source(f"brcam2c:{shared_data / 'brcam2c'}")
    assert isinstance(source, Dataset)
    items = [source.read(entry) for entry in source.entries[::10]]
    swapped = [replace(item, xy=np.ascontiguousarray(item.xy[:, ::-1])) for item in items]
    assert any("x and y swapped" in warning for warning in check(*swapped).warnings())


def test_nuclei_too_dense_or_too_sparse() -> None:
    assert any("per mm2, expected at most" in one for one in check(discs(0.1, 4.0, 6.0, 512)).warnings())
    assert any("lie 3.0 um from their nearest" in one for one in check(discs(0.1, 2.0, 3.0)).warnings())
    far = [replace(discs(0.5, 6.0, 40.0), name=str(i)) for i in range(4)]
    assert any("lie 40.0 um from their nearest" in one for one in check(*far).warnings())


def test_too_few_nuclei_give_no_warnings() -> None:
    one = discs(0.25, 6.0, 11.0)
    few = replace(one, xy=one.xy[:5])
    none = replace(one, xy=one.xy[:0])
    for scale in (check(), check(none), check(few), check(few, none)):
        assert scale.warnings() == []
        assert scale.summary()["width_um"] is None
