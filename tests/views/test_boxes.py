"""Boxes of views transform pixels and points exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from muse_fast.config import ViewsConfig
from muse_fast.errors import UserError
from muse_fast.views.boxes import ViewBox, check_room, draw_boxes
from tests.support.dots import assert_dots_at, draw_dots, scattered

NONE = np.empty((0, 2), np.float32)
SMALL = ViewsConfig(global_size=96, local_size=64, num_locals=6)


@pytest.mark.parametrize("seed", range(6))
def test_dots_are_found_in_every_view_to_half_a_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    xy = scattered(rng, 310)
    image = draw_dots(310, xy, sigma=2.5)
    found = 0
    for box in [box for boxes in draw_boxes(rng, 310, 310, 0.3, NONE, SMALL) for box in boxes]:
        points, index = box.nuclei(xy)
        assert (np.diff(index) > 0).all()
        found += assert_dots_at(box.render(image)[0], points)
    assert found > 10


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_turns_move_pixels_and_points_alike_exactly(flip: bool, turns: int) -> None:
    """At scale 1 a point stays on the same pixel after any turn."""
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    box = ViewBox(7, 3, 32, 32, flip, turns)
    view = box.render(image)
    xy = np.stack(np.meshgrid(np.arange(7, 39) + 0.5, np.arange(3, 35) + 0.5), -1).reshape(-1, 2).astype(np.float32)
    points, index = box.nuclei(xy)
    assert len(index) == 32 * 32
    for (x, y), (u, v) in zip(xy[index], points, strict=True):
        assert torch.equal(view[:, int(v), int(u)], image[:, int(y), int(x)])


def test_resize_agrees_with_an_independent_antialiased_bicubic() -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.uniform(0, 255, (200, 200, 3)), (3, 3, 0))
    image = ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)
    box = ViewBox(11, 23, 150, 96)
    ours = box.render(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    crop = Image.fromarray(image).crop((11, 23, 161, 173))
    theirs = np.asarray(crop.resize((96, 96), Image.Resampling.BICUBIC))
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_right_and_bottom_edges_are_outside() -> None:
    box = ViewBox(10, 10, 20, 40)
    xy = np.array([[10, 10], [30, 15], [15, 30], [29.999, 29.999], [9.999, 15]], np.float32)
    points, index = box.nuclei(xy)
    assert index.tolist() == [0, 3]
    np.testing.assert_allclose(points, [[0, 0], [39.998, 39.998]], atol=1e-4)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_flip_and_turns_do_not_change_which_nuclei_are_inside(flip: bool, turns: int) -> None:
    """Left and top border are inside, right and bottom outside; a point on the view's far border moves inside."""
    xy = np.array([[10, 10], [10, 29.5], [30, 15], [15, 30], [10 + 1e-6, 29.999998], [9.999999, 15]], np.float32)
    points, index = ViewBox(10, 10, 20, 40, flip, turns).nuclei(xy)
    assert index.tolist() == [0, 1, 4]
    assert ((points >= 0) & (points < 40)).all()
    plain = ViewBox(10, 10, 20, 40, flip, turns).map_points(xy[index])
    assert np.abs(points - plain).max() <= np.spacing(np.float32(40))


def test_no_nuclei() -> None:
    points, index = ViewBox(0, 0, 32, 32, True, 3).nuclei(np.zeros((0, 2), np.float32))
    assert points.shape == (0, 2) and index.shape == (0,) and index.dtype == np.int32


@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(200, 2100),
    height=st.integers(200, 2100),
    mpp=st.floats(0.15, 0.6),
    overlap=st.floats(0.1, 1.0),
)
def test_boxes_lie_in_the_roi_overlap_and_have_a_scale_in_the_range(
    seed: int, width: int, height: int, mpp: float, overlap: float
) -> None:
    config = ViewsConfig(global_size=96, local_size=48, num_locals=4, min_overlap=overlap)
    try:
        check_room(width, height, mpp, config)
    except UserError:
        return
    globals_, locals_ = draw_boxes(np.random.default_rng(seed), width, height, mpp, NONE, config)
    for box, low in [(b, config.global_mpp_min) for b in globals_] + [(b, config.local_mpp_min) for b in locals_]:
        assert box.x >= 0 and box.y >= 0 and box.x + box.side <= width and box.y + box.side <= height
        half_pixel = 0.51 * mpp / box.size
        assert low - half_pixel <= box.mpp(mpp) <= 0.5 + half_pixel
    a, b = globals_
    for axis in ("x", "y"):
        start = max(getattr(a, axis), getattr(b, axis))
        stop = min(getattr(a, axis) + a.side, getattr(b, axis) + b.side)
        assert stop - start >= int(overlap * min(a.side, b.side))
    for box in locals_:
        inside = [
            g.x <= box.x and g.y <= box.y and box.x + box.side <= g.x + g.side and box.y + box.side <= g.y + g.side
            for g in globals_
            if g.side >= box.side
        ]
        assert any(inside) or any(g.side < box.side for g in globals_)


@pytest.mark.parametrize("redraws", [1, 3])
def test_the_anchor_is_placed_again_until_it_holds_enough_nuclei(redraws: int) -> None:
    """With a nucleus in every column of the left half, an anchor of 96 px holds 40 of them up to x = 472."""
    xy = np.stack([np.arange(512), np.full(512, 48)], axis=1).astype(np.float32)
    config = ViewsConfig(
        global_size=96,
        global_mpp_max=0.25,
        num_locals=0,
        min_overlap=1.0,  # both views are the anchor
        min_nuclei=40,
        anchor_redraws=redraws,
    )
    rng = np.random.default_rng(0)
    lefts = np.array([draw_boxes(rng, 1024, 96, 0.25, xy, config)[0][0].x for _ in range(2000)])
    share = 473 / (1024 - 96 + 1)  # of all places
    assert (lefts <= 472).mean() == pytest.approx(1 - (1 - share) ** (1 + redraws), abs=0.03)
    assert lefts.max() > 850, "the last place counts, whatever it holds"


def test_draws_without_a_minimum_do_not_depend_on_the_nuclei() -> None:
    full = np.full((50, 2), 100, np.float32)
    drawn = [draw_boxes(np.random.default_rng(1), 400, 400, 0.25, xy, SMALL) for xy in (NONE, full)]
    assert drawn[0] == drawn[1]


def test_um_per_px_is_uniform_over_the_range() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_boxes(rng, 2048, 2048, 0.25, NONE, ViewsConfig(num_locals=0))[0][0].mpp(0.25) for _ in range(4000)]
    counts = np.histogram(drawn, bins=5, range=(0.25, 0.5))[0]
    assert np.abs(counts / 800 - 1).max() < 0.12  # 3.4 standard deviations of a uniform draw


def test_a_roi_too_small_is_refused_with_the_size_needed() -> None:
    with pytest.raises(UserError, match="needs 112 px"):
        check_room(100, 300, 0.5, ViewsConfig())


def test_huge_coordinates_keep_their_precision() -> None:
    box = ViewBox(15000, 15000, 512, 1024)
    xy = np.array([[15000 + 256.25, 15000 + 100.5]], np.float32)
    np.testing.assert_array_equal(box.map_points(xy), [[512.5, 201.0]])
