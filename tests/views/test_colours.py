import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.color import hed2rgb, rgb2hed

from muse_fast.config import ViewsConfig, load_config
from muse_fast.errors import UserError
from muse_fast.images.imagenet import denormalise, normalise
from muse_fast.views.colours import Colour, apply_colour, draw_colour
from tests.support.stains import STRONG, stained_exactly


def picture(size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_default_colour_changes_nothing() -> None:
    assert torch.equal(apply_colour(picture(), Colour()), picture())


def test_brightness_hue_and_solarise_against_formulas() -> None:
    image = picture()
    bright = apply_colour(image, Colour(brightness=0.7))
    assert (bright.float() - (image.float() * 0.7)).abs().max() <= 1
    solar = apply_colour(image, Colour(solarise=True))
    assert torch.equal(solar, torch.where(image >= 128, 255 - image, image))
    turned = apply_colour(image, Colour(hue=0.1))
    for y, x in [(0, 0), (5, 9), (31, 30)]:
        h, s, v = colorsys.rgb_to_hsv(*(image[:, y, x] / 255).tolist())
        expected = torch.tensor(colorsys.hsv_to_rgb((h + 0.1) % 1, s, v)) * 255
        assert (turned[:, y, x].float() - expected).abs().max() <= 2


def test_grey_has_three_equal_channels() -> None:
    grey = apply_colour(picture(), Colour(grey=True))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])


def test_blur_of_a_point_is_a_gaussian() -> None:
    image = torch.zeros(3, 33, 33, dtype=torch.uint8)
    image[:, 16, 16] = 255
    blurred = apply_colour(image, Colour(blur_sigma=1.5))[0].double()
    y, x = np.mgrid[:33, :33] - 16
    gauss = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    assert np.abs(blurred.numpy() - 255 * gauss / gauss.sum()).max() <= 1


def test_normalise_round_trip() -> None:
    assert torch.equal(denormalise(normalise(picture())), picture())
    mid = normalise(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(mid, torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))


def test_probabilities_per_role() -> None:
    rng = np.random.default_rng(0)
    config = ViewsConfig()
    for role, blur, solarise in (("first", 1.0, 0.0), ("second", 0.1, 0.2), ("local", 0.5, 0.0)):
        drawn = [draw_colour(rng, role, config) for _ in range(2000)]
        assert abs(np.mean([c.blur_sigma is not None for c in drawn]) - blur) < 0.04
        assert abs(np.mean([c.solarise for c in drawn]) - solarise) < 0.04
        assert abs(np.mean([c.grey for c in drawn]) - 0.2) < 0.04
        jittered = [c for c in drawn if c.brightness is not None]
        assert abs(len(jittered) / 2000 - 0.8) < 0.04
        assert max(abs(c.hue or 0) for c in jittered) <= 0.1
        assert 0.35 < max(abs((c.brightness or 1) - 1) for c in jittered) <= 0.4


def test_with_all_off_a_draw_changes_nothing_but_consumes_the_same_numbers() -> None:
    off = ViewsConfig(jitter=0, grey=0, solarise=0, blur=False)
    a, b = np.random.default_rng(3), np.random.default_rng(3)
    drawn = draw_colour(a, "second", off)
    assert apply_colour(picture(), drawn) is not None and torch.equal(apply_colour(picture(), drawn), picture())
    draw_colour(b, "second", ViewsConfig())
    assert a.random() == b.random()


def assert_rounded(got: torch.Tensor, exact: np.ndarray) -> None:
    """To the nearest level; float32 may decide a tie either way."""
    assert got.dtype == torch.uint8
    assert np.abs(got.numpy() - exact).max() <= 0.501


@pytest.mark.parametrize("stain", [STRONG, (0.0, 1.0, 2.0, 0, 0, 0), (1.0, 1.0, 1.0, -1.0, 1.0, -0.3)])
def test_stain_equals_the_equations(stain: tuple[float, ...]) -> None:
    """Random colours, most of which no stain has, in a view that is not square."""
    image = picture()[:, :31]
    got = apply_colour(image, Colour(stain=stain))
    assert_rounded(got, stained_exactly(image, stain))
    assert not torch.equal(got, image)


def test_stain_equals_scikit_image() -> None:
    """Its amounts are densities / ln 1e6, and negative ones become 0, so we compare colours of positive amounts."""
    rng, unit = np.random.default_rng(0), np.log(1e6)
    amounts = rng.uniform(0.02, 0.8, size=(3, 24, 25)) / unit
    image = torch.from_numpy((255 * hed2rgb(amounts, channel_axis=0)).round().astype(np.uint8))
    separated = rgb2hed(image.numpy(), channel_axis=0)
    positive = (separated > 0).all(0)
    changed = separated * np.reshape(STRONG[:3], (3, 1, 1)) + np.reshape(STRONG[3:], (3, 1, 1)) / unit
    got = apply_colour(image, Colour(stain=STRONG))
    assert positive.mean() > 0.9
    assert_rounded(got[:, positive], 255 * hed2rgb(changed, channel_axis=0)[:, positive])


def test_stain_that_changes_nothing_returns_every_level() -> None:
    level = torch.arange(256, dtype=torch.uint8)
    image = torch.stack([level.view(16, 16), level.flip(0).view(16, 16), level.roll(77).view(16, 16)])
    assert torch.equal(apply_colour(image, Colour(stain=(1, 1, 1, 0, 0, 0))), image)


def test_stain_of_extreme_colours() -> None:
    """Black, white and pure colours, with amounts that double, vanish or are shifted far."""
    corners = torch.cartesian_prod(*[torch.tensor([0, 255], dtype=torch.uint8)] * 3).T.reshape(3, 2, 4)
    for stain in (STRONG, (2, 2, 2, 1, 1, 1), (0, 0, 0, -1, -1, -1), (2, 0, 2, -1, 1, -1)):
        got = apply_colour(corners, Colour(stain=stain))
        assert_rounded(got, stained_exactly(corners, stain))
    black, white = apply_colour(corners, Colour(stain=(0.5, 0.5, 0.5, 0.1, 0.1, 0.1)))[:, [0, 1], [0, 3]].T.tolist()
    assert max(black) < 20 and 200 < min(white) < 245


def test_stains_are_drawn_within_their_ranges_and_independently() -> None:
    config = ViewsConfig(stain=0.4, stain_shift=0.08)
    rng = np.random.default_rng(0)
    drawn = np.array([draw_colour(rng, "local", config).stain for _ in range(1000)])
    spread = np.hstack([drawn[:, :3] - 1, drawn[:, 3:]]) / ([0.4] * 3 + [0.08] * 3)
    assert np.abs(spread).max() <= 1 and spread.max(0).min() > 0.98 and spread.min(0).max() < -0.98
    assert np.abs(np.corrcoef(spread.T) - np.eye(6)).max() < 0.12
    only = draw_colour(np.random.default_rng(0), "local", ViewsConfig(stain_shift=0.08)).stain
    assert only is not None and only[:3] == (1, 1, 1) and min(map(abs, only[3:])) > 0


def test_stain_leaves_all_other_draws_as_they_are() -> None:
    a, b = np.random.default_rng([7, 0, 3]), np.random.default_rng([7, 0, 3])
    for role in ("first", "second", "local"):
        with_stain = draw_colour(a, role, ViewsConfig(stain=0.4, stain_shift=0.08))
        without = draw_colour(b, role, ViewsConfig())
        assert without.stain is None and replace(with_stain, stain=None) == without
    assert a.random() == b.random()


@pytest.mark.parametrize(
    "item", ["views.stain=-0.1", "views.stain=1.1", "views.stain_shift=2", "views.stain_shift=nan"]
)
def test_stain_settings_out_of_range_are_refused_by_name(item: str) -> None:
    with pytest.raises(UserError, match=f"{item}.*expected"):
        load_config(None, [item])
