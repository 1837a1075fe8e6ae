"""augment_views against Pillow, SciPy, colorsys, numpy and torchvision, and its backends against each other."""

from __future__ import annotations

import colorsys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from muse_fast import ops
from muse_fast.images.imagenet import normalise
from muse_fast.ops import backends
from muse_fast.views.boxes import ViewBox
from muse_fast.views.colours import Colour, apply_colour
from tests.support.stains import STRONG, stained_exactly

pytestmark = pytest.mark.usefixtures("deterministic")

needs_triton = pytest.mark.skipif(backends.triton_error() is not None, reason=str(backends.triton_error()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels; on the CPU they are interpreted
BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])

Box = tuple[int, int, int, int, int, int]  # image, x, y, side, flip, turns


def pictures(*shapes: tuple[int, int]) -> list[Tensor]:
    """Make images with smooth colours and edges, uint8 [3, H, W]."""
    random = torch.Generator().manual_seed(1)
    made = []
    for height, width in shapes:
        coarse = torch.rand(1, 3, height // 6 + 2, width // 6 + 2, generator=random)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0] * 300 - 20
        smooth[:, height // 3 : height // 2, width // 4 : width // 2] *= 0.3
        made.append(smooth.clamp(0, 255).to(torch.uint8))
    return made


def packed(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    starts = np.cumsum([0, *(image.numel() for image in images)])
    table = torch.tensor([[start, *image.shape[1:]] for start, image in zip(starts, images, strict=False)])
    return torch.cat([image.flatten() for image in images]).to(DEVICE), table.to(DEVICE)


def augmented(
    images: list[Tensor],
    boxes: list[Box],
    size: int,
    backend: str,
    colours: list[Colour] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    rows = [colour.row() for colour in colours or [Colour()] * len(boxes)]
    return ops.augment_views(
        *packed(images),
        torch.tensor(boxes, dtype=torch.int32, device=DEVICE).view(-1, 6),
        torch.tensor(rows, dtype=torch.float32, device=DEVICE).view(-1, 17),
        size,
        dtype,
        backend=backend,
    ).cpu()


def levels(views: Tensor) -> Tensor:
    """Undo the normalisation, to 0..255; not rounded, so that a wrong normalisation shows."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (views.double() * deviation + mean) * 255


def assert_levels(got: Tensor, expected: Tensor, *, share_off: float = 0.0) -> None:
    """Assert that all are within one level, and at most a fraction is off by more than a hundredth of a level."""
    off = (levels(got) - expected).abs()
    assert off.max() <= 1.01
    assert (off > 0.01).double().mean() <= share_off


@BACKENDS
def test_turns_and_flips_equal_numpy(backend: str) -> None:
    """Pixel for pixel, in the order and direction of ``ViewBox``, in the second of two images."""
    images, cases = pictures((20, 21), (37, 40)), [(flip, turns) for flip in (0, 1) for turns in range(4)]
    got = augmented(images, [(1, 3, 2, 30, flip, turns) for flip, turns in cases], 30, backend)
    crop = images[1][:, 2:32, 3:33].numpy()
    for view, (flip, turns) in zip(got, cases, strict=True):
        expected = np.rot90(crop[:, :, ::-1] if flip else crop, turns, (1, 2)).copy()
        assert_levels(view, torch.from_numpy(expected))
        assert torch.equal(ViewBox(3, 2, 30, 30, bool(flip), turns).render(images[1]), torch.from_numpy(expected))


@BACKENDS
@pytest.mark.parametrize(("side", "size"), [(80, 40), (47, 48), (20, 48), (1, 5), (100, 4)], ids=lambda n: str(n))
def test_resize_equals_pillow(side: int, size: int, backend: str) -> None:
    """Pillow resizes single channels in float, antialiased, with a = -1/2. The crop is smaller than the image."""
    (image,) = pictures((110, 120))
    got = augmented([image], [(0, 7, 5, side, 0, 0)], size, backend)[0]
    crop = image[:, 5 : 5 + side, 7 : 7 + side]
    exact = [Image.fromarray(c.numpy().astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC) for c in crop]
    truth = torch.from_numpy(np.stack([np.asarray(channel) for channel in exact])).double().clamp(0, 255)
    assert (levels(got) - truth).abs().max() <= 0.51
    assert_levels(got, truth.round(), share_off=0.002)


@BACKENDS
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_scipy(sigma: float, backend: str) -> None:
    (image,) = pictures((40, 40))
    got = augmented([image], [(0, 0, 0, 40, 0, 0)], 40, backend, [Colour(blur_sigma=sigma)])[0]
    away = np.arange(-max(1, round(3 * sigma)), max(1, round(3 * sigma)) + 1)
    kernel = np.exp(-(away**2) / (2 * sigma**2))
    truth = image.double().numpy()
    for axis in (1, 2):
        truth = ndimage.correlate1d(truth, kernel / kernel.sum(), axis, mode="mirror")
    assert_levels(got, torch.from_numpy(truth).round(), share_off=0.002)


@BACKENDS
def test_blur_radius_is_limited_by_a_small_view(backend: str) -> None:
    (image,) = pictures((8, 8))
    got = augmented([image], [(0, 0, 0, 8, 0, 0)], 8, backend, [Colour(blur_sigma=2.0)])
    assert_levels(got[0], apply_colour(image, Colour(blur_sigma=2.0)), share_off=0.02)


@BACKENDS
def test_hue_equals_colorsys(backend: str) -> None:
    """For all colours of a coarse cube, including greys and ties, in both directions."""
    grid = torch.tensor([0, 51, 102, 153, 204, 255], dtype=torch.uint8)
    colours = torch.cartesian_prod(grid, grid, grid)[:196].T.reshape(3, 14, 14)
    for shift in (0.1, -0.23, 0.5):
        got = levels(augmented([colours], [(0, 0, 0, 14, 0, 0)], 14, backend, [Colour(hue=shift)])[0])
        for place in range(196):
            h, s, v = colorsys.rgb_to_hsv(*(colours.flatten(1)[:, place] / 255).tolist())
            expected = np.array(colorsys.hsv_to_rgb((h + shift) % 1, s, v)) * 255
            assert np.abs(got.flatten(1)[:, place].numpy() - expected).max() <= 1.01, (shift, place)


@BACKENDS
def test_stains_equal_the_equations(backend: str) -> None:
    """For all colours of a coarse cube, black and white included, with strong changes and with none."""
    grid = torch.tensor([0, 51, 102, 153, 204, 255], dtype=torch.uint8)
    image = torch.cartesian_prod(grid, grid, grid)[-196:].T.reshape(3, 14, 14)
    image[:, 0, 0] = 0
    stains = [STRONG, (2, 0, 2, -1, 1, -1), (1, 1, 1, 0, 0, 0.1), (1, 1, 1, 0, 0, 0)]
    colours = [Colour(stain=stain) for stain in stains]
    got = augmented([image], [(0, 0, 0, 14, 0, 0)] * 4, 14, backend, colours)
    for view, stain in zip(got, stains, strict=True):
        assert np.abs(levels(view).numpy() - stained_exactly(image, stain)).max() <= 0.501, stain
    assert torch.equal(levels(got[3]).round().to(torch.uint8), image)


@BACKENDS
def test_jitter_in_every_order_equals_torchvision(backend: str) -> None:
    (image,) = pictures((16, 16))
    colours = [
        # factors that seldom yield whole levels, which float32 may truncate either way
        Colour(brightness=1.3517, contrast=0.6523, saturation=1.2137, hue=0.0713, order=order, grey=number % 5 == 0)
        for number, order in enumerate(permutations(range(4)))
    ]
    if backend == "triton" and DEVICE == "cpu":
        colours = colours[::3]  # the interpreter is slow
    got = augmented([image], [(0, 0, 0, 16, 0, 0)] * len(colours), 16, backend, colours)
    for view, colour in zip(got, colours, strict=True):
        assert (levels(view) - apply_colour(image, colour)).abs().mean() < 0.01, colour


@BACKENDS
def test_solarise_and_grey(backend: str) -> None:
    (image,) = pictures((16, 16))
    box: Box = (0, 0, 0, 16, 0, 0)
    solarised, grey, both = augmented(
        [image], [box] * 3, 16, backend, [Colour(solarise=True), Colour(grey=True), Colour(solarise=True, grey=True)]
    )
    assert_levels(solarised, torch.where(image >= 128, 255 - image, image))
    dull = (0.2989 * image[0].double() + 0.587 * image[1].double() + 0.114 * image[2].double()).floor()
    assert_levels(grey, dull.expand(3, 16, 16), share_off=0.01)
    assert_levels(both, torch.where(dull >= 128, 255 - dull, dull).expand(3, 16, 16))


@needs_triton
def test_triton_and_reference_agree_on_tissue(shared_data: Path) -> None:
    """All steps together, across tiles: they rarely differ, and then by the rounding of a level."""
    image = torch.from_numpy(np.array(Image.open(shared_data / "mitos12" / "A00_01.jpg"))).permute(2, 0, 1)
    image = image[:, 300:400, 700:790].contiguous()
    boxes: list[Box] = [(0, 3, 30, 64, 1, 1), (0, 40, 20, 41, 0, 3)]
    colours = [
        Colour(0.8, 1.3, 0.9, -0.05, (3, 1, 0, 2), blur_sigma=1.1, solarise=True),
        Colour(1.2, 0.7, 1.1, 0.08, (2, 0, 1, 3), stain=STRONG),
    ]
    expected, got = (augmented([image], boxes, 36, backend, colours) for backend in ("reference", "triton"))
    off = (levels(got) - levels(expected)).abs()
    assert off.max() <= 2.01 and off.mean() <= 0.005
    rounded = augmented([image], boxes[1:], 36, "triton", colours[1:], torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded[0].float(), got[1], rtol=2.0**-7, atol=0)  # the interpreter truncates


@BACKENDS
def test_no_views_and_strided_arguments(backend: str) -> None:
    assert augmented(pictures((9, 9)), [], 16, backend).shape == (0, 3, 16, 16)
    pixels, table = packed(pictures((20, 24), (18, 18)))
    boxes = torch.tensor([[0, 1, 2, 15, 0, 1], [1, 0, 0, 18, 1, 0]], dtype=torch.int32, device=DEVICE)
    colours = torch.tensor([Colour(hue=0.1).row(), Colour(blur_sigma=1.0).row()], device=DEVICE)
    expected = ops.augment_views(pixels, table, boxes, colours, 16, backend=backend)
    strided = (pixels.repeat_interleave(2)[::2], table.T.contiguous().T, boxes.T.contiguous().T, colours[:, None][:, 0])
    assert torch.equal(ops.augment_views(*strided, 16, backend=backend), expected)


def arguments() -> dict[str, Any]:
    pixels, table = packed(pictures((20, 24)))
    boxes = torch.tensor([[0, 1, 2, 9, 0, 1], [0, 4, 0, 8, 1, 0]], dtype=torch.int32, device=DEVICE)
    colours = torch.tensor([Colour(hue=0.1).row(), Colour(blur_sigma=0.5).row()], device=DEVICE)
    return {"pixels": pixels, "images": table, "boxes": boxes, "colours": colours, "size": 8, "dtype": torch.bfloat16}


@needs_triton
def test_opcheck() -> None:
    from muse_fast.kernels.fused.augment_views import augment_views

    torch.library.opcheck(augment_views, tuple(arguments().values()))


@BACKENDS
def test_compiles_without_a_graph_break(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference reads boxes on the host, view by view")
    compiled = torch.compile(ops.augment_views, fullgraph=True, backend="aot_eager")
    expected = ops.augment_views(**arguments(), backend=backend)
    assert torch.equal(compiled(**arguments(), backend=backend), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.zeros(9)}, r"pixels must be uint8 \[bytes\], got torch.float32"),
        ({"images": torch.zeros(1, 2).long()}, r"images must be torch.int64 \[1, 3\], got torch.int64 \[1, 2\]"),
        ({"boxes": torch.zeros(2, 6)}, "boxes must be torch.int32"),
        ({"colours": torch.zeros(3, 17)}, r"colours must be torch.float32 \[2, 17\]"),
        ({"colours": torch.zeros(2, 17, device="meta")}, "colours on meta"),
        ({"size": 3}, "size must be at least 4"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16"),
        ({"images": torch.tensor([[0, 20, 25]])}, r"\[\[0, 20, 25\]\] do not fit in 1440 bytes"),
        ({"boxes": torch.tensor([[0, 0, 0, 9, 0, 0], [1, 0, 0, 9, 0, 0]]).int()}, "not one of the 1"),
        ({"boxes": torch.tensor([[0, 0, 0, 9, 0, 0], [0, 7, 0, 18, 0, 0]]).int()}, "box 1 .* outside its image"),
        ({"backend": "cpp"}, "no cpp implementation"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    valid = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in arguments().items()}
    with pytest.raises(ValueError, match=f"augment_views: .*{message}"):
        ops.augment_views(**(valid | change))


def test_normalisation_equals_the_cpu_path() -> None:
    (image,) = pictures((16, 16))
    assert torch.equal(augmented([image], [(0, 0, 0, 16, 0, 0)], 16, "reference")[0], normalise(image))
