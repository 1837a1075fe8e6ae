import colorsys

import numpy as np
import torch

from muse_fast.config import ViewsConfig
from muse_fast.images.imagenet import denormalise, normalise
from muse_fast.views.colours import Colour, apply_colour, draw_colour


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
